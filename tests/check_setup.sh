#!/usr/bin/env bash
# Set-up's proof of llama.cpp, made to fail on purpose: the program that proves sees a crash, a wrong product and what
# is no number, and set-up's own ladder leaves out what failed, says so, and does not build twice. Only the compilation
# of llama.cpp is a stand-in: it hands out the one in the cache. The compiler is asked as on a CPU with AMX and AVX-512,
# whatever this one has. Skipped (77) where the compiler does not know such a CPU, or no llama.cpp is in the cache.
set -euo pipefail
export OMP_WAIT_POLICY=passive
folder=$(mktemp -d "${SQUEEZE_TEST_FOLDER:-${TMPDIR:-/tmp}}/setup.XXXXXX")
trap 'rm -rf "$folder"' EXIT
source_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
real_cc=${CC:-cc}
real_prefix=$("$source_folder/scripts/setup.sh" --where llama)
if [ ! -f "$real_prefix/lib/cmake/llama/llama-config.cmake" ] ||
    ! "$real_cc" -march=sapphirerapids -dM -E -x c /dev/null >"$folder/macros" 2>&1; then
    echo "skipped: no llama.cpp in the cache, or a compiler that does not know -march=sapphirerapids" >&2
    exit 77
fi
failures=0
complain() {
    failures=$((failures + 1))
    printf 'FAILED: %s\n' "$*" >&2
    [ ! -f "$folder/said" ] || sed 's/^/  said: /' "$folder/said" >&2
}
has() { # has FILE TEXT
    grep -qF -- "$2" "$1" || complain "wanted in ${1##*/}: $2"
}

# ---- The program that proves ----------------------------------------------------------

if ! { cmake -S "$source_folder/cmake/llama_proof" -B "$folder/proof" "-Dggml_DIR=$real_prefix/lib/cmake/ggml" \
    -DCMAKE_C_FLAGS='-Wall -Wextra -Wshadow -Wstrict-prototypes -Werror' &&
    cmake --build "$folder/proof"; } >"$folder/log" 2>&1; then
    cat "$folder/log" >&2
    exit 1
fi
prove=$folder/proof/prove
"$prove" --sets "A B" >"$folder/right" || complain "the proof fails on this CPU: $(grep failed "$folder/right")"
for kind in f16 bf16 q4_0 q4_1 q4_K q5_K q6_K q8_0 iq4_nl; do
    has "$folder/right" "ok CPU $kind: "
done
# Each pair of buffer and kind that was right must fail when it is broken, with its reason.
for how in crash:'Segmentation fault' corrupt:', not ' nan:'is nan, not'; do
    if SQUEEZE_PROOF_BREAK=B:${how%%:*} "$prove" --sets "A B" >"$folder/broken"; then
        complain "${how%%:*} was not seen"
    fi
    [ "$(grep -c "^failed .*${how#*:}" "$folder/broken")" -eq "$(grep -c ^ok "$folder/right")" ] ||
        complain "${how%%:*}: wanted all to fail: $(cat "$folder/broken")"
done
SQUEEZE_PROOF_BREAK=C:crash "$prove" --sets "A B" >/dev/null || complain "broken by a set that is not in use"

# ---- The ladder ---------------------------------------------------------------------------

cat >"$folder/cc" <<END
#!/bin/sh
for argument; do
    shift
    [ "\$argument" != -march=native ] || argument=-march=sapphirerapids
    set -- "\$@" "\$argument"
done
exec "$real_cc" "\$@"
END
chmod +x "$folder/cc"

# set_up CODE SET:HOW: a set-up of llama.cpp in $folder/cache, with that broken. $folder/builds: one line a build.
set_up() {
    local got=0
    : >"$folder/builds"
    SQUEEZE_CACHE=$folder/cache CC=$folder/cc SQUEEZE_LLAMA_NATIVE=ON SQUEEZE_PROOF_BREAK=$2 bash -c '
        . "$1/scripts/setup.sh"
        folder=$2 real_prefix=$3
        installed_llama() { return 1; }
        fetch_llama() { :; }
        compile_llama() {
            echo "build: $*" >>"$folder/builds"
            mkdir -p "$work/prefix"
            cp -rsf "$real_prefix/lib" "$work/prefix/"
        }
        build_proof() { mkdir -p "$work/proof" && cp "$folder/proof/prove" "$work/proof/"; }
        set_up_llama "$cache/llama/x"' _ "$source_folder" "$folder" "$real_prefix" >"$folder/said" 2>&1 || got=$?
    [ "$got" -eq "$1" ] || complain "$2: exit code $got, wanted $1"
}
record=$folder/cache/llama/x/proof.txt
# built TIMES LAST-BUILD
built() {
    [ "$(wc -l <"$folder/builds"):$(tail -n 1 "$folder/builds")" = "$1:${2:+build: $2}" ] ||
        complain "wanted $1 builds, the last with '$2', got: $(cat "$folder/builds")"
}
fresh() { rm -rf "$folder/cache"; }

fresh
set_up 0 none:crash
[ "$(cat "$folder/builds")" = "build: " ] || complain "wanted one build with no options: $(cat "$folder/builds")"
has "$record" "left out: none"
has "$record" "AMX_INT8"
set_up 0 AMX_INT8:crash # proved already: neither built nor proved again
built 0 ""
rm "$record" # as earlier versions left it: proved, not built
set_up 0 none:crash
built 0 ""
has "$record" "left out: none"
rm "$record" # the same, but it is wrong
set_up 0 AMX_INT8:crash
built 2 "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
has "$folder/said" "llama.cpp is wrong on this CPU: CPU f16: Segmentation fault (signal 11), and "
has "$folder/said" "building llama.cpp again without AMX"
has "$folder/said" "(without AMX_BF16 AMX_INT8 AMX_TILE, with which it failed on this CPU"
has "$record" "left out: AMX_BF16 AMX_INT8 AMX_TILE"
has "$record" "why: CPU f16: Segmentation fault"
has "$record" "AVX512VNNI"
set_up 0 none:crash
built 0 ""
has "$folder/said" "without AMX_BF16"
fresh
set_up 0 AVX512BF16:corrupt
built 3 "-march=x86-64 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw"
has "$record" " AVX512F "
fresh
set_up 0 AVX512F:nan
built 4 "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -mno-avx512f"
fresh
set_up 0 FMA:corrupt
built 6 "-march=x86-64 -mno-sse3 -mno-bmi -mno-bmi2"
has "$record" "instruction sets: SSE SSE2"
fresh
set_up 1 SSE2:crash
built 6 "-march=x86-64 -mno-sse3 -mno-bmi -mno-bmi2"
has "$folder/said" "computes wrongly on this CPU whichever instruction sets it uses"
[ ! -e "$folder/cache/llama/x" ] || complain "a llama.cpp that is wrong was moved into the cache"

[ "$failures" -eq 0 ] || { echo "$failures failed" >&2; exit 1; }
echo ok
