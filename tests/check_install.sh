#!/usr/bin/env bash
# Installs the build into a staging folder, moves that folder (an installation must be relocatable), and builds and
# runs the outside program against it by pkg-config and by find_package(), with the shared and the static library.
#
#   check_install.sh BUILD-FOLDER     works in $SQUEEZE_TEST_FOLDER, compiles with $CC
set -euo pipefail

build=$1
folder=$SQUEEZE_TEST_FOLDER
source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/outside
cc=${CC:-cc}

rm -rf "${folder:?}"/*
cmake --install "$build" --prefix "$folder/first" >"$folder/install.log"
mv "$folder/first" "$folder/stage"
stage=$folder/stage

pc=$(find "$stage" -name squeeze.pc)
[ -n "$pc" ] || { echo "no squeeze.pc was installed" >&2; exit 1; }
libdir=$(dirname "$(dirname "$pc")")
if grep -rlF -e "$build" -e "$folder" "$libdir/cmake" "$libdir/pkgconfig"; then
    echo "the files above name the folder they were built in or first installed to" >&2
    exit 1
fi

# run NAME PROGRAM
run() {
    local said
    said=$(cd "$folder" && LD_LIBRARY_PATH=$libdir "$2") || { echo "$1: failed" >&2; exit 1; }
    [ "$said" = ok ] || { echo "$1: printed '$said', wanted 'ok'" >&2; exit 1; }
    echo "$1: ok"
}

# is_linked PROGRAM yes|no: whether it needs the shared library at run time
is_linked() {
    local found=no
    if readelf -d "$1" | grep -q 'NEEDED.*libsqueeze\.so'; then
        found=yes
    fi
    [ "$found" = "$2" ] || { echo "$1 needs libsqueeze.so: $found, wanted $2" >&2; exit 1; }
}

export PKG_CONFIG_PATH=$libdir/pkgconfig
# Folders may have blanks in their names, before which it puts a backslash.
words() { xargs -n 1 printf '%s\n'; }
mapfile -t flags < <(pkg-config --cflags squeeze | words)
mapfile -t libs < <(pkg-config --libs squeeze | words)
"$cc" -std=c11 -Wall -Wextra -Werror "${flags[@]}" "$source/main.c" -o "$folder/pc_shared" "${libs[@]}" -lm
is_linked "$folder/pc_shared" yes
run "pkg-config, shared" "$folder/pc_shared"

# The example that the README shows; without arguments it says what it takes.
"$cc" -std=c11 -Wall -Wextra -Werror "${flags[@]}" "$source/../../examples/ask.c" -o "$folder/ask" "${libs[@]}"
status=0
LD_LIBRARY_PATH=$libdir "$folder/ask" 2>"$folder/ask.log" || status=$?
if [ "$status" != 2 ] || ! grep -q '^usage: ask ' "$folder/ask.log"; then
    echo "examples/ask.c: exit status $status, wanted 2 and a line on its usage" >&2
    exit 1
fi

# Both libraries lie in one folder and the linker prefers the shared one, so the static one is asked for by its name.
mapfile -t libs < <(pkg-config --static --libs squeeze | sed 's/-lsqueeze\>/-l:libsqueeze.a/' | words)
"$cc" -std=c11 -Wall -Wextra -Werror "${flags[@]}" "$source/main.c" -o "$folder/pc_static" "${libs[@]}" -lm
is_linked "$folder/pc_static" no
run "pkg-config, static" "$folder/pc_static"

if ! { cmake -S "$source" -B "$folder/cmake" "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_PREFIX_PATH=$stage" &&
    cmake --build "$folder/cmake"; } >"$folder/cmake.log" 2>&1; then
    tail -n 20 "$folder/cmake.log" >&2
    exit 1
fi
is_linked "$folder/cmake/outside_shared" yes
is_linked "$folder/cmake/outside_static" no
run "find_package, shared" "$folder/cmake/outside_shared"
run "find_package, static" "$folder/cmake/outside_static"

version=$("$stage/bin/squeeze" --version)
case $version in
*"$(pkg-config --modversion squeeze)"*) echo "installed program: $version" ;;
*) echo "the installed program says '$version', squeeze.pc $(pkg-config --modversion squeeze)" >&2; exit 1 ;;
esac
