#!/usr/bin/env bash
# Fails on any name that a library of ours shows to the world without the prefix sqz_, and on a name of the public
# headers that the shared library does not offer, or the other way round.
#
#   check_symbols.sh STATIC SHARED HEADER...
set -euo pipefail

static=$1
shared=$2
headers=("${@:3}")
failed=0

# The compiler names OpenMP's critical sections for the whole process; ours carry the prefix inside.
bad=$(nm -g --defined-only "$static" | awk 'NF == 3 && $3 !~ /^(\.gomp_critical_user_)?sqz_/ { print $3 }')
if [ -n "$bad" ]; then
    printf '%s defines names without the prefix sqz_:\n%s\n' "$static" "$bad" >&2
    failed=1
fi

offered=$(nm -D --defined-only "$shared" | awk 'NF == 3 { print $3 }' | LC_ALL=C sort)
bad=$(grep -v '^sqz_' <<<"$offered" || true)
if [ -n "$bad" ]; then
    printf '%s shows names without the prefix sqz_:\n%s\n' "$shared" "$bad" >&2
    failed=1
fi

# Declarations begin at the first column with SQZ_API; the name is the first word followed by a parenthesis.
declared=$(sed -n 's/^SQZ_API [^(]*\<\(sqz_[a-z0-9_]*\)(.*/\1/p' "${headers[@]}" | LC_ALL=C sort)
if [ "$offered" != "$declared" ]; then
    echo "the headers and the shared library differ (< declared, > offered):" >&2
    diff <(printf '%s\n' "$declared") <(printf '%s\n' "$offered") | grep '^[<>]' >&2
    failed=1
fi
[ "$failed" -eq 0 ] && echo "$(wc -l <<<"$declared") names declared and offered, no other"
exit "$failed"
