#!/usr/bin/env bash
# needs: model. Files of documents and questions: every line is checked before any work, what is wrong is named with its
# line and a command that helps, and what can only be found in the work costs no other's result.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/in"
cd "$folder/in" || exit 1
lamp=$(printf 'The lamp was lit by Ida Morrow in the year %d. ' {1..16})
good='{"document": "'$lamp'", "questions": ["Who lit the lamp?"], "answers": ["Ida"]}'
model=$SQUEEZE_MODEL
export SQUEEZE_MODEL=$folder/none.gguf # whoever passes the check says that it is not there

# passes FILE / wrong FILE MESSAGE...: both commands, before the model is looked for.
passes() {
    for command in eval compare; do
        run 1 "$command" "$1" -q
        err_has "none.gguf"
    done
}
wrong() {
    for command in eval compare; do
        run 1 "$command" "$1" -q
        err_has "${@:2}"
        if grep -q "none.gguf" "$err"; then fail "the model was looked for"; fi
        if grep -qE "expected near|'\[' or" "$err"; then fail "a parser's words"; fi
    done
}
# made FILE: the command that the message gives makes a file that passes.
made() {
    sh -c "$(sed -n "s/.*[:;] \(\(jq\|gzip\|iconv\|sed\|tr\) .*\)$/\1/p" "$err" | head -n 1)" || fail "its command failed"
    passes "$1.jsonl"
}
printf '\n%s\n' "$good" >good
passes good
printf '\xef\xbb\xbf%s\r\n\r\n%s\r\n' "$good" "$good" >bom
passes bom
printf '%s' "${good%?}, \"x\": [NaN, -Infinity, Infinity], \"y\": \"a \\\\\\\" NaN\"}" >nan
passes nan
printf '[%s,\n%s]\n' "$good" "$good" >array
wrong array "array:1: " "a JSON array" "jq -c '.[]' array >array.jsonl"
printf '[%s]\n' "$good" >array
wrong array "array:1: a JSON array"
printf '[\n%s\n]\n' "$good" >'an array'
wrong 'an array' "jq -c '.[]' 'an array' >'an array.jsonl'"
command -v jq >/dev/null && made 'an array'
printf '{\n"document": "%s",\n"questions": ["Who?"], "answers": ["Ida"]}\n' "$lamp" >spread
wrong spread "spread:1: column" "has to be on one line: jq -c . spread >spread.jsonl"
command -v jq >/dev/null && made spread
printf '%s\r%s\r' "$good" "$good" >carriage
wrong carriage "carriage:1: column" "a line of its own: jq -c ."
printf '%s\n%s\n' "$good" "${good/Ida\"/I\\u0000da\"}" >nul
wrong nul 'nul:2: "answers", entry 1 has a NUL (\u0000) at byte 1' "without what is wrong: sed -e 2d nul >nul.jsonl"
made nul
printf '%s\n' "${good/The lamp/The\\u0000 lamp}" >nul2
wrong nul2 'nul2:1: "document" has a NUL'
made nul2
printf '%s\n' "$good" | gzip >zip.gz
wrong zip.gz "zip.gz is compressed by gzip" "gzip -dc zip.gz >zip.gz.jsonl"
made zip.gz
printf '%s\n' "$good" | iconv -f UTF-8 -t UTF-16 >wide
wrong wide "wide is UTF-16" "iconv "
made wide
printf '%s\n' "$good" | iconv -f UTF-8 -t UTF-16LE >wide2
wrong wide2 "wide2 is UTF-16"
printf '%s\n' "${good/Ida/caf$'\xe9'}" >latin
wrong latin "latin:1: column" "not UTF-8" "iconv -f WINDOWS-1252"
made latin
printf '%s\n"text"\n{"data": 1}\n{}\n%s\n' "$good" "${good%????}" >many
wrong many "many:2: must be a JSON object" 'many:3: no document: wanted are "document"' 'found: "data"' "found: none" \
    "many:5: column" "4 lines are wrong; nothing was measured" "sed -e 2d -e 3d -e 4d -e 5d many >many.jsonl"
made many
printf '{"data": 1}\n%.0s' {1..30} >worse
wrong worse "30 lines are wrong, 20 of them are listed"
err_lines 21
printf '%s\n' "${good/\"Who lit the lamp?\"/\"\\u200b \\ufeff\"}" >invisible
wrong invisible "invisible:1: question 1 is empty"
printf '{"document": "%%PDF-1.4\\n", "questions": ["a"], "answers": ["b"]}\n' >pdf
wrong pdf "pdf:1: the document is a PDF file"
printf '%s\n{"a" 1}\n{"a": maybe}\n' "$good" >tokens
wrong tokens "tokens:2: column" "this is not JSON: ':' is missing before '1'" "tokens:3: column" \
    "'maybe' has no place here"
printf '%s\n\000\n' "$good" >zero
wrong zero "zero has NUL bytes, it is not lines of JSON" "file zero"
printf '{"a\033[31m": 1, "b\\u001b[31m": 2}\n' >steer
wrong steer "steer:1:"
if grep -q $'\033' "$err"; then fail "a control character of the file went to the terminal"; fi
run 1 eval good many -q
err_has "many:2:"
mkfifo pipe # without a writer: whoever opened it would wait for ever
run 1 eval pipe -q
err_has "write it into a file first"
printf '\xef\xbb\xbf{"qasper": "no place"}' >prompts.json
printf '{"context": "a", "input": "b", "answers": ["c"], "dataset": "qasper"}\n' >bench
run 1 eval bench -q --prompts prompts.json
err_has "bench:1: the prompt of qasper has no {context}"
run 2 eval good --synthetic niah_single:4K,nothing:3
err_has "'nothing:3'"

# Found in the work: the others are measured, what was left out stands beside them, and the exit code says it.
export SQUEEZE_MODEL=$model
long=$(printf "$lamp%.0s" {1..50})
{
    printf '%s\n' "$good"
    printf '{"document": "%s", "questions": ["Who?"], "answers": ["Ida"]}\n' "$long"
    printf '{"document": "%s", "questions": ["Who lit it?", "Who lit the lamp?"], "answers": ["", "Ida"]}\n' "$lamp"
} >work.jsonl
run 3 eval work.jsonl -q --threads 1 --methods window --budget 0.9 --no-scores --json
json_in documents 2 2
out_has '"left_out": [' '"line": 2' '"line": 3' '"question": 1' "its reference answer is empty" "the model holds"
err_has "work.jsonl:2: left out:" "work.jsonl:3: question 1 left out:"
run 3 compare work.jsonl -q --threads 1
err_has "work.jsonl:2: skipped:" "work.jsonl:3: question 1 skipped:"
out_has "line 2 skipped:" "2 documents, 2 questions"
finish
