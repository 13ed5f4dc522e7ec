#!/usr/bin/env bash
# needs: model. Asking: text, JSON, several questions, standard input, sampling, a reader that goes away.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
write_document "$folder/book.txt" 5000
context=$folder/book.sqz.gguf
run 0 prepare -q "$folder/book.txt"
question="What are the freedoms that the license protects?"

run 0 ask "$context" "$question" --max-tokens 24
exists "$out"
# What is said there: that the default budget was raised, and perhaps that the answer was cut off.
err_has "a budget of 0.1 leaves too little for chosen keys in this context: 0."
if [ "$(wc -l <"$err")" -ne 1 ]; then
    err_lines 2
    err_has "the answer was cut off after 24 tokens; --max-tokens allows more"
fi
[ "$(tail -c 1 "$out" | od -An -c | tr -d ' ')" = '\n' ] || fail "wanted a newline at the end"
cp "$out" "$folder/first"
run 0 ask "$context" "$question" --max-tokens 24 -v
equal_files "$out" "$folder/first"
err_has "context opened in" "read " "% of the context" "first token after" "tokens/s"

# Several questions are answered each on its own.
run 0 ask "$context" "$question" "$question" --max-tokens 24
{ cat "$folder/first"; echo; cat "$folder/first"; } >"$folder/twice"
equal_files "$out" "$folder/twice"
printf '%s' "$question" >"$folder/question"
input=$folder/question run 0 ask "$context" - --max-tokens 24
equal_files "$out" "$folder/first"

run 0 ask "$context" "$question" --max-tokens 16 --json --budget 0.3
for key in seconds first_token_seconds tokens_per_second; do
    json_in "$key" 0 600
done
json_in n_tokens 1 16
json_in n_question_tokens 5 100
json_in budget_asked 0.3 0.3
json_in budget_read 0.1 0.6
out_has '"question":' '"answer":' '"end":'
run 0 ask "$context" "$question" --max-tokens 16 --json --prune 70%
json_in budget_asked 0.3 0.3
run 0 ask "$context" "$question" "$question" --max-tokens 4 --json
out_has '"answers": ['
[ "$(grep -c '"answer":' "$out")" -eq 2 ] || fail "wanted two answers"

# A budget of 1 reads everything; the same seed gives the same answer.
run 0 ask "$context" "$question" --max-tokens 16 --json --budget 1
json_in budget_read 1 1
for seed in 7 4294967295; do # the last is llama.cpp's mark for a random one
    for i in 1 2; do
        run 0 ask "$context" "$question" --max-tokens 24 --threads 1 --budget 1 --temp 1.5 --top-p 0.9 --seed "$seed"
        cp "$out" "$folder/seed$i"
    done
    equal_files "$folder/seed1" "$folder/seed2"
done

# Exact answers read everything; drafts change no more than the rounding of batches does, and the same seed gives the same.
run 0 ask "$context" "$question" --max-tokens 24 --exact f16 --draft-tokens 4 --draft-steady --json
json_in budget_read 1 1
json_in budget_asked 1 1
out_has '"exact": "f16"' '"n_cycles":' '"tokens_a_cycle":'
run 0 ask "$context" "$question" --max-tokens 24 --exact f16 -v
err_has "read 100.0% of the context (asked for 100.0%"
for draft in self ngram chain; do
    for i in 1 2; do
        run 0 ask "$context" "$question" --max-tokens 16 --exact f16 --draft "$draft" --temp 1.5 --seed 7
        cp "$out" "$folder/seed$i"
    done
    equal_files "$folder/seed1" "$folder/seed2"
done
run 0 ask "$context" "$question" --max-tokens 8 --exact f16 --draft none --json
json_in n_cycles 0 0
run 1 ask "$context" "$question" --exact int8
err_has "rows of 4 + 4 bits, this one has F16 rows; allowed is exact f16" "--rows int4+4"

# Bad questions.
run 1 ask "$context" ""
err_has "squeeze ask: "
printf 'caf\xe9' >"$folder/latin1"
input=$folder/latin1 run 1 ask "$context" -
err_has "UTF-8"
awk 'BEGIN { for (i = 0; i < 9000; i++) printf "word " }' >"$folder/long"
input=$folder/long run 1 ask "$context" -
err_has "tokens"

# A reader that goes away ends the program, quietly.
label="squeeze ask | head -c 1"
"$program" ask "$context" "$question" --budget 0.5 --max-tokens 200 2>"$err" | head -c 1 >"$out"
code=${PIPESTATUS[0]}
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
[ ! -s "$err" ] || fail "wanted nothing on standard error"
finish
