#!/usr/bin/env bash
# needs: model. An interrupted prepare leaves the old file as it was and nothing else; an interrupted answer ends.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
mkdir "$folder/box"
write_document "$folder/short.txt" 1500
head -c 5000 /usr/share/common-licenses/GPL-3 >"$folder/long.txt"
context=$folder/box/book.sqz.gguf
run 0 prepare -q "$folder/short.txt" -o "$context"
cp "$context" "$folder/before"

# wait_for TEXT: until it stands on standard error; five minutes at most, of which a machine alone needs seconds.
wait_for() {
    local i
    for ((i = 0; i < 3000; i++)); do
        grep -qF "$1" "$err" && return
        sleep 0.1
    done
    fail "waited in vain for: $1"
}

# interrupt SIGNAL CODE PHASE: sends it once the phase is under way.
interrupt() {
    local process code=0
    label="prepare, $1 while it does: $3"
    : >"$err"
    "$program" prepare "$folder/long.txt" -o "$context" >"$out" 2>"$err" &
    process=$!
    wait_for "$3"
    kill -s "$1" "$process"
    wait "$process" 2>/dev/null || code=$?
    [ "$code" -eq "$2" ] || fail "exit code: got $code, wanted $2"
    equal_files "$context" "$folder/before"
    box_holds book.sqz.gguf
}
interrupt INT 130 "read:"
err_has "squeeze prepare: interrupted" "is as it was"
interrupt TERM 143 "read:"
err_has "interrupted"
interrupt KILL 137 "read:"
interrupt INT 130 "cluster:"
interrupt KILL 137 "cluster:"

# The old file is still good, and an interrupted answer ends with the signal's code.
label="ask, interrupted"
code=0
"$program" ask "$context" "Tell a very long story." --max-tokens 5000 --temp 2 >"$out" 2>"$err" &
process=$!
for ((i = 0; i < 3000 && $(stat -c %s "$out") == 0; i++)); do sleep 0.1; done
kill -s INT "$process"
wait "$process" || code=$?
[ "$code" -eq 130 ] || fail "exit code: got $code, wanted 130"
err_has "interrupted"

# compare leaves no temporary folder.
mkdir "$folder/temporary"
text=$(tr -d '"\\\n\t\f' <"$folder/long.txt")
printf '{"input": "%s", "instructions": ["Who?"], "outputs": ["Everyone."]}\n' "$text" >"$folder/eval.jsonl"
label="compare, interrupted"
code=0
: >"$err"
TMPDIR=$folder/temporary "$program" compare "$folder/eval.jsonl" >"$out" 2>"$err" &
process=$!
wait_for "read:"
kill -s INT "$process"
wait "$process" || code=$?
[ "$code" -eq 130 ] || fail "exit code: got $code, wanted 130"
[ -z "$(ls -A "$folder/temporary")" ] || fail "left behind: $(ls -A "$folder/temporary")"
finish
