#!/usr/bin/env bash
# A context four times as large as the memory that the process may have: `ask` works, and reads from disk about what it
# retains. Needs a control group of its own; skipped (exit 77) where none can be made.
# shellcheck source=tests/cli/helpers.bash
source "$(dirname "${BASH_SOURCE[0]}")/helpers.bash"

headroom=$((24 << 20))   # for the context, above what a run needs that has next to none
token_bytes=$((24 << 10)) # of keys and values
context=$folder/large.sqz.gguf
question=("Who?" --budget 0.05 --max-tokens 4 -v)

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

# What the program and the model need depends on the CPU: where ggml repacks the weights for it, they are held twice while
# it loads. So it is measured, with a context of 1000 tokens: the largest resident set, in KB.
"$SQUEEZE_LARGE_CONTEXT" "$SQUEEZE_MODEL" 1000 "$context" || exit 1
need=$(python3 - "$program" ask "$context" "${question[@]}" 2>"$err" <<'END'
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
END
) || { fail "a context of 1000 tokens"; finish; }
limit=$(((need << 10) + headroom))
tokens=$((limit * 105 / 25 / token_bytes)) # five percent to spare
rm "$context"
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
bash -c "$limited" _ "$group" "$program" ask "$context" "${question[@]}" >"$out" 2>"$err" || got=$?
[ "$got" -eq 0 ] || fail "exit code: got $got, wanted 0"
read -r read_percent < <(sed -n 's/^read \([0-9.]*\)% of the context.*/\1/p' "$err")
read -r disk_bytes < <(sed -n 's/^read_bytes: //p' "$err")
echo "limit $((limit >> 20)) MiB; read $read_percent% a token; $((disk_bytes >> 20)) MiB from disk, context of $((bytes >> 20)) MiB" >&2
# Some twenty tokens choose 5% each, key by key, and the keys of this context are random: few pages hold two that are
# wanted, and how many stay from token to token is up to the kernel. Dense attention would read the whole context for
# every token, twenty times in all.
if [ -z "$disk_bytes" ] || [ "$disk_bytes" -gt $((bytes * 3 / 2)) ]; then
    fail "read ${disk_bytes:-an unknown number of} bytes from disk, wanted at most one and a half times the context"
fi
finish
