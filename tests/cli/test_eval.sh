#!/usr/bin/env bash
# needs: model. Evaluating: hostile files of every form, every method on small documents, an interrupted run that goes on.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"
export TMPDIR=$folder/box
file=$folder/eval.jsonl
recall=() bytes=()

# bad MESSAGE LINE: a file of one blank line and that one.
bad() {
    printf '\n%s\n' "$2" >"$file"
    run 1 eval "$file" -q
    err_has "eval.jsonl:2: $1"
}
bad "column" '{"document": '
bad '"document" must be a text' '{"document": 3, "questions": ["a"], "answers": ["b"]}'
bad '"questions" must be a list' '{"document": "a", "questions": [], "answers": []}'
bad '"answers" must be a list with one entry' '{"document": "a", "questions": ["a", "b"], "answers": ["b"]}'
bad '"answers", entry 1' '{"document": "a", "questions": ["a"], "answers": [3]}'
bad '"score" must be one of' '{"document": "a", "questions": ["a"], "answers": ["b"], "score": "bleu"}'
bad '"max_tokens"' '{"document": "a", "questions": ["a"], "answers": ["b"], "max_tokens": 0}'
bad '"context" must be a text' '{"context": "", "input": "a", "answers": ["b"], "dataset": "qasper"}'
bad '"answers" must be a list' '{"context": "a", "input": "a", "answers": "b"}'
bad '"all_classes" must be a list' '{"context": "a", "input": "a", "answers": ["b"], "dataset": "trec"}'
bad '"input" must end with a question' '{"index": 0, "input": "only one paragraph", "outputs": ["b"]}'
bad '"input" must be a text' '{"instructions": ["a"], "outputs": ["b"]}'
bad '2 "instructions" but 1' '{"input": "a", "instructions": ["a", "b"], "outputs": ["b"]}'
printf '{"context": "a", "input": "b", "answers": ["c"], "dataset": "qasper"}\n' >"$file"
printf '{"qasper": "no place"}' >"$folder/prompts.json"
run 1 eval "$file" -q --prompts "$folder/prompts.json"
err_has "the prompt of qasper has no {context}"
run 1 eval "$file" -q --prompts "$folder/none.json"
err_has "none.json"
run 2 eval
err_has "give a file"
run 2 eval "$file" --methods squeezed,magic
err_has "'magic'" "squeezed:2"
run 2 eval "$file" --methods quest:2
run 2 eval "$file" --no-scores --no-distances
run 2 eval "$file" --plot picture.gif
run 2 eval "$file" --maps picture.gif
run 2 eval --synthetic niah_single
err_has "niah_single:4096"
run 1 eval --synthetic niah_single:64 --questions 50 -q
err_has "takes at least"
box_holds ""

# Every method on a document with two questions, then documents of every form.
write_document "$folder/a.txt" 4000
text=$(sed 's/\\/\\\\/g; s/"/\\"/g' "$folder/a.txt" | awk '{ printf "%s\\n", $0 }')
{
    printf '{"document": "%s", "questions": ["Who may copy?", "What is copyleft?"], ' "$text"
    printf '"answers": ["Everyone may.", ["A kind of license.", "A licence."]], "max_tokens": 4}\n'
    printf '{"context": "%s", "input": "Who may copy?", "answers": ["Everyone may."], "dataset": "qasper"}\n' "$text"
    printf '{"index": 1, "input": "%s\\nWho may copy?", "outputs": ["Everyone"]}\n' "$text"
} >"$file"
printf '{"qasper": "Read this. {context} Now answer: {input} Answer:"}' >"$folder/prompts.json"
run 0 eval "$file" --reply-tokens 4 --methods squeezed,squeezed:2,paper,quest,window,oracle --budget 0.3 \
    --documents 1 --json
cp "$out" "$folder/first.json"
for name in dense squeezed paper quest window oracle; do
    out_has "\"method\": \"$name\""
done
for key in kl_mean kl_mean_low kl_mean_high kl_p99 top1 nll_diff score budget_read budget_asked worst_task tasks; do
    out_has "\"$key\""
done

# One setting's figures: awk picks the object of a method from the rows.
row_of() {
    awk -v method="\"$1\"" '/^    \{/ { text = "" } { text = text $0 "\n" }
        /^    \}/ && index(text, "\"method\": " method) { printf "%s", text; exit }' "$folder/first.json" >"$out"
}
row_of dense
json_in kl_mean -1e-9 1e-9
json_in top1 1 1
json_in budget_read 1 1
json_in answer_tokens 5 40
for name in quest window oracle; do
    row_of $name
    json_in budget_read 0.25 0.31
    json_in kl_mean 1e-6 3
done
row_of squeezed
json_in budget_read 0.15 0.45
json_in kl_mean 1e-6 2

methods=squeezed:2,window
run 0 eval "$file" --reply-tokens 4 --methods $methods --budget 0.3 --prompts "$folder/prompts.json" \
    --record "$folder/records" --json
