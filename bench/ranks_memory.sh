#!/usr/bin/env bash
# A context twice as large as what one rank's memory holds: token times of one process whose memory (its own and the page cache
# of the files that it reads) is limited to all but half of the context, and of two ranks with that much each.
# ranks_memory.sh PROGRAM MODEL CONTEXT (in shards). Needs root and a memory cgroup of version 1. Prints rows of JSON.
set -euo pipefail
program=$1 model=$2 context=$3
root=/sys/fs/cgroup/memory
[ -w "$root/memory.limit_in_bytes" ] || { echo "no memory cgroup of version 1 that can be written" >&2; exit 1; }
mine=$root/squeeze.$$
trap 'rmdir "$mine".[01] 2>/dev/null || true; rm -f "${copy:-}"' EXIT
copy=$(mktemp "$(dirname "$context")/model.XXXXXX") # nobody else has its pages
cat "$model" >"$copy"
shards=("${context%.sqz.gguf}"-*-of-*.sqz.gguf)
context_bytes=$(cat "${shards[@]}" | wc -c)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# forget: files leave the page cache, so that who reads them is charged.
forget() { for file in "$copy" "$context" "${shards[@]}"; do dd of="$file" oflag=nocache conv=notrunc,fdatasync count=0 status=none; done; }
# measure RANKS LIMIT: prints a row.
measure() {
    local ranks=$1 limit=$2 rank peak=0 speed
    for ((rank = 0; rank < ranks; rank++)); do
        mkdir "$mine.$rank"
        [ "$limit" = 0 ] || echo "$limit" >"$mine.$rank/memory.limit_in_bytes"
    done
    forget
    # shellcheck disable=SC2016
    speed=$(mpirun --oversubscribe --bind-to none -n "$ranks" bash -c \
        'echo $$ >"'"$mine"'.$OMPI_COMM_WORLD_RANK/cgroup.procs"; exec "$@"' ranks "$program" ask "$context" -m "$copy" \
        --budget 1 --max-tokens 16 --threads 1 --json "Explain all of it in many words." 2>/dev/null |
        sed -n 's/^ *"tokens_per_second": \([0-9.e+-]*\),*$/\1/p' | head -n 1) || true
    peak=$(cat "$mine".*/memory.max_usage_in_bytes | sort -n | tail -n 1)
    rmdir "$mine".[0-9] 2>/dev/null || true
    if [ "$limit" = 0 ]; then whole=$peak; fi
    awk -v ranks="$ranks" -v limit="$limit" -v peak="$peak" -v speed="$speed" -v bytes="$context_bytes" 'BEGIN {
        printf "{\"ranks\": %d, \"kind\": \"mpi\", \"context_bytes\": %d, \"limit_bytes\": %d, \"peak_bytes\": %d, \"ms\": %s}\n",
            ranks, bytes, limit, peak, (speed > 0 ? sprintf("%.1f", 1000 / speed) : "null") }'
}
measure 1 0
limit=$((whole - context_bytes / 2))
measure 1 "$limit"
measure 2 "$limit"
