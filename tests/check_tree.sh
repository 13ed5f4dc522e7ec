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

for file in {lib,lib/x86,lib/arm,store,engine,server,console,programs,research,analysis}/*.c; do
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

# names_of ROOM...: their headers, joined for a pattern.
names_of() {
    find "$@" -name '*.h' -printf '%f\n' | sed 's/\./\\./' | paste -sd '|'
}
# forbid PATTERN FILE...: none of the files includes what the pattern matches.
forbid() {
    local pattern=$1 found
    shift
    found=$(grep -nHE "^ *# *include *[<\"]([^>\"]*/)?($pattern)" "$@" || true)
    [ -z "$found" ] || complain "not for this room: $found"
}
# room NAME PATTERN: no file of the room includes what the pattern matches.
room() {
    local files
    mapfile -t files < <(find "$1" -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh')
    forbid "$2" "${files[@]}"
}
llama='llama\.h|ggml|gguf'
room lib "$llama|xxhash|jansson|histedit|$(names_of store engine server console programs research analysis)"
room store "llama\.h|jansson|histedit|$(names_of engine server console programs research analysis)"
room engine "jansson|histedit|microhttpd|$(names_of server console programs research analysis)"
room server "$llama|histedit|$(names_of console programs research analysis)"
room console "$llama|histedit|$(names_of server programs research analysis)"
room programs "$llama|$(names_of research analysis)"
room research "gguf|histedit|$(names_of server programs analysis)" # llama.cpp's own run and its operator are measured here
room analysis "$llama|histedit|$(names_of server programs research)"
# Threads are OpenMP's; that one of them lets others run while it waits is all that lib/ asks of the system.
system='(sys/.*|unistd|fcntl|time|pthread|sched|signal|errno|dirent|dlfcn|poll)\.h'
mapfile -t files < <(find lib -name '*.[ch]' ! -path lib/threads.h)
forbid "$system" "${files[@]}"
# The part of analysis/ that is in the library.
forbid "jansson|$(names_of server console analysis)" analysis/roofline*.c analysis/model_shape.c

# Headers stand in an order, too: none includes, through others, itself. tests/check_circles.sh has what files call.
headers=$(find lib store engine server console programs research analysis include -name '*.h' -o -name '*.cuh')
twice=$(xargs basename -a <<<"$headers" | sort | uniq -d)
[ -z "$twice" ] || complain "two headers of one name: $twice"
circle=$(xargs grep -HoE '^ *# *include *"[^"]+"' <<<"$headers" | sed -E 's|^[^:]*/([^/:]+):.*"(.*/)?([^"/]+)"$|\1 \3|' |
    tsort 2>&1 >/dev/null || true)
[ -z "$circle" ] || complain "headers that include each other: $circle"

# llama.cpp's log is the process's: only the call that a program makes for it takes it.
takes=$(grep -rnE '(llama|ggml)_log_set' lib store engine server console programs research analysis | grep -v '^engine/llama_library.c:' || true)
[ -z "$takes" ] || complain "who may take llama.cpp's log? $takes"

if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh tests/*.sh bench/*.sh bench/gpu/*.sh share/completion/*.bash .ci/run || failed=1
    # These share variables with the file that each sources first, and use `check && check || fail`.
    shellcheck --exclude=SC2015,SC2034,SC2154,SC2217 tests/cli/*.bash tests/cli/*.sh || failed=1
else
    complain "shellcheck is not installed: scripts/setup.sh --check installs it"
fi
exit "$failed"
