#!/usr/bin/env bash
# needs: model. A context's rows over two cards, which are made of host memory (tests/fake_gpu): against the CPU with the
# same shards, and what the program says of cards and shards that do not fit.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
[ -x "${SQUEEZE_TEST_CARD_ROWS:-}" ] || { echo "skipped: this build cannot use a card"; finish; }
export SQUEEZE_GPU_PATH=$SQUEEZE_FAKE_GPU SQUEEZE_FAKE_CARDS=2
few_layers

# Of a random model, whose attention is spread evenly, the CPU, which steers its budget from layer to layer, and cards, which
# do from token to token, read about the same.
if python3 -c 'import numpy' 2>/dev/null; then
    python3 "$SQUEEZE_SOURCE/bench/gpu/random_model.py" "$folder/random.gguf" --layers 4 --width 256 --inner 512 \
        --heads 4 --heads-kv 2 --vocabulary 4096 --context 8192 >/dev/null || exit 1
    label="test_card_rows"
    SQUEEZE_MODEL=$folder/random.gguf SQUEEZE_TEST_FOLDER=$folder SQUEEZE_TEST_NOISE=0.00005 \
        SQUEEZE_TEST_SOME_NOISE=0.0001 "$SQUEEZE_TEST_CARD_ROWS" >"$out" 2>"$err" || fail "two cards against the CPU"
    grep 'KL\|tokens' "$out"
    label=
else
    echo "without Python's numpy, which makes a random model: two cards are not held against the CPU"
fi

# Three of the four layers have a window, which is the first card's; the one that is shared chooses for all. What a model of one
# such layer reads in 24 tokens says little of its budget, on one card as on two.
"$SQUEEZE_SOURCE/tests/make_model.py" "$whole_model" "$folder/windows.gguf" --layers 4 --f16 --architecture cohere2 \
    --without ffn_norm cohere2.attention.sliding_window=u32:72 cohere2.attention.layer_norm_epsilon=f32:1e-5 \
    cohere2.logit_scale=f32:0.5 || exit 1
label="test_card_rows windows"
SQUEEZE_MODEL=$folder/windows.gguf SQUEEZE_TEST_FOLDER=$folder SQUEEZE_TEST_NOISE=0.00002 SQUEEZE_TEST_SOME_NOISE=0.00002 \
    "$SQUEEZE_TEST_CARD_ROWS" test_budget >"$out" 2>"$err" || fail "two cards against the CPU, with windows"
grep 'KL\|tokens' "$out"
label=

# A text that two cards read, each half of the layers, makes the file that one makes. However many batches it has, nobody
# waits for a card more often: each goes on with the next batch while the other works. A model of LongRoPE, whose batches are
# short enough for a text of several.
"$SQUEEZE_SOURCE/tests/make_model.py" "$whole_model" "$folder/long-rope.gguf" --layers 2 \
    llama.rope.scaling.type=string:longrope llama.rope.scaling.original_context_length=u32:600 \
    llama.rope.scaling.attn_factor=f32:1 --factors rope_factors_short.weight=1 \
    --factors rope_factors_long.weight=2 || exit 1
# read_by CARDS: prepares text.txt, and counts in $waits
read_by() {
    rm -f "$folder/waits"
    SQUEEZE_FAKE_CARDS=$1 SQUEEZE_FAKE_WAITS=$folder/waits run 0 prepare -q "$folder/text.txt" -m "$folder/long-rope.gguf" \
        -o "$folder/by-$1.sqz.gguf" --json
    waits=$(wc -l <"$folder/waits")
}
write_document "$folder/text.txt" 7000
read_by 2
few_batches=$waits
write_document "$folder/text.txt" 12000
read_by 2
[ "$(json n_context_tokens)" -gt $((5 * 512)) ] || fail "a text of $(json n_context_tokens) tokens: too short"
grep -q "card 1" "$folder/waits" || fail "one card has all layers"
[ "$waits" -eq "$few_batches" ] || fail "waits for cards grow with the batches: $waits, of fewer $few_batches"
read_by 1
equal_files "$folder/by-1.sqz.gguf" "$folder/by-2.sqz.gguf"