err_has "qasper 2: " "3 of at most 3 documents" "min left"
[ "$(grep -c '"key"' "$folder/records")" -eq 3 ] || fail "wanted three records"
cp "$out" "$folder/first.json"

# The same run again takes every figure from the records; one that was cut off is measured again.
run 0 eval "$file" --reply-tokens 4 --methods $methods --budget 0.3 --prompts "$folder/prompts.json" \
    --record "$folder/records" --json
err_lines 0
grep -v '"seconds"' "$folder/first.json" >"$folder/a.json"
grep -v '"seconds"' "$out" >"$folder/b.json"
equal_files "$folder/a.json" "$folder/b.json"
head -c -3000 "$folder/records" >"$folder/cut" && mv "$folder/cut" "$folder/records"
run 0 eval "$file" --reply-tokens 4 --methods $methods --budget 0.3 --prompts "$folder/prompts.json" \
    --record "$folder/records"
err_has " 3: " "3 of at most 3 documents"
out_has "squeezed, 2 levels" "average" "qasper"
# With other options the records do not count.
run 0 eval "$file" --no-distances --reply-tokens 2 --methods window --budget 0.5 --documents 1 \
    --record "$folder/records" -q
out_has "window"

# A record counts for what it was measured for alone: another score, limit or task is measured anew.
lamp=$(printf 'The lamp was lit by Ida Morrow in the year %d. ' {1..16})
of_lamp() {
    printf '{"document": "%s", "questions": ["Who lit the lamp?"], "answers": ["Ida"]%s}\n' "$lamp" "$2" >"$1"
}
of_lamp "$folder/f1.jsonl" ''
of_lamp "$folder/any.jsonl" ', "score": "any_string"'
of_lamp "$folder/short.jsonl" ', "max_tokens": 1'
n_records=0
for name in f1 any short; do
    n_records=$((n_records + 1))
    run 0 eval "$folder/$name.jsonl" -q --no-distances --reply-tokens 4 --methods window --budget 0.9 \
        --record "$folder/lamps" --json
    [ "$(grep -c '^{"key":' "$folder/lamps")" -eq "$n_records" ] || fail "$name: wanted $n_records records"
    out_has "\"task\": \"$name\""
done
run 0 eval "$folder/f1.jsonl" -q --no-distances --reply-tokens 4 --methods window --budget 0.9 \
    --record "$folder/lamps"
[ "$(grep -c '^{"key":' "$folder/lamps")" -eq 3 ] || fail "the same was measured again"

# A document that comes twice counts once.
{ sed -n 2p "$file"; sed -n 2p "$file"; } >"$folder/twice.jsonl"
run 0 eval "$folder/twice.jsonl" -q --no-distances --reply-tokens 2 --methods window --budget 0.5 --json
err_has "it came before"
json_in documents 1 1

# A needle that stands in the window is found by whoever reads it all.
run 0 eval --synthetic niah_single:600 --questions 2 --methods window --budget 0.9 --reply-tokens 16 \
    --no-distances -q --json
out_has '"task": "niah_single"'
json_in score 0 1

# Who reads everything answers as dense does; who reads next to nothing goes another way, and how sure dense was there is
# said.
{
    printf '{"document": "The secret word is banana. Remember it well: the secret word is banana.'
    printf ' The sun rose over the hills and the river ran on to the sea, as it does every day.%.0s' $(seq 60)
    printf '", "questions": ["What is the secret word?"], "answers": ["The secret word is banana."]}\n'
} >"$folder/secret.jsonl"
run 0 eval "$folder/secret.jsonl" --methods squeezed --budget 1 --reply-tokens 12 --no-distances -q --json
row_of squeezed
json_in answers_below_dense 0 0
json_in answers_above_dense 0 0
out_has '"leads_of_lost_answers": []'
# Which of two answers scores more is chance, so that figure is put into the record; that they differ is not.
lost=(eval "$folder/secret.jsonl" -m "$whole_model" --methods window --budget 0.01 --reply-tokens 24 --no-distances -q)
run 0 "${lost[@]}" --record "$folder/lost"
grep -qE '"lead":[0-9.]+' "$folder/lost" || fail "the record has no lead of dense: $(cat "$folder/lost")"
sed -E 's/"score":[^,}]*/"score":1/; s/"score":[^,}]*/"score":0.25/2; s/"lead":[^,}]*/"lead":0.5/' "$folder/lost" \
    >"$folder/cut" && mv "$folder/cut" "$folder/lost"
run 0 "${lost[@]}" --record "$folder/lost"
out_has "1 answers score less than dense, 0 more; where the former went another way dense led by 0.50 nats"

# What exact attention reaches: all of it when dense, more for the oracle than for a window of as many keys.
run 0 eval "$file" -q --methods window,oracle,squeezed --budget 0.3 --documents 1 --no-scores --recall \
    --answer-tokens 3 --json
