#!/usr/bin/env bash
# needs: model. Budgets that would leave nothing for chosen keys: raised, and said, by every subcommand; short contexts
# are read whole.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"
export TMPDIR=$folder/box
short=$folder/short.sqz.gguf
long=$folder/long.sqz.gguf

# A fact in the middle of a text that says nothing else: neither the first nor the last words hold it.
{
    printf 'The wind blows from the west and boats come and go with the tide. %.0s' $(seq 12)
    printf 'The harbour master of the town is Olena Brandt. '
    printf 'The wind blows from the west and boats come and go with the tide. %.0s' $(seq 12)
} >"$folder/short.txt"
write_document "$folder/long.txt" 6000
question="What is the name of the harbour master?"

# ---- Short: everything is read, at the default budget as at a budget of 1
run 0 prepare "$folder/short.txt" --json
json_in n_context_tokens 200 700
json_in budget_floor 1 1
run 0 inspect "$short"
out_has "floor      1: every question reads everything" "not clustered"
run 0 ask "$short" "$question" --max-tokens 12 --budget 1
! grep -q budget "$err" || fail "a budget of 1 wants no word"
cp "$out" "$folder/dense"
run 0 ask "$short" "$question" --max-tokens 12
equal_files "$out" "$folder/dense"
[ "$(grep -c budget "$err")" -eq 1 ] || fail "wanted one line about the budget"
err_has "a budget of 0.1 leaves nothing for chosen keys in this context: all of it is read"
run 0 ask "$short" "$question" --max-tokens 4 --json --budget 0.02
json_in budget_asked 0.02 0.02
json_in budget_floor 1 1
json_in budget_read 1 1

# Clustering it anew with other options still works, under the published rule too, which has no floor but what it reads.
run 0 prepare -q --from "$short" --levels 2 -o "$folder/again.sqz.gguf"
run 0 prepare -q --from "$folder/again.sqz.gguf" --rule paper -o "$folder/paper.sqz.gguf"
run 0 inspect "$folder/paper.sqz.gguf" --json
json_in levels 1 1
json_in budget_floor 0.1 0.9
floor=$(json budget_floor)
run 0 ask "$folder/paper.sqz.gguf" "$question" --max-tokens 4 --json --budget 0.02
json_in budget_floor "$floor" "$floor"
json_in budget_read 0.1 0.99
err_has "a budget of 0.02 is less than the published rule reads of this context at least"

# ---- Longer: raised to a floor below 1, which prepare, inspect, ask and chat agree on
run 0 prepare "$folder/long.txt"
out_has "least budget: 0."
run 0 inspect "$long" --json
json_in budget_floor 0.1 0.334
floor=$(json budget_floor)
json_in share "$(awk "BEGIN { print $floor * 0.99 }")" "$(awk "BEGIN { print $floor * 1.01 }")"
run 0 inspect "$long"
out_has "floor      0." "smaller budgets are raised to it"
for budget in 0.001 0.02; do
    run 0 ask "$long" "Who may copy this document?" --max-tokens 8 --json --budget $budget
    err_has "a budget of $budget leaves too little for chosen keys in this context: 0."
    json_in budget_asked $budget $budget
    json_in budget_floor "$floor" "$floor"
    json_in budget_read "$(awk "BEGIN { print $floor * 0.6 }")" "$(awk "BEGIN { print $floor * 1.5 }")"
done
run 0 ask "$long" "Who may copy this document?" --max-tokens 4 -v --budget 0.5
err_has "asked for 50.0%, floor "
printf '/budget 0.02\n/budget 0.6\n/stats\n' >"$folder/lines"
input=$folder/lines run 0 chat "$long"
err_lines 2 # the default budget and 0.02
err_has "a budget of 0.02 leaves too little"
out_has "budget 0.6, floor 0."

# ---- Documents of a few tokens in compare and eval: read whole, not the end of a run
{
    printf '{"input": "The tower is 31 metres tall.", "instructions": ["How tall is it?"], "outputs": ["31 metres"]}\n'
    printf '{"input": "a", "instructions": ["What?"], "outputs": ["a"]}\n'
    printf '{"input": "%s", "instructions": ["Who is the harbour master?"], "outputs": ["Olena Brandt"]}\n' \
        "$(cat "$folder/short.txt")"
} >"$folder/few.jsonl"
for i in 1 2; do # the second time from what was kept
    run 0 compare "$folder/few.jsonl" --keep "$folder/kept" --rule paper --json
    json_in documents 3 3
    json_in documents_skipped 0 0
done
run 0 compare "$folder/few.jsonl" --keep "$folder/kept" --json
json_in budget_read 1 1
json_in kl_mean 0 1e-9
run 0 eval "$folder/few.jsonl" --methods squeezed,paper,window --budget 0.05 --same-bytes --no-scores \
    --lengths 20,60,300 --json
cp "$out" "$folder/all"
for tokens in 20 60 300; do
    awk -v tokens="$tokens" '/^    \{/ { text = "" } { text = text $0 "\n" }
        /^    \}/ && text ~ /"method": "squeezed"/ && text ~ "\"tokens\": " tokens "\n" { printf "%s", text; exit }' \
        "$folder/all" >"$out"
    json_in budget_read 1 1
    json_in kl_mean 0 1e-9
done
run 2 eval "$folder/few.jsonl" --methods window,squeezed --same-bytes
err_has "must name squeezed first"
box_holds ""
finish
