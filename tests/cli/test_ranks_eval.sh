#!/usr/bin/env bash
# needs: model. Measuring contexts in shards, by one process and under mpirun: the same figures to the last digit, what is
# refused, what is kept, and that nothing stays, also when a rank dies.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box" "$folder/keep"
export TMPDIR=$folder/box
file=$folder/eval.jsonl
write_document "$folder/a.txt" 9000
text=$(sed 's/\\/\\\\/g; s/"/\\"/g' "$folder/a.txt" | awk '{ printf "%s\\n", $0 }')
printf '{"document": "%s", "questions": ["Who may copy this licence?"], "answers": ["Everyone may copy it."]}\n' "$text" >"$file"
short='{"document": "Few words.", "questions": ["Who?"], "answers": ["Nobody knows."]}'

# Few rows that are always read, or there is nothing to choose.
fixed=(--sinks 4 --window 8 -q --json)
measure=(eval "$file" --budget 0.4 --reply-tokens 4 "${fixed[@]}")
# What was measured, without what runs differ in.
figures() { sed -e '/"ranks": {/,/}/d' -e '/"\(seconds\|threads\|command\|machine\|cpu\)":/d' "$out"; }
same_figures() { figures | cmp -s - "$1" || fail "figures differ: $(figures | diff "$1" - | head -n 6)"; }
# mpirun has files of its own there.
nothing_stays() {
    local left
    left=$(find "$folder/box" -name 'squeeze-*' -o -name '*.gguf*')
    [ -z "$left" ] || fail "files left: $left"
}

# ---- Refused --------------------------------------------------------------------------------
for methods in squeezed,quest paper oracle int4 streaming; do
    run 2 eval "$file" --shards 2 --methods "$methods"
    err_has "'${methods##*,}' cannot read them; allowed is --methods squeezed"
done
run 2 eval "$file" --shards 2 --methods squeezed,squeezed:2
err_has "1 and 2 levels; allowed is one number"
run 2 eval "$file" --shards 2 --recall
err_has "--recall"
run 2 eval "$file" --shards 2 --methods squeezed --speculate --draft self
err_has "--speculate"
for command in eval compare; do
    run 2 "$command" "$file" --shards 2 --rows int4
    err_has "dense answers are read from the same files"
    run 2 "$command" "$file" --shards 0
done
nothing_stays

# ---- One process ------------------------------------------------------------------------------
run 0 "${measure[@]}" --shards 2
figures >"$folder/two"
json_in shards 2 2
out_has '"method": "squeezed"' '"method": "dense"'
sed -n '/"method": "squeezed"/,$p' "$out" >"$folder/squeezed" && cp "$folder/squeezed" "$out"
json_in kl_mean 1e-9 10
json_in budget_read 0.3 0.5
nothing_stays
# One file is another context: as much is read, and not the same.
run 0 "${measure[@]}" --methods squeezed
sed -n '/"method": "squeezed"/,$p' "$out" >"$folder/squeezed" && cp "$folder/squeezed" "$out"
json_in budget_read 0.3 0.5
# What is too short for its shards is left out with the reason, the rest is measured.
printf '%s\n' "$short" >>"$file"
run 3 "${measure[@]}" --shards 2
out_has "the last would be empty; allowed are at most 1"
sed -i '$d' "$file"
# Kept, with names that say all options: other options are other files, the same are used again.
run 0 "${measure[@]}" --shards 2 --keep "$folder/keep"
same_figures "$folder/two"
cp "$(find "$folder/keep" -name '*-00001-of-00002.sqz.gguf')" "$folder/first"
run 0 eval "$file" --budget 0.4 --reply-tokens 4 --sinks 4 --window 8 --json --shards 2 --keep "$folder/keep"
same_figures "$folder/two"
! grep -E "read: |preparing" "$err" || fail "a kept context was prepared again"
run 0 "${measure[@]}" --shards 2 --keep "$folder/keep" --seed 9
[ "$(find "$folder/keep" -name '*.gguf' | wc -l)" -eq 6 ] || fail "files kept: $(ls "$folder/keep")"
printf '{"input": "%s", "instructions": ["Who may copy?"], "outputs": ["Everyone may."]}\n' "$text" >"$folder/compare.jsonl"
run 0 compare "$folder/compare.jsonl" --budget 0.4 "${fixed[@]}" --shards 2
json_in kl_mean 1e-9 10
json_in shards 2 2
figures >"$folder/compared"
nothing_stays

# ---- Several ----------------------------------------------------------------------------------
. "$(dirname "$0")/ranks.bash"
need_mpirun
# Two documents, so that ranks prepare more than once; the short one in the middle is found out before they begin.
ranks 2 0 "${measure[@]}"
same_figures "$folder/two"
json_in n 2 2
partial=$((9 * 65 * 4))
json_in partial_output_bytes $partial $partial
json_in bytes_a_token_layer 1 $((3 * partial - 1))
nothing_stays
cp "$file" "$folder/one.jsonl"
{
    printf '%s\n' "$short"
    sed 's/Who may copy/What is/' "$folder/one.jsonl"
} >>"$file"
run 3 "${measure[@]}" --shards 2
figures >"$folder/all"
ranks 2 3 "${measure[@]}" --shards 2
same_figures "$folder/all"
nothing_stays
# Kept files are opened by all, whoever wrote them.
cp "$folder/one.jsonl" "$file"
ranks 2 0 "${measure[@]}" --keep "$folder/keep"
same_figures "$folder/two"
rm "$folder/keep/"*
ranks 2 0 "${measure[@]}" --keep "$folder/keep"
same_figures "$folder/two"
equal_files "$folder/first" "$(find "$folder/keep" -name '*-00001-of-00002.sqz.gguf')"
ranks 2 0 compare "$folder/compare.jsonl" --budget 0.4 "${fixed[@]}"
same_figures "$folder/compared"
ranks 2 2 "${measure[@]}" --shards 3
err_has "allowed under mpirun -n 2 are its multiples"
ranks 2 2 eval "$file" --methods quest
err_has "'quest' cannot read them"
ranks 2 2 "${measure[@]}" --gpu-layers 3
err_has "a model on the CPU"
nothing_stays

# ---- Ranks that die ------------------------------------------------------------------------------
# While the document is read, and while questions are asked.
awk 'BEGIN { for (i = 0; i < 200; i++) printf "%s", (i ? ", " : "") "\"Question " i ": who may copy?\"" }' >"$folder/many"
printf '{"document": "%s", "questions": [%s], "answers": [%s]}\n' "$text" "$(cat "$folder/many")" "$(cat "$folder/many")" >"$file"
until_err() {
    local i
    for ((i = 0; i < 1200; i++)); do
        grep -q "$1" "$err" && break
        sleep 0.1
    done
}
reads() { until_err "read: "; }
asks() { until_err "ask: " && sleep 0.5; }
lose_process 2 1 KILL reads eval "$file" --budget 0.4
err_has "rank 1" "signal 9"
nothing_stays
lose_process 2 1 KILL asks eval "$file" --budget 0.4
err_has "rank 1" "signal 9"
nothing_stays
lose_process 2 1 STOP asks eval "$file" --budget 0.4
err_has "rank 1 of 2 was not heard of"
nothing_stays
lose_process 2 1 TERM asks eval "$file" --budget 0.4
err_has "rank 1: interrupted"
finish