cp "$out" "$folder/first.json"
for name in dense window oracle squeezed; do
    row_of $name
    recall[${#recall[@]}]=$(json recall)
    json_in recall 0 1
    json_in map_heads 3 3
done
awk -v d="${recall[0]}" -v w="${recall[1]}" -v o="${recall[2]}" -v s="${recall[3]}" \
    'BEGIN { exit !(d > 1 - 1e-6 && o > w && o > 0.5 && s > w) }' || fail "recall: ${recall[*]}"

if command -v gnuplot >/dev/null; then
    run 0 eval "$file" -q --methods window,squeezed --budget 0.3,0.6 --documents 1 --no-scores \
        --plot "$folder/picture.svg"
    exists "$folder/picture.svg"
    grep -q "mean KL divergence" "$folder/picture.svg" || fail "the picture has no title"
    run 0 eval "$file" -q --methods squeezed --budget 0.3 --documents 1 --no-scores --answer-tokens 2 \
        --maps "$folder/maps.svg"
    grep -q "attention mass lost" "$folder/maps.svg" || fail "the maps have no title"
fi
box_holds ""
# Exact answers by drafts, beside those without.
printf '{"document": "%s", "questions": ["Who may copy?"], "answers": ["Everyone may."], "max_tokens": 8}\n' "$text" >"$file"
drafts=(--no-distances --no-scores --speculate --draft self --draft-steady --draft-tokens 3)
run 0 eval "$file" -q --methods quantspec,streaming,snapkv,squeezed "${drafts[@]}" --json
cp "$out" "$folder/drafts.json"
# of_drafts METHOD: that method's object becomes the output.
of_drafts() {
    python3 -c 'import json, sys
print(json.dumps(next(m for m in json.load(open(sys.argv[1]))["speculation"] if m["method"] == sys.argv[2]), indent=1))' \
        "$folder/drafts.json" "$1" >"$out"
}
for name in quantspec streaming snapkv squeezed; do
    of_drafts $name
    json_in answers 1 1
    json_in acceptance 0 1
    json_in n_tested 1 8
    json_in tokens_a_cycle 1 4
    json_in vs_exact 1e-9 1e9 # a machine may stand still for minutes
    out_has '"tokens_from": 0' '"task": "eval"'
    bytes[${#bytes[@]}]=$(json draft_bytes)
done
# A window and chosen keys are as many; 4 bits of all rows are about 0.28 of F16's bytes, beside sinks and window in F16.
awk -v q="${bytes[0]}" -v w="${bytes[1]}" -v s="${bytes[2]}" -v all="$(python3 -c 'import json, sys
print(sum(d["context_tokens"] for d in json.load(open(sys.argv[1]))["speculation"][0]["documents"]) * 4 * 2 * 3 * 64 * 2)' \
    "$folder/drafts.json")" 'BEGIN { exit !(w > 0 && w == s && q > 0.26 * all && q < 0.6 * all && w < 0.6 * all) }' ||
    fail "bytes of drafts: ${bytes[*]}"
run 0 eval "$file" -q --methods squeezed,squeezed:2,streaming --no-distances --no-scores --speculate
out_has "exact answers by drafts" "squeezed           all" "squeezed, 2 levels all" "streaming          all"
run 0 eval "$file" -q --methods squeezed --budget 0.5 --no-distances --no-scores --speculate --rows int4+4 --json
json_in acceptance 0 1
run 2 eval "$file" --methods quest --speculate
err_has "nobody who drafts" "squeezed, streaming, snapkv, quantspec"
run 2 eval "$file" --methods squeezed,quantspec
err_has "quantspec drafts exact answers and does nothing else (--speculate)" "int4 reads the same rows"
run 2 eval "$file" --methods snapkv
err_has "snapkv drafts exact answers"
run 2 eval "$file" --methods squeezed,snapkv --speculate --rows int4+4
err_has "--rows and 'snapkv'"
run 2 eval "$file" --methods squeezed --no-scores --reply-tokens 4
err_has "no replies are generated"
# All rows in fewer bits: the more bits, the nearer, and the longer the file.
run 0 eval "$file" -q --methods int4+4,int4 --no-scores --json
cp "$out" "$folder/first.json"
row_of dense
exact=$(json perplexity)
row_of int4+4
kl=$(json kl_mean) size=$(json file_ratio)
json_in perplexity 1 1e9 # of a model of four layers
json_in budget_read 0.5 0.95
json_in file_ratio 0.4 0.95
row_of int4
awk -v e="$exact" -v k="$kl" -v s="$size" -v k4="$(json kl_mean)" -v s4="$(json file_ratio)" \
    'BEGIN { exit !(e > 1 && k > 0 && k4 > k && s4 < s && s4 > 0.2) }' || fail "rows: $exact $kl $size, $(cat "$out")"
run 0 eval "$file" -q --methods int4 --no-scores
out_has "perpl." "file"
run 2 eval "$file" --methods int4 --levels 0
err_has "rows without clusters are F16"
run 2 eval "$file" --methods squeezed --draft self
err_has "without --speculate"
finish
