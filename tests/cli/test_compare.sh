#!/usr/bin/env bash
# needs: model. Comparing: hostile evaluation files, and figures of a small real one.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box" "$folder/kept"
export TMPDIR=$folder/box
file=$folder/eval.jsonl

# json_line FILE [INSTRUCTIONS [OUTPUTS]]: the file's text as one JSON line.
json_line() {
    printf '{"input": "%s", "instructions": %s, "outputs": %s}\n' \
        "$(sed 's/\\/\\\\/g; s/"/\\"/g' "$1" | awk '{ printf "%s\\n", $0 }')" \
        "${2:-[\"Who may copy this document?\", \"What is copyleft?\"]}" \
        "${3:-[\"Everyone is permitted to copy it.\", \"A kind of license for software.\"]}"
}

# bad MESSAGE LINE: a file of one good blank line and that one.
bad() {
    printf '\n%s\n' "$2" >"$file"
    run 1 compare "$file" -q
    err_has "eval.jsonl:2: $1"
}
bad "column" '{"input": '
bad "column" '{"input": "caf'$'\xe9''", "instructions": ["a"], "outputs": ["b"]}'
bad '"input" must be a text' '{"input": 3, "instructions": ["a"], "outputs": ["b"]}'
bad '"input" must be a text' '{"input": "", "instructions": ["a"], "outputs": ["b"]}'
bad 'a JSON array' '[1, 2]'
bad '"instructions" must be a list' '{"input": "a", "outputs": ["b"]}'
bad '"instructions", entry 2' '{"input": "a", "instructions": ["a", 1], "outputs": ["b", "c"]}'
bad '"outputs" must be a list' '{"input": "a", "instructions": ["a"], "outputs": []}'
bad '2 "instructions" but 1 "outputs"' '{"input": "a", "instructions": ["a", "b"], "outputs": ["b"]}'
: >"$file"
run 1 compare "$file" -q
err_has "no document with a question that fits"
run 1 compare "$folder/none.jsonl"
err_has "none.jsonl: No such file or directory"
box_holds ""

# A document that is too long is skipped and counted.
write_document "$folder/a.txt" 5000
sed 1,20d /usr/share/common-licenses/GPL-3 | head -n 90 >"$folder/b.txt"
cat /usr/share/common-licenses/GPL-3 /usr/share/common-licenses/GPL-3 >"$folder/long.txt"
{ json_line "$folder/long.txt"; json_line "$folder/a.txt"; json_line "$folder/b.txt"; } >"$file"
run 0 compare "$file" --threads 1 --documents 2 --questions 1 --budget 0.3,1 --json
err_has "eval.jsonl:1: skipped:" "document 1:" "document 2:"
json_in documents 2 2
json_in documents_skipped 1 1
json_in questions 2 2
json_in tokens 4 100
json_in budget_asked 0.3 0.3
json_in budget_read 0.1 0.6
json_in budget_read_question 0.1 0.6
json_in budget_read_answer 0.1 0.6
json_in kl_mean 0 2
json_in kl_p99 0 10
json_in top1 0.3 1
json_in nll_dense 0.01 20
json_in nll_diff -3 3
for key in rule levels model version seconds command; do
    out_has "\"$key\":"
done
# The second budget is dense: nothing may differ.
sed -n '/"budgets"/,$p' "$out" | sed -n '/"budget_asked": 1/,/}/p' >"$folder/dense"
cp "$folder/dense" "$out"
json_in budget_read 1 1
json_in kl_mean -1e-9 1e-9
json_in top1 1 1
json_in nll_diff -1e-9 1e-9
box_holds ""

# Kept contexts are used again, also under another rule, and give the same figures as fresh ones.
fresh=$(run 0 compare "$file" -q --threads 1 --skip 1 --documents 1 --questions 1 --rule paper --json
    json kl_mean)
run 0 compare "$file" -q --threads 1 --skip 1 --documents 1 --questions 1 --keep "$folder/kept" --json
[ "$(find "$folder/kept" -name '*.sqz.gguf' | wc -l)" -eq 1 ] || fail "wanted one kept context"
before=$(stat -c '%i %Y' "$folder"/kept/*)
run 0 compare "$file" -q --threads 1 --skip 1 --documents 1 --questions 1 --keep "$folder/kept" --rule paper --json
out_has '"rule": "paper"'
[ "$(json kl_mean)" = "$fresh" ] || fail "kl_mean: got $(json kl_mean), fresh $fresh"
[ "$(stat -c '%i %Y' "$folder"/kept/*)" = "$before" ] || fail "the kept context was written again"
# A damaged one is prepared again.
truncate -s 1000 "$folder"/kept/*
run 0 compare "$file" -q --threads 1 --skip 1 --documents 1 --questions 1 --keep "$folder/kept"
err_has "preparing it again"
out_has "KL mean" "rule default"
# So is another text's under this one's name.
head -n 35 "$folder/b.txt" >"$folder/c.txt"
json_line "$folder/c.txt" '["Who may copy?"]' '["Everyone."]' >"$folder/c.jsonl"
mkdir "$folder/kept2"
run 0 compare "$folder/c.jsonl" -q --threads 1 --keep "$folder/kept2"
cp "$folder"/kept/*.sqz.gguf "$(ls "$folder"/kept2/*.sqz.gguf)"
run 0 compare "$folder/c.jsonl" -q --threads 1 --keep "$folder/kept2"
err_has "another text's" "preparing it again"
run 0 compare "$folder/c.jsonl" -q --threads 1 --keep "$folder/kept2"
err_lines 0
box_holds ""
finish
