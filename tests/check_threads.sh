#!/usr/bin/env bash
# ThreadSanitizer on the runner's tests: sessions apart and together, with any number of threads, some cancelled, some
# failing; and on `squeeze serve` with all that jobs do at once, and a restart in the middle of one (jobs_client.py). All of
# our own is compiled with it, by clang, whose OpenMP tells it what its barriers order; llama.cpp and libmicrohttpd are
# linked as they are, and what they do by themselves is not looked at.
#
#   check_threads.sh      works in $SQUEEZE_TEST_FOLDER; needs the pinned llama.cpp and the default model;
#                         SQUEEZE_ONLY_TESTS: a pattern of the tests to run, all by default
#
# 77: this machine has no clang with ThreadSanitizer and OpenMP's libarcher.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob

folder=$SQUEEZE_TEST_FOLDER
flags=(-std=c11 -fsanitize=thread -fopenmp -O1 -g -Iinclude -Ilib -Istore -Iengine)

# archer CC: the library that tells ThreadSanitizer of OpenMP's barriers, for this compiler.
archer() {
    local llvm
    llvm=$(dirname "$(dirname "$(readlink -f "$(command -v "$1")")")")
    [ -e "$llvm/lib/libarcher.so" ] && echo "$llvm/lib/libarcher.so"
}

# A race of two of OpenMP's threads is found, and none where a barrier lies between them.
cat >"$folder/probe.c" <<'END'
#include <stdlib.h>
static int shared[2];
int main(int argc, char **argv)
{
    (void)argv;
#pragma omp parallel num_threads(2)
    {
#pragma omp for schedule(static, 1)
        for (int i = 0; i < 2; i++) shared[argc > 1 ? 0 : i]++;
#pragma omp for schedule(static, 1)
        for (int i = 0; i < 2; i++) shared[1 - i]++;
    }
    return shared[0] == 0;
}
END
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66 history_size=5"
clang=
for candidate in "${TSAN_CC:-clang}" clang-{21,20,19,18,17,16,15,14}; do
    command -v "$candidate" >/dev/null || continue
    OMP_TOOL_LIBRARIES=$(archer "$candidate") || continue
    export OMP_TOOL_LIBRARIES
    "$candidate" "${flags[@]}" "$folder/probe.c" -o "$folder/probe" 2>/dev/null || continue
    if "$folder/probe" 2>/dev/null && ! "$folder/probe" race >/dev/null 2>&1; then
        clang=$candidate
        break
    fi
done
if [ -z "$clang" ]; then
    echo "no clang with ThreadSanitizer and OpenMP; on Debian: apt-get install clang libclang-rt-dev libomp-dev" >&2
    exit 77
fi
llama=$(scripts/setup.sh --where llama)
if [ ! -e "$llama/lib/libllama.a" ]; then
    echo "no llama.cpp in $llama" >&2
    exit 77
fi

build=$folder/build
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=None -DCMAKE_C_COMPILER="$clang" -DCMAKE_CXX_COMPILER="${clang/clang/clang++}" \
    -DCMAKE_C_FLAGS="-fsanitize=thread -O1 -g" -DCMAKE_EXE_LINKER_FLAGS=-fsanitize=thread -DSQUEEZE_TSAN=ON \
    -DSQUEEZE_CUDA=OFF -DSQUEEZE_SHARED=OFF -DSQUEEZE_TESTS=ON >"$folder/configure.log" 2>&1 ||
    { cat "$folder/configure.log"; exit 1; }
goals=(test_engine)
if grep -qE '^SQUEEZE_SERVER:BOOL=(ON|1|TRUE)' "$build/CMakeCache.txt"; then goals+=(squeeze_program); fi
cmake --build "$build" --target "${goals[@]}" --parallel "$(nproc)" >"$folder/build.log" 2>&1 ||
    { tail -40 "$folder/build.log"; exit 1; }
# What threads do is the same in every layer.
tests/make_model.py "$SQUEEZE_MODEL" "$folder/four.gguf" --layers 4
SQUEEZE_MODEL=$folder/four.gguf "$build/tests/test_engine"

# ---- Jobs of the server ---------------------------------------------------------------

if [ "${#goals[@]}" -eq 1 ] || ! command -v python3 >/dev/null; then exit 0; fi
server=
trap 'kill -9 "$server" 2>/dev/null || true' EXIT
rm -rf "$folder/contexts" # of a run that failed
mkdir "$folder/contexts"

# serve STEP: starts the server, asks it for the step, and ends it.
serve() {
    local got=0 port=
    "$build/squeeze" serve -m "$folder/four.gguf" --contexts "$folder/contexts" --port 0 --auto-prepare 256 --slots 6 \
        -t 2 --stop-seconds 60 >"$folder/server.log" 2>&1 </dev/null &
    server=$!
    for ((i = 0; i < 600; i++)); do
        port=$(sed -n 's/.*listening on .*:\([0-9]*\)$/\1/p' "$folder/server.log")
        if [ -n "$port" ] || ! kill -0 "$server" 2>/dev/null; then break; fi
        sleep 0.1
    done
    if [ -z "$port" ] || ! python3 tests/jobs_client.py "$port" "$1"; then got=1; fi
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" || got=$?
    [ "$got" -eq 0 ] || { tail -60 "$folder/server.log"; echo "squeeze serve, $1: $got" >&2; exit 1; }
}
serve busy
[ -e "$folder/contexts/left.job" ] || echo "the last job was done before the restart"
serve rest
