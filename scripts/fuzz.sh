#!/usr/bin/env bash
# Fuzzes what reads files and text: builds the targets of tests/fuzz/ with clang's libFuzzer, AddressSanitizer and
# UndefinedBehaviorSanitizer, runs each from its seeds, and prints executions, findings and which share of the lines of
# store/ the inputs reach. tests/fuzz/README.md says more.
#
#   scripts/fuzz.sh [--time SECONDS] [--jobs N] [--no-coverage] [--json FILE] [--build FOLDER] [TARGET...]
#
# SECONDS are of each target (60); N processes run at once (one a core), several of one target where there are more of
# them than targets. FOLDER (build/fuzz) keeps the inputs that reach something new in corpus/ and findings in found/.
# Exit code 1 when something was found, 77 when this machine has no clang with libFuzzer or no llama.cpp of ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=60
jobs=$(nproc)
coverage=1
json=
build=build/fuzz
targets=()
while [ $# -gt 0 ]; do
    case $1 in
    --time | --jobs | --json | --build)
        [ $# -gt 1 ] || { echo "fuzz: $1 needs a value" >&2; exit 2; }
        case $1 in
        --time) seconds=$2 ;;
        --jobs) jobs=$2 ;;
        --json) json=$2 ;;
        --build) build=$2 ;;
        esac
        shift
        ;;
    --no-coverage) coverage=0 ;;
    -*) echo "fuzz: no option $1; allowed: --time, --jobs, --no-coverage, --json, --build" >&2; exit 2 ;;
    *) targets+=("$1") ;;
    esac
    shift
done

# ---- The compiler ---------------------------------------------------------------------

# has_fuzzer CC: whether it links a program with libFuzzer and the sanitizers.
has_fuzzer() {
    command -v "$1" >/dev/null && command -v "${1/clang/clang++}" >/dev/null &&
        echo 'int LLVMFuzzerTestOneInput(const char *b, unsigned long n); int LLVMFuzzerTestOneInput(const char *b,
            unsigned long n) { (void)b; (void)n; return 0; }' |
        "$1" -fsanitize=fuzzer,address,undefined -x c - -o "$scratch/probe" 2>/dev/null
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
clang=
for candidate in "${FUZZ_CC:-clang}" clang-{21,20,19,18,17,16,15,14}; do
    if has_fuzzer "$candidate"; then
        clang=$candidate
        break
    fi
done
if [ -z "$clang" ]; then
    echo "fuzz: no clang with libFuzzer; on Debian: apt-get install clang llvm libclang-rt-dev; or set FUZZ_CC" >&2
    exit 77
fi
if [ ! -f "$(scripts/setup.sh --where llama)/lib/libllama.a" ]; then
    echo "fuzz: no llama.cpp of ours to link with; run scripts/setup.sh" >&2
    exit 77
fi
# The LLVM tools of the same version.
tools=$(dirname "$(readlink -f "$(command -v "$clang")")")

# ---- Build --------------------------------------------------------------------------------

generator=()
if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then
    generator=(-G Ninja)
fi
goals=(--target fuzz)
[ "$coverage" = 0 ] || goals+=(--target fuzz_coverage)
log=$scratch/build.log
if ! cmake "${generator[@]}" -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER="$clang" \
        -DCMAKE_CXX_COMPILER="${clang/clang/clang++}" -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DSQUEEZE_FUZZ=ON \
        -DSQUEEZE_TESTS=ON -DSQUEEZE_CUDA=OFF -DSQUEEZE_SHARED=OFF -DSQUEEZE_INSTALL=OFF >"$log" 2>&1 ||
    ! cmake --build "$build" --parallel "$jobs" "${goals[@]}" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "fuzz: cannot be built" >&2
    exit 1
