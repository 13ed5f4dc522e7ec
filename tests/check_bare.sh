#!/usr/bin/env bash
# lib/ must compile with one plain compiler line and no build system, with OpenMP and without.
#
#   check_bare.sh      works in $SQUEEZE_TEST_FOLDER, compiles with $CC
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob

cc=${CC:-cc}
folder=$SQUEEZE_TEST_FOLDER
cat >"$folder/main.c" <<'END'
#include "squeeze.h"
#include <stdio.h>

int main(void)
{
    struct sqz_variant_info variant;
    if (!sqz_variant_get(0, &variant)) {
        return 1;
    }
    printf("%s %s\n", sqz_version(), variant.name);
    return 0;
}
END
"$cc" -O2 -fopenmp -Iinclude -Ilib lib/*.c lib/*/*.c "$folder/main.c" -lm -o "$folder/with_openmp"
"$folder/with_openmp"
"$cc" -O0 -Iinclude -Ilib lib/*.c lib/*/*.c "$folder/main.c" -lm -o "$folder/without_openmp"
"$folder/without_openmp"
