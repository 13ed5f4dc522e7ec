#!/usr/bin/env bash
# No source file calls, through others, one that calls it: files stand in an order, each on those below it.
#
#   check_circles.sh OBJECT-OR-ARCHIVE...
set -euo pipefail

# "user used", a line a name: what one object leaves undefined and another defines.
edges=$(nm -A "$@" | awk '
    { n = split($0, part, ":"); object = part[n - 1]; sub(/.*\//, "", object); fields = split(part[n], field, " ") }
    fields == 3 && field[2] ~ /[A-TV-Z]/ { home[field[3]] = object }
    fields == 2 && field[1] == "U" { used[object, field[2]] }
    END {
        for (pair in used) {
            split(pair, of, SUBSEP)
            if (of[2] in home && home[of[2]] != of[1]) print of[1], home[of[2]], of[2]
        }
    }')
[ -n "$edges" ] || { echo "no file uses another: nm's output is not what was expected" >&2; exit 1; }

if ! loops=$(awk '{ print $1, $2 }' <<<"$edges" | tsort 2>&1 >/dev/null); then
    files=$(sed -n 's/^tsort: \(.*\.o\)$/\1/p' <<<"$loops" | sort -u)
    echo "files that call each other in a circle, and the names they use of each other:" >&2
    awk 'NR == FNR { circle[$1]; next } $1 in circle && $2 in circle { print "  " $1 " -> " $2 ": " $3 }' \
        <(printf '%s\n' "$files") <(sort <<<"$edges") >&2
    exit 1
fi
echo "$(awk '{ print $1, $2 }' <<<"$edges" | sort -u | wc -l) edges between files, no circle"
