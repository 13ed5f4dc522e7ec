#!/usr/bin/env bash
# needs: model. Contexts in shards, in one process and under mpirun: what is written, what is refused, that answers are those
# of one process, what a rank sends, and that nothing hangs when a rank dies or stops.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box" "$folder/other"
write_document "$folder/box/book.txt" 20000
book=$folder/box/book.sqz.gguf
shard() { printf '%s/box/book-%05d-of-00004.sqz.gguf' "$folder" "$1"; }

# Few rows that are always read, or there is nothing to choose in a shard of so short a text.
fixed=(--sinks 4 --window 8)
run 0 prepare "$folder/box/book.txt" --shards 4 "${fixed[@]}"
box_holds book.txt book.sqz.gguf book-0000{1,2,3,4}-of-00004.sqz.gguf
run 0 inspect "$book"
out_has "context" "in 4 shards, each with clusters of its own"
run 0 inspect "$book" --json
json_in shards 4 4
run 1 inspect "$book" --plot "$folder/clusters.svg"
err_has "4 shards are not drawn"
run 0 prepare "$folder/box/book.txt" -q -o "$folder/one.sqz.gguf"

# One process holds all: at a budget of 1 both files say the same, whatever their clusters are. Sums are in another order,
# so one answer may go another way where two tokens are as likely.
questions=("Who may copy this licence?" "What is a covered work?" "What does the Program do?")
same=0
for question in "${questions[@]}"; do
    run 0 ask "$book" --budget 1 --max-tokens 16 --json "$question"
    json_in budget_read 0.99 1.01
    json answer >"$folder/in_shards"
    run 0 ask "$folder/one.sqz.gguf" --budget 1 --max-tokens 16 --json "$question"
    json answer | cmp -s - "$folder/in_shards" && same=$((same + 1))
done
[ "$same" -ge 2 ] || fail "answers of shards and of one file at a budget of 1: $same of 3 are equal"
run 0 ask "$book" --budget 0.4 --max-tokens 16 --json "${questions[0]}"
json_in budget_read 0.3 0.5

# Refused, by name.
run 1 ask "$(shard 2)" x
err_has "this is shard 2 of 4 of a context"
run 1 prepare --from "$book" -o "$folder/again.sqz.gguf"
err_has "in shards"
run 1 prepare "$folder/box/book.txt" --shards 90 -o "$folder/again.sqz.gguf"
err_has "the last would be empty"
mv "$(shard 3)" "$folder/kept"
run 1 ask "$book" x
err_has "$(shard 3)" "No such file"
cp "$(shard 2)" "$(shard 3)"
run 1 ask "$book" x
err_has "book-00003-of-00004.sqz.gguf is shard 2 of 4"
cp "$folder/one.sqz.gguf" "$(shard 3)"
run 1 ask "$book" x
err_has "is a context by itself"
head -c 3000 "$folder/kept" >"$(shard 3)"
run 1 ask "$book" x
err_has "$(shard 3)"
cp "$folder/kept" "$(shard 3)"
put_bytes "$(shard 3)" $(($(stat -c %s "$folder/kept") - 1000)) '\x5a\xa5\x5a'
run 1 ask "$book" x
err_has "$(shard 3)" "is damaged"
run 0 prepare "$folder/box/book.txt" -q --shards 4 --seed 5 -o "$folder/other/book.sqz.gguf"
cp "$folder/other/book-00003-of-00004.sqz.gguf" "$(shard 3)"
run 1 ask "$book" x
err_has "book-00003-of-00004.sqz.gguf is a shard of another context, or of another preparation"
cp "$folder/kept" "$(shard 3)"
run 0 ask "$book" --max-tokens 1 x

# ---- Several processes ------------------------------------------------------------------
. "$(dirname "$0")/ranks.bash"
need_mpirun
ranks 2 1 inspect "$book"
err_has "is one process"
# The others do what rank 0 was asked for: who was asked for anything else is refused.
ranks 1 1 ask "$book" --max-tokens 1 x : -n 1 "$program" ask "$book" --max-tokens 1 y
err_has "rank 1: other arguments than at rank 0"

for budget in 0.4 1; do
    same2=0 same4=0
    for question in "${questions[@]}"; do
        run 0 ask "$book" --budget "$budget" --max-tokens 16 --json "$question"
        json answer >"$folder/alone"
        for n in 2 4; do
            ranks "$n" 0 ask "$book" --budget "$budget" --max-tokens 16 --json "$question"
            json answer | cmp -s - "$folder/alone" && eval "same$n=\$((same$n + 1))"
            json_in n "$n" "$n"
            json_in budget_read 0.3 1.01
            partial=$(json partial_output_bytes)
            [ "$partial" = "$((9 * 65 * 4)).0" ] || fail "bytes of a partial output: got $partial"
            json_in bytes_a_token_layer 1 $((3 * 9 * 65 * 4 - 1))
        done
    done
    if [ "$same2" -ne 3 ] || [ "$same4" -ne 3 ]; then
        fail "answers of 2 and 4 ranks and of one at a budget of $budget: $same2 and $same4 of 3 are equal"
    fi