fi
if [ ${#targets[@]} -eq 0 ]; then
    for file in tests/fuzz/fuzz_*.c; do
        file=${file##*/fuzz_}
        targets+=("${file%.c}")
    done
fi

# ---- Run ------------------------------------------------------------------------------------

# inputs_of TARGET: the folders whose files it begins with.
inputs_of() {
    local folder
    for folder in "tests/fuzz/seeds/$1" "tests/fuzz/found/$1"; do
        [ ! -d "$folder" ] || echo "$folder"
    done
    [ "$1" != resqueeze ] || printf '%s\n' tests/fuzz/seeds/context tests/fuzz/found/context
}

# run_target TARGET NUMBER: until its time is over, again after a finding.
run_target() {
    local name=$1 number=$2 left end log inputs=() options=()
    local program=$build/tests/fuzz/fuzz_$name
    end=$(($(date +%s) + seconds))
    mapfile -t inputs < <(inputs_of "$name")
    # What ends the program need not free what it holds: for libFuzzer each refused data set would be a leak.
    [ "$name" != dataset ] || options+=(-detect_leaks=0)
    [ ! -f "tests/fuzz/$name.dict" ] || options+=("-dict=tests/fuzz/$name.dict")
    for ((part = 0; (left = end - $(date +%s)) > 0 && part < 20; part++)); do
        log=$build/log/$name-$number-$part
        "$program" "${options[@]}" -max_total_time="$left" -timeout=20 -report_slow_units=20 \
            -rss_limit_mb=3000 -max_len=65536 -print_final_stats=1 -artifact_prefix="$build/found/$name-" \
            "$build/corpus/$name" "${inputs[@]}" \
            >"$log" 2>&1 && break
    done
}

mkdir -p "$build"/{corpus,found,log,profile}
rm -f "$build"/log/* "$build"/profile/*
per_target=$((jobs / ${#targets[@]}))
[ "$per_target" -gt 0 ] || per_target=1
for name in "${targets[@]}"; do
    [ -x "$build/tests/fuzz/fuzz_$name" ] || { echo "fuzz: no target $name" >&2; exit 2; }
    mkdir -p "$build/corpus/$name"
done
running=0
for name in "${targets[@]}"; do
    for ((number = 0; number < per_target; number++)); do
        if [ "$running" -ge "$jobs" ]; then
            wait -n || true
            running=$((running - 1))
        fi
        run_target "$name" "$number" &
        running=$((running + 1))
    done
done
wait

# ---- Coverage -----------------------------------------------------------------------------------

others='/(lib|engine|console|programs|research|analysis|tests|include)/'
if [ "$coverage" = 1 ]; then
    for name in "${targets[@]}"; do
        mapfile -t inputs < <(inputs_of "$name")
        LLVM_PROFILE_FILE=$build/profile/$name.raw "$build/tests/fuzz/fuzz_${name}_coverage" "$build/corpus/$name" \
            "${inputs[@]}" >/dev/null 2>"$scratch/replay" || { tail -n 3 "$scratch/replay" >&2; exit 1; }
        "$tools/llvm-profdata" merge -sparse "$build/profile/$name.raw" -o "$build/profile/$name.data"
        "$tools/llvm-cov" export -summary-only -instr-profile="$build/profile/$name.data" \
            "$build/tests/fuzz/fuzz_${name}_coverage" -ignore-filename-regex="$others" >"$build/profile/$name.json"
    done
    objects=("$build/tests/fuzz/fuzz_${targets[0]}_coverage")
    for name in "${targets[@]:1}"; do
        objects+=(-object "$build/tests/fuzz/fuzz_${name}_coverage")
    done
    "$tools/llvm-profdata" merge -sparse "$build"/profile/*.raw -o "$build/profile/all.data"
    "$tools/llvm-cov" export -summary-only -instr-profile="$build/profile/all.data" "${objects[@]}" \
        -ignore-filename-regex="$others" >"$build/profile/all.json"
    "$tools/llvm-cov" show -instr-profile="$build/profile/all.data" "${objects[@]}" \
        -ignore-filename-regex="$others" >"$build/profile/all.txt"
fi

python3 tests/fuzz/report.py "$build" "$seconds" "$jobs" "$clang" "$json" "${targets[@]}"
