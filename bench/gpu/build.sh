#!/usr/bin/env bash
# Builds lib/cuda/ alone as a shared library for bench/gpu/, without CMake: build.sh OUT.so [arch, default 90a]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1 arch=${2:-90a}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# shellcheck disable=SC2016 # the inner shell expands
printf '%s\n' lib/cuda/*.cu | xargs -P "$(nproc)" -I{} sh -c \
    'nvcc -c -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -DSQZ_SHARED -Ilib/cuda -Ilib -Iinclude \
        -gencode "arch=compute_$1,code=sm_$1" "{}" -o "$2/$(basename "{}").o"' sh "$arch" "$folder"
nvcc -shared -cudart static -o "$out" "$folder"/*.o
