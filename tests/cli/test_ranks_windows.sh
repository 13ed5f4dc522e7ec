#!/usr/bin/env bash
# needs: model. Models of which some layers have a window, in shards: files of one process and of several, answers of one
# file, of shards in one process and of ranks, what is refused, and that no message goes at layers with a window.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
. "$(dirname "$0")/ranks.bash"
need_model
# Three of the four layers have a window of 72 tokens. Of random numbers: what a layer reads counts in what comes out.
"${SQUEEZE_SOURCE:?}/tests/make_model.py" "$SQUEEZE_MODEL" "$folder/windows.gguf" --layers 4 --f16 --architecture cohere2 \
    --without ffn_norm cohere2.attention.sliding_window=u32:72 cohere2.attention.layer_norm_epsilon=f32:1e-5 \
    cohere2.logit_scale=f32:0.5 || exit 1
export SQUEEZE_MODEL=$folder/windows.gguf
mkdir "$folder/alone" "$folder/box"
write_document "$folder/book.txt" 8000
fixed=(-q --sinks 4 --window 8)
index=$folder/alone/b.sqz.gguf

run 0 prepare "$folder/book.txt" "${fixed[@]}" --shards 2 -o "$index"
run 0 prepare "$folder/book.txt" "${fixed[@]}" -o "$folder/one.sqz.gguf"
run 0 inspect "$index"
out_has "in 2 shards" "3 keep only a sliding window"
# The first shard has the windows, the second not a row of them.
grep -qa "blk.0.key" "$folder/alone/b-00001-of-00002.sqz.gguf" || fail "shard 1 has no window"
! grep -qa "blk.0.key" "$folder/alone/b-00002-of-00002.sqz.gguf" || fail "shard 2 has a window"

# logits FILE OPTIONS...: of some tokens behind the document.
logits() { run 0 bench logits -c "$1" --tokens 24 "${@:2}" "$folder/book.txt" --json; }
logits "$folder/one.sqz.gguf" --budget 1 --save "$folder/one.logits"
logits "$index" --budget 1 --save "$folder/all.logits"
logits "$index" --budget 0.4 --save "$folder/some.logits"
# Sums are in another order; one row more or less in a window makes a divergence of 0.0001.
logits "$index" --budget 1 --against "$folder/one.logits"
json_in kl_mean 0 2e-5
logits "$index" --budget 0.4 --against "$folder/one.logits"
json_in kl_mean 3e-5 10
json_in budget_read 0.3 0.5

# The window's end and its length are what is checked: a shard that says otherwise is refused.
cp "$folder/alone/b-00001-of-00002.sqz.gguf" "$folder/kept"
run 0 prepare "$folder/book.txt" "${fixed[@]}" --shards 2 --truncate=1500 -o "$folder/box/b.sqz.gguf"
cp "$folder/box/b-00001-of-00002.sqz.gguf" "$folder/alone/b-00001-of-00002.sqz.gguf"
run 1 ask "$index" x
err_has "b-00001-of-00002.sqz.gguf is a shard of another context"
cp "$folder/kept" "$folder/alone/b-00001-of-00002.sqz.gguf"
rm "$folder/box/"*

# ---- Several processes ---------------------------------------------------------------------
need_mpirun
ranks 2 0 prepare "$folder/book.txt" "${fixed[@]}" --shards 2 --json -o "$folder/box/b.sqz.gguf"
for file in "$folder/alone/"*; do equal_files "$file" "$folder/box/${file##*/}"; done
# One layer of four sends queries and outputs, 9 heads of 64; of three a block's rows go to the other rank: 3 heads.
json_in bytes_a_token_layer $((3 * 3 * 64 * 4 / 2 / 4)) $(((9 * (65 + 64) * 4 + 3 * 3 * 64 * 4) * 13 / 10 / 2 / 4))
for budget in 1 0.4; do
    [ "$budget" = 1 ] && saved=all || saved=some
    ranks 2 0 bench logits -c "$index" --tokens 24 --budget "$budget" --against "$folder/$saved.logits" \
        "$folder/book.txt" --json
    json_in kl_mean 0 0
    json_in top1_equal 1 1
    # Of the layer that has messages: queries or an output, and denominators.
    json_in bytes_a_token_layer $((9 * 65 * 4)) $((9 * 65 * 4 + 36 + 72 + 64))
done
question="What may be copied?"
run 0 ask "$index" --budget 0.4 --max-tokens 12 --json "$question"
json answer >"$folder/alone.answer"
ranks 2 0 ask "$index" --budget 0.4 --max-tokens 12 --json "$question"
json answer | cmp -s - "$folder/alone.answer" || fail "answers differ"
# More tokens than a window, from several users at once.
ranks 2 0 bench users -c "$index" --users 3 --budget 0.4 --tokens 80 --question-tokens 12 --repeats 1 -q --json
json_in answers_equal "$(($(json answers_compared) - 1))" "$(json answers_compared)"
finish
