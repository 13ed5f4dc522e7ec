#!/usr/bin/env bash
# Every test, from a machine with nothing on it: set-up, one build with warnings as errors and with a second copy of
# the unit tests under AddressSanitizer and UndefinedBehaviorSanitizer, then one ctest whose closing line is the last
# thing printed. tests/CMakeLists.txt says what the tests are.
#
#   scripts/check.sh [--models] [BUILD-FOLDER]     --models: also the tests that need the second model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

models=OFF
set_up=(--check)
if [ "${1:-}" = --models ]; then
    models=ON
    set_up+=(--models)
    shift
fi
build=${1:-build/check}

scripts/setup.sh "${set_up[@]}"

generator=()
if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then
    generator=(-G Ninja)
fi
# GPU code is compiled wherever nvcc is. On a card its tests run: one kind of machine code is enough, and for older GPUs
# what their driver compiles. Without one that suffices, but for Hopper's own kernels (tests/CMakeLists.txt).
nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
cuda=(-DSQUEEZE_CUDA=OFF)
if [ -x "$nvcc" ]; then
    architectures=80-virtual
    if nvidia-smi -L 2>/dev/null | grep -q .; then
        architectures="80-virtual;90a-real"
    fi
    cuda=(-DSQUEEZE_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$architectures")
fi
cmake "${generator[@]}" -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DSQUEEZE_WERROR=ON -DSQUEEZE_TESTS=ON \
    "${cuda[@]}" -DSQUEEZE_SANITIZE=address,undefined "-DSQUEEZE_CHECK_MODELS=$models"
cmake --build "$build" --parallel "$(nproc)"
# A few run alone: tests/CMakeLists.txt says which. Under AddressSanitizer each may take a GiB.
jobs=$(nproc)
ctest --test-dir "$build" --parallel $((jobs < 4 ? jobs : 4)) --output-on-failure --no-tests=error
