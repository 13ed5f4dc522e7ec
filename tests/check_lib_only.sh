#!/usr/bin/env bash
# SQUEEZE_ENGINE=OFF: the library configures without llama.cpp or a C++ compiler, and holds lib/ and the roofline alone.
#
#   check_lib_only.sh SOURCE-FOLDER      works in $SQUEEZE_TEST_FOLDER
set -euo pipefail

folder=$SQUEEZE_TEST_FOLDER/build
rm -rf "$folder"
if ! { CXX=/nonexistent cmake -S "$1" -B "$folder" -DSQUEEZE_ENGINE=OFF -DSQUEEZE_TESTS=OFF -DSQUEEZE_CUDA=OFF -DSQUEEZE_WERROR=ON \
    -DCMAKE_BUILD_TYPE=Debug && cmake --build "$folder" --parallel 2; } >"$SQUEEZE_TEST_FOLDER/log" 2>&1; then
    tail -n 20 "$SQUEEZE_TEST_FOLDER/log" >&2
    exit 1
fi

names=$(nm -D --defined-only "$folder/libsqueeze.so" | awk '{ print $3 }')
grep -qx sqz_layer_attend <<<"$names" || { echo "sqz_layer_attend is missing" >&2; exit 1; }
if grep -E '^sqz_(llama|model|context|session|prepare)_' <<<"$names"; then
    echo "the names above belong to store/ or engine/, which are off" >&2
    exit 1
fi
echo "without the engine: $(wc -l <<<"$names") names"
