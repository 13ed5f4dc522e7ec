#!/usr/bin/env bash
# The engine on an NVIDIA card: is it right, and how fast is it beside llama.cpp alone on the same card? For a machine
# with a card, python3 with numpy, and no need of a network.
#
#   bench/gpu/engine.sh OUTPUT-FOLDER
#
# What is run is taken from SQUEEZE_BIN, a folder with the programs squeeze and test_gpu (and test_cuda, when it is to
# run) and beside them libsqueeze_cuda.so.<version> and libggml-cuda.so; default: build/ of this tree.
#   SQUEEZE_MODEL    a model of text, for what is right; without it that part is left out
#   ENGINE_DEPTHS    lengths of contexts, "32768 131072"
#   ENGINE_BUDGETS   "0.1"
#   ENGINE_USERS     users at once on whole clusters of each context, "8,32"; empty: none
#   ENGINE_SELECT    how keys are chosen, "codes centroids": single keys by their codes, or whole clusters
#   ENGINE_FOLDER    where the model of random weights and the contexts go, 23 GiB; default: a folder of its own under
#                    TMPDIR that is removed in the end. What is there already is used.
# OUTPUT-FOLDER receives gpu-engine-<card>.json, one object with `rows`, and what every run printed.
set -euo pipefail

source_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ $# -eq 1 ] || { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2; }
mkdir -p "$1"
output=$(cd "$1" && pwd)
bin=$(cd "${SQUEEZE_BIN:-$source_folder/build}" && pwd)
depths=${ENGINE_DEPTHS:-32768 131072}
budgets=${ENGINE_BUDGETS:-0.1}
select=${ENGINE_SELECT:-codes centroids}
users=${ENGINE_USERS-8,32}
if [ -n "${ENGINE_FOLDER:-}" ]; then
    folder=$ENGINE_FOLDER
    mkdir -p "$folder"
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
export SQUEEZE_GPU_PATH=$bin
squeeze=$bin/squeeze

say() {
    printf 'engine: %s\n' "$*"
}

usable=$("$squeeze" gpu --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["usable"])')
[ "$usable" = True ] || { "$squeeze" gpu && exit 1; }
"$squeeze" gpu --json >"$output/gpu.json"

failed=0
say "is it right?"
if [ -x "$bin/test_cuda" ] && ! "$bin/test_cuda" >"$output/test_cuda.txt" 2>&1; then
    failed=1
    tail -n 20 "$output/test_cuda.txt"
fi
if [ -n "${SQUEEZE_MODEL:-}" ] && [ -x "$bin/test_gpu" ]; then
    mkdir -p "$folder/test"
    SQUEEZE_SOURCE=$source_folder SQUEEZE_TEST_FOLDER=$folder/test "$bin/test_gpu" >"$output/test_gpu.txt" 2>&1 || failed=1
    cat "$output/test_gpu.txt"
fi

model=$folder/random-8b.gguf
[ -f "$model" ] || python3 "$source_folder/bench/gpu/random_model.py" "$model"
# Every letter is a token of that model.
[ -f "$folder/text.txt" ] || python3 -c 'import random
random.seed(1)
print("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=300000)), end="")' >"$folder/text.txt"

# llama.cpp reads each context in batches of one of these sizes, in turn: which is its best differs.
llama_batches=(2048 512)
n_measured=0

# measure_users DEPTH CONTEXT: on one context; on the shortest also 8 with a copy each.
measure_users() {
    say "$users users on one context of $1 tokens"
    "$squeeze" bench users -q --json --repeats 1 --tokens 32 --users "$users" -m "$model" -c "$2" \
        >"$output/users-$1-shared.json"
    [ "$1" = "${depths%% *}" ] || return 0
    say "8 users on 8 contexts of $1 tokens"
    "$squeeze" bench users -q --json --repeats 1 --tokens 32 --users 8 --apart -m "$model" -c "$2" \
        >"$output/users-$1-apart.json"
}

# measure DEPTH CODES|CENTROIDS
measure() {
    local context=$folder/$1-$2.sqz.gguf options=() budget
    local llama_batch=${llama_batches[n_measured % 2]}
    n_measured=$((n_measured + 1))
    [ "$2" = codes ] || options=(--code-words 0)
    if [ ! -f "$context" ]; then
        say "preparing $1 tokens ($2)"
        "$squeeze" prepare -q --json -m "$model" "${options[@]}" --truncate "$1" "$folder/text.txt" -o "$context" \
            >"$output/prepare-$1-$2.json" 2>"$output/prepare-$1-$2.txt"
    fi
    say "opening $1 tokens ($2)"
    for _ in 1 2; do # the second finds the pages in memory
        "$squeeze" ask --json -m "$model" "$context" abc --max-tokens 1 >"$output/open-$1-$2.json"
    done
    for budget in $budgets; do
        say "generating after $1 tokens at a budget of $budget ($2)"
        "$squeeze" bench generate -q --json --no-prepare --repeats 3 -m "$model" -c "$context" --budget "$budget" \
            --long-question 512 --llama-batch "$llama_batch" >"$output/generate-$1-$2-$budget.json"
    done
    [ "$2" = codes ] || [ -z "$users" ] || measure_users "$1" "$context"
    [ -n "${ENGINE_FOLDER:-}" ] || rm -f "$context"
}

for depth in $depths; do
    for way in $select; do
        measure "$depth" "$way"
    done
done

python3 "$source_folder/bench/gpu/engine_rows.py" "$output"
exit "$failed"
