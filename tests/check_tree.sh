#!/usr/bin/env bash
# The source tree itself: every source and test is named in a CMake list, no room includes a header of a higher one,
# every shell script is clean under shellcheck.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob
failed=0

complain() {
    printf '%s\n' "$*" >&2
    failed=1
}

for file in {lib,lib/x86,lib/arm,store,engine,programs}/*.c; do
    grep -qE "^ *$file\)?\$" CMakeLists.txt || complain "$file is not in CMakeLists.txt"
done
for file in lib/cuda/*.cu; do
    grep -qE "^ *$file\)?\$" CMakeLists.txt || complain "$file is not in CMakeLists.txt"
done
for file in tests/test_*.c tests/cli/*.sh; do
    name=$(basename "$file")
    name=${name#test_}
    name=${name%.*}
    grep -qE "^ *$name\)?( *#.*)?\$" tests/CMakeLists.txt || complain "$file is not in tests/CMakeLists.txt"
done

# forbid ROOM PATTERN: no file of the room includes what the pattern matches.
forbid() {
    local found
    found=$(find "$1" -name '*.[ch]' -exec grep -nHE "^ *# *include *[<\"]($2)" {} + || true)
    [ -z "$found" ] || complain "$1/ may not include these: $found"
}
# names_of ROOM...: their headers, joined for a pattern.
names_of() {
    find "$@" -name '*.h' -printf '%f\n' | sed 's/\./\\./' | paste -sd '|'
}
forbid lib "llama|ggml|gguf|xxhash|jansson|histedit|$(names_of store engine programs)"
forbid store "llama|jansson|histedit|$(names_of engine programs)"
forbid engine "jansson|histedit|$(names_of programs)"
forbid programs "llama|ggml|gguf"

if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh tests/*.sh bench/*.sh bench/gpu/*.sh .ci/run || failed=1
    # These share variables with the file that each sources first, and use `check && check || fail`.
    shellcheck --exclude=SC2015,SC2034,SC2154,SC2217 tests/cli/*.bash tests/cli/*.sh || failed=1
else
    complain "shellcheck is not installed: scripts/setup.sh --check installs it"
fi
exit "$failed"
