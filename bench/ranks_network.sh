#!/usr/bin/env bash
# A generated token over two hosts by their line: measured, and predicted by `squeeze analyze ranks` over that line, and from
# the fast line's rates by --latency-us and --bandwidth alone. Hosts are network namespaces with a core each
# (tests/cli/hosts.bash); lines veth, then of so much delay or rate (tests/slow_line.c, or netem).
# ranks_network.sh PROGRAM SLOW_LINE MODEL CONTEXT TOKENS SHARDS: of a context of so many tokens. Needs root. Prints rows of
# JSON. Where others work: chrt -f 10 before it, so that no hop waits for them.
# shellcheck disable=SC1091,SC2034,SC2154 # of what hosts.bash says
set -euo pipefail
program=$1 model=$3 context=$4 tokens=$5 shards=$6
export SQUEEZE_SLOW_LINE=$2
hosts_cores=yes
. "$(dirname "$0")/../tests/cli/hosts.bash"
trap drop_hosts EXIT
make_hosts 2
results=$hosts_folder
context_size=(--shards "$shards" --tokens "$tokens" --ranks 2)

# predict RATES ARGUMENTS...: ms a token at the budgets of 1 and 0.1
predict() {
    local budget
    for budget in 1 0.1; do
        "$program" analyze ranks -m "$model" --rates "$1" "${context_size[@]}" --budget "$budget" --json "${@:2}" |
            sed -n 's/^ *"seconds_a_token": \([0-9.e+-]*\),*$/\1/p' | head -n 1
    done | paste -sd ' '
}
# number FILE KEY [WHICH]
number() { sed -n "s/^ *\"$2\": \([0-9.e+-]*\),*\$/\1/p" "$1" | sed -n "${3:-1}p"; }
# row NAME DELAY_US MBIT TOKENS REPEATS
row() {
    local name=$1 delay=$2 mbit=$3 rates=$results/rates.json run=$results/run.json by_line=nan\ nan
    start_on_hosts 2 analyze ranks --rates here -m "$model" --threads 1 "${context_size[@]}" --repeats 4 -q --json >"$rates"
    start_on_hosts 2 bench generate -c "$context" -m "$model" --no-prepare --no-llama --budget 0.1 --tokens "$4" \
        --repeats "$5" --threads 1 -q --json >"$run"
    if [ ! -e "$results/fast.json" ]; then
        cp "$rates" "$results/fast.json"
    elif [ "$hosts_device" != v0 ] && [ -z "${slow_none:-}" ]; then
        slow_none=1
        cp "$rates" "$results/fast.json"
    else
        local latency bandwidth
        read -r latency bandwidth < <(awk -v s="$(number "$results/fast.json" message_seconds)" -v d="$delay" -v m="$mbit" \
            -v b="$(number "$results/fast.json" message_seconds_a_byte)" \
            'BEGIN { print 1e6 * s + d, (m > 0 ? m / 8000 : 1e-9 / b) }')
        by_line=$(predict "$results/fast.json" --latency-us "$latency" --bandwidth "$bandwidth")
    fi
    python3 - "$name" "$rates" "$run" "$tokens" "$(predict "$rates")" "$by_line" <<'END'
import json, math, sys
name, rates, run, tokens, predicted, by_line = sys.argv[1:]
rates, run = json.load(open(rates))["ranks_machine"], json.load(open(run))
for i, (budget, key) in enumerate(((1, "dense"), (0.1, "squeezed"))):
    ms, one = 1e3 * run[key]["token_seconds"]["median"], 1e3 * float(predicted.split()[i])
    other = 1e3 * float(by_line.split()[i])
    row = {"ranks": 2, "kind": "mpi, tcp", "hosts": 2, "line": name, "context_tokens": int(tokens), "budget": budget,
           "ms": round(ms, 2), "bytes_a_token_layer": run["ranks"]["bytes_a_token_layer"],
           "message_us": round(1e6 * rates["message_seconds"], 1),
           "line_mb_s": round(1e-6 / max(1e-15, rates["message_seconds_a_byte"]), 1),
           "layer_us": round(1e6 * rates["tried_layer_seconds"], 1), "predicted_ms": round(one, 2),
           "error": round(one / ms - 1, 3)}
    if not math.isnan(other):
        row |= {"predicted_by_line_ms": round(other, 2), "error_by_line": round(other / ms - 1, 3)}
    print(json.dumps(row), flush=True)
END
}
row "veth" 0 0 16 3
slow_lines 0 0 0 0 || { echo "$no_slow_lines" >&2; exit 1; }
[ -z "${slow_line_pid:-}" ] || chrt -p "$$" | grep -q SCHED_OTHER || chrt -f -p 20 "$slow_line_pid" # it is the line, nobody waits
row "no delay" 0 0 16 3
for delay in 200 1000 5000; do
    slow_lines "$delay" 0 0 0
    row "$delay us each way" "$delay" 0 "$((delay > 1000 ? 6 : 12))" "$((delay > 1000 ? 1 : 2))"
done
for mbit in 100 20; do
    slow_lines 0 0 0 "$mbit"
    row "$mbit Mbit/s" 0 "$mbit" 12 2
done
