#!/usr/bin/env bash
# lib/ for 64-bit ARM, on any machine: it and the tests of what uses the kernels cross-compiled with warnings as errors, and
# these run in an emulator, so that the NEON variant is tested wherever this runs.
#
#   check_arm.sh SOURCE-FOLDER      works in $SQUEEZE_TEST_FOLDER
#
# scripts/setup.sh --check installs what that needs where it can be had. Where it is missing the exit status is 77
# (skipped), or 1 if SQUEEZE_REQUIRE_ARM is 1.
set -euo pipefail

tests=(attention cluster codes kernels lookup) # of what uses the kernels
source=$1
work=$SQUEEZE_TEST_FOLDER
build=$work/build

skip() {
    if [ "${SQUEEZE_REQUIRE_ARM:-0}" = 1 ]; then
        echo "$*, and SQUEEZE_REQUIRE_ARM is 1" >&2
        exit 1
    fi
    echo "skipped: $*; scripts/setup.sh --check installs it where it can be had"
    exit 77
}

# What the compiler at hand is told does not concern the cross compiler.
unset CFLAGS CPPFLAGS LDFLAGS

command -v aarch64-linux-gnu-gcc >/dev/null || skip "no aarch64-linux-gnu-gcc"
emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
[ -n "$emulator" ] || skip "no qemu-aarch64"
cmocka=$("$source/scripts/setup.sh" --where arm64)
[ -f "$cmocka/usr/include/cmocka.h" ] || skip "no cmocka for 64-bit ARM in $cmocka"
printf '#include <stdio.h>\nint main(void) { return puts("ok") < 0; }\n' >"$work/probe.c"
if ! aarch64-linux-gnu-gcc -fopenmp "$work/probe.c" -o "$work/probe" 2>"$work/probe.log" ||
    [ "$("$emulator" -L /usr/aarch64-linux-gnu "$work/probe" 2>>"$work/probe.log")" != ok ]; then
    tail -n 3 "$work/probe.log"
    skip "aarch64-linux-gnu-gcc and ${emulator##*/} are there but do not build and run a program"
fi

export PKG_CONFIG_SYSROOT_DIR=$cmocka PKG_CONFIG_LIBDIR=$cmocka/usr/lib/aarch64-linux-gnu/pkgconfig PKG_CONFIG_PATH=
rm -rf "$build"
if ! { cmake -S "$source" -B "$build" "-DCMAKE_TOOLCHAIN_FILE=$source/cmake/aarch64-linux-gnu.cmake" \
    -DCMAKE_BUILD_TYPE=Release -DSQUEEZE_ENGINE=OFF -DSQUEEZE_INSTALL=OFF -DSQUEEZE_TESTS=ON -DSQUEEZE_WERROR=ON &&
    cmake --build "$build" --target "${tests[@]/#/test_}" --parallel "$(nproc)"; } >"$work/log" 2>&1; then
    grep -m 5 -E 'error|Error' "$work/log" >&2 || tail -n 20 "$work/log" >&2
    exit 1
fi

chosen=$("$emulator" -L /usr/aarch64-linux-gnu "$build/tests/test_kernels" --chosen)
[ "$chosen" = neon ] || { echo "the kernels chosen on 64-bit ARM are '$chosen', wanted 'neon'" >&2; exit 1; }
# Emulated threads of one program hinder each other; so several programs of one thread each.
OMP_NUM_THREADS=1 ctest --test-dir "$build" -R "^unit\.($(IFS='|'; echo "${tests[*]}"))\$" --parallel "$(nproc)" --output-on-failure --no-tests=error