write_document "$folder/book.txt" 14000
run 0 prepare -q "$folder/book.txt" -o "$folder/b.sqz.gguf" --shards 2
run 0 inspect "$folder/b.sqz.gguf"
out_has "in 2 shards"
# The command shares out rows by itself, and answers as on the CPU.
for budget in 0.3 1; do
    ask_it() {
        run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --budget "$budget" --together each --max-tokens 4 --json "$@"
    }
    ask_it -ngl 0
    answer=$(json answer)
    ask_it
    [ "$(json answer)" = "$answer" ] || fail "another answer by two cards: $(json answer), not $answer"
    [ "$(json fallback)" = null ] || fail "$(json fallback)"
    json_in budget_read "$(awk -v b="$budget" 'BEGIN { print b - 0.1 }')" "$(awk -v b="$budget" 'BEGIN { print b + 0.1 }')"
done
run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 4 --json --exact f16 --draft self --draft-tokens 3 --draft-steady
[ "$(json answer)" = "$answer" ] || fail "another answer by drafts: $(json answer)"
printf 'Who may copy it?\n' | "$program" chat "$folder/b.sqz.gguf" --max-tokens 4 >"$out" 2>"$err" || fail "chat"
SQUEEZE_GPU_WAY=callback ask_it
[ "$(json answer)" = "$answer" ] || fail "another answer by the callback: $(json answer)"
run 0 bench users -q --json --repeats 1 --tokens 2 --users 2 -c "$folder/b.sqz.gguf"
run 0 bench generate -q --json --no-llama --no-prepare --repeats 1 --tokens 2 -c "$folder/b.sqz.gguf"

# A server is told, and users of one context go over both cards together.
if "$program" serve --help >/dev/null 2>&1; then
    label="squeeze serve --split rows"
    : >"$folder/server.err"
    mkdir "$folder/contexts"
    cp "$folder"/b.sqz.gguf "$folder"/b-0*.sqz.gguf "$folder/contexts"
    "$program" serve --contexts "$folder/contexts" --split rows --port 0 >"$out" 2>"$folder/server.err" </dev/null &
    server=$!
    await_server "$server" "$folder/server.err"
    python3 "$(dirname "$0")/serve_client.py" "$port" together >"$out" 2>"$err" || fail "users of one context"
    kill -TERM "$server"
    wait "$server" || fail "the server ended with $?"
    label=
fi

# What does not fit.
run 1 ask "$folder/b.sqz.gguf" "Who?" --split layers
err_has "a context in 2 shards is read by a card each: --split rows"
run 1 ask "$folder/b.sqz.gguf" "Who?" -ngl 2
err_has "2 of 5 layers on a card: cards that share a context's rows have all of them"
run 1 ask "$folder/b.sqz.gguf" "Who?" --together one
err_has "this one is in 2 shards"
run 1 ask "$folder/b.sqz.gguf" "Who?" --split rows -ngl 0
err_has "--split rows: rows are shared by several cards, --gpu-layers 0 leaves all to the CPU"
SQUEEZE_FAKE_CARDS=1 run 1 ask "$folder/b.sqz.gguf" "Who?" --split rows
err_has "--split rows: rows are shared by several cards, there is one"
SQUEEZE_FAKE_CARDS=1 run 1 ask "$folder/b.sqz.gguf" "Who?"
err_has "a context in 2 shards is read by a card each"
SQUEEZE_FAKE_OBSTACLE="it is odd" run 1 ask "$folder/b.sqz.gguf" "Who?"
err_has "cards cannot share a context's rows: it is odd"
run 0 prepare -q "$folder/book.txt" -o "$folder/c.sqz.gguf" --shards 3 -ngl 0
run 1 ask "$folder/c.sqz.gguf" "Who?"
err_has "a context in 3 shards on 2 cards" "prepare --shards 2"
run 0 prepare -q "$folder/book.txt" -o "$folder/p.sqz.gguf" --shards 2 --rows int4+4 -ngl 0
run 1 ask "$folder/p.sqz.gguf" "Who?"
err_has "a context in shards on 2 cards: its rows are in planes"
# A context of one file lies on the first card.
run 0 prepare -q "$folder/book.txt" -o "$folder/one.sqz.gguf"
run 0 ask "$folder/one.sqz.gguf" "Who may copy it?" --split rows --max-tokens 4 --json

# A card that is lost at some call: one sentence.
for loss in 30 100 200 400 1000; do
    label="a card that is lost at call $loss"
    SQUEEZE_FAKE_LOSS=$loss "$program" ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 8 >"$out" 2>"$err" ||
        err_has "card"
done
finish
