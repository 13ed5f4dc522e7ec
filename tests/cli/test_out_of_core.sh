#!/usr/bin/env bash
# A context four times as large as the memory that the process may have: `ask` works, and reads from disk about what it
# retains. Needs a control group of its own; skipped (exit 77) where none can be made.
# shellcheck source=tests/cli/helpers.bash
source "$(dirname "${BASH_SOURCE[0]}")/helpers.bash"

limit=$((176 << 20)) # 40 MiB of buffers, 97 MiB of model that every token reads, and little else
tokens=31500         # 24 KB of keys and values each: 756 MB
context=$folder/large.sqz.gguf

# Where a group can be made: version 2, or version 1's memory hierarchy.
group=
file=
for root in /sys/fs/cgroup /sys/fs/cgroup/memory; do
    for name in memory.max memory.limit_in_bytes; do
        if mkdir "$root/squeeze-test-$$" 2>/dev/null; then
            if [ -w "$root/squeeze-test-$$/$name" ]; then
                group=$root/squeeze-test-$$ file=$group/$name
                break 2
            fi
            rmdir "$root/squeeze-test-$$"
        fi
    done
done
if [ -z "$group" ]; then
    echo "skipped: no control group with a memory limit can be made here" >&2
    exit 77
fi
trap 'rmdir "$group"; rm -rf "$folder"' EXIT
echo "$limit" >"$file" || exit 77

"$SQUEEZE_LARGE_CONTEXT" "$SQUEEZE_MODEL" "$tokens" "$context" || exit 1
bytes=$(stat -c %s "$context")
[ "$bytes" -ge $((4 * limit)) ] || fail "the context has $bytes bytes, wanted at least four times $limit"
sync "$context"
dd if="$context" iflag=nocache count=0 2>/dev/null # its pages belong to whoever wrote them: out with them

# A shell of its own joins the group, so that what it and its child read is counted apart.
# shellcheck disable=SC2016 # expanded by the inner shell
limited='
    echo $$ >"$1/cgroup.procs" || exit 9
    shift
    "$@"
    status=$?
    grep read_bytes /proc/$$/io >&2 || :
    exit "$status"'
label="squeeze ask in $limit bytes of memory"
got=0
bash -c "$limited" _ "$group" "$program" ask "$context" "Who?" --budget 0.05 --max-tokens 4 -v >"$out" 2>"$err" || got=$?
[ "$got" -eq 0 ] || fail "exit code: got $got, wanted 0"
read -r read_percent < <(sed -n 's/^read \([0-9.]*\)% of the context.*/\1/p' "$err")
read -r disk_bytes < <(sed -n 's/^read_bytes: //p' "$err")
echo "read $read_percent% a token; $((disk_bytes >> 20)) MiB from disk, context of $((bytes >> 20)) MiB" >&2
# Some twenty tokens choose 5% each, key by key, and the keys of this context are random: few pages hold two that are
# wanted. Dense attention would read the whole context for every token.
if [ -z "$disk_bytes" ] || [ "$disk_bytes" -gt $((bytes * 3 / 4)) ]; then
    fail "read ${disk_bytes:-an unknown number of} bytes from disk, wanted at most three quarters of the context"
fi
finish