done
long=$(json bytes_a_token_layer)
run 0 prepare "$folder/box/book.txt" -q --shards 4 "${fixed[@]}" --truncate=1700 -o "$folder/other/short.sqz.gguf"
ranks 4 0 ask "$folder/other/short.sqz.gguf" --max-tokens 16 --json "${questions[2]}"
json_in bytes_a_token_layer "$(echo "$long * 0.9" | bc -l)" "$(echo "$long * 1.1" | bc -l)"
# Logits of texts behind the context, of one process and of several: sums in pairs are the same to the bit.
run 0 bench logits -c "$book" --budget 0.4 --tokens 8 --save "$folder/one.logits" "$folder/box/book.txt" --json
ranks 4 0 bench logits -c "$book" --budget 0.4 --tokens 8 --against "$folder/one.logits" "$folder/box/book.txt" --json
json_in kl_mean 0 0
json_in top1_equal 1 1
# What a rank sends for a token and layer is the same to the byte behind a context of any length.
bytes=$(json bytes_a_token_layer)
run 0 bench logits -c "$folder/other/short.sqz.gguf" --budget 0.4 --tokens 8 --save "$folder/short.logits" "$folder/box/book.txt"
ranks 4 0 bench logits -c "$folder/other/short.sqz.gguf" --budget 0.4 --tokens 8 --against "$folder/short.logits" --json \
    "$folder/box/book.txt"
json_in bytes_a_token_layer "$bytes" "$bytes"
ranks 3 0 bench logits -c "$book" --budget 0.4 --tokens 8 --against "$folder/one.logits" "$folder/box/book.txt" --json
json_in kl_mean 0 0.001
run 0 bench logits -c "$book" --budget 0.1 --tokens 8 --against "$folder/one.logits" "$folder/box/book.txt" --json
json_in kl_mean 1e-9 10
run 1 bench logits -c "$book" --tokens 9 --against "$folder/one.logits" "$folder/box/book.txt"
err_has "logits of other texts"
run 1 bench logits -c "$book" --against "$folder/box/book.txt" "$folder/box/book.txt"
err_has "not logits that bench logits --save wrote"
run 2 bench logits -c "$book" --save "$folder/one.logits" "$folder/box/book.txt"
err_has "one.logits"
run 2 bench logits -c "$book" "$folder/box/book.txt"
err_has "give --save FILE or --against FILE"
# Clusters of clusters: the same files, and the same logits to the bit.
mkdir "$folder/levels" "$folder/levels2"
run 0 prepare "$folder/box/book.txt" -q --levels 2 --shards 2 "${fixed[@]}" -o "$folder/levels/l.sqz.gguf"
ranks 2 0 prepare "$folder/box/book.txt" -q --levels 2 --shards 2 "${fixed[@]}" -o "$folder/levels2/l.sqz.gguf"
for file in "$folder/levels/"l*; do equal_files "$file" "$folder/levels2/${file##*/}"; done
run 0 bench logits -c "$folder/levels/l.sqz.gguf" --budget 0.4 --tokens 8 --save "$folder/levels.logits" "$folder/box/book.txt"
ranks 2 0 bench logits -c "$folder/levels/l.sqz.gguf" --budget 0.4 --tokens 8 --against "$folder/levels.logits" --json \
    "$folder/box/book.txt"
json_in kl_mean 0 0
json_in budget_read 0.3 0.5
# Several users of one context are one message: each selects as it does alone. Everybody may read everything, together.
for way in each all; do
    [ "$way" = each ] && read=(0.3 0.5) || read=(0.999 1)
    for n in 1 2 4; do
        ranks "$n" 0 bench users -c "$book" --users 3 --budget 0.4 --together "$way" --tokens 6 --question-tokens 12 \
            --repeats 1 -q --json
        json_in budget_read "${read[@]}"
        json_in answers_equal "$(($(json answers_compared) - 1))" "$(json answers_compared)"
        [ "$n" -eq 1 ] || json_in bytes_a_token_layer 1 $((3 * 9 * 65 * 4 - 1))
    done
done
ranks 2 0 bench generate -c "$book" --budget 0.4 --no-llama --no-prepare --tokens 6 --repeats 1 -q --json
json_in n 2 2
# More shards than ranks is fine, more ranks than shards is not; a context of one file has nothing to share.
ranks 3 0 ask "$book" --max-tokens 4 x
ranks 5 1 ask "$book" --max-tokens 4 x
err_has "rank 0 of 5 has none of its 4 shards"
ranks 2 0 ask "$folder/one.sqz.gguf" --max-tokens 4 x
mv "$(shard 4)" "$folder/away"
ranks 2 1 ask "$book" --max-tokens 4 x
err_has "rank 1" "book-00004-of-00004.sqz.gguf" "No such file"
mv "$folder/away" "$(shard 4)"

# ---- Ranks that die or stop ----------------------------------------------------------------
many=()
for i in $(seq 60); do many+=("Question $i: what does the licence say?"); done
some_seconds() { sleep "$(awk -v seed="$RANDOM" 'BEGIN { srand(seed); print 2 + 3 * rand() }')"; }
lose() { lose_process "$@" some_seconds ask "$book" --budget 0.4 --max-tokens 400 "${many[@]}"; }
cp "$book" "$folder/book.before"
lose 2 1 KILL
err_has "signal 9"
lose 4 2 STOP
err_has "rank 2 of 4 was not heard of"
lose 2 0 KILL
lose 2 0 STOP
err_has "rank 0 was not heard of"
equal_files "$book" "$folder/book.before"
run 0 ask "$book" --max-tokens 1 x
# A file that is cut while a rank has it open spoils answers about its context, not the rank.
answers() { until_said .; }
cp "$(shard 4)" "$folder/kept"
: >"$out"
cut_short() { answers && : >"$(shard 4)"; }
lose_process 2 1 CONT cut_short ask "$book" --budget 0.4 --max-tokens 100 "${many[@]}"
err_has "squeeze: rank 1: $(shard 4): the context file changed while it was open" \
    "question 1: rank 1: a file of the context changed while it was open"
cp "$folder/kept" "$(shard 4)"
finish
