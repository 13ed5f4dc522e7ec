#!/usr/bin/env bash
# needs: model. Chat from a pipe and, where `script` can make one, at a terminal.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
write_document "$folder/book.txt" 3000
context=$folder/book.sqz.gguf
run 0 prepare -q "$folder/book.txt"

# chat CODE LINE...: the lines are the input.
chat() {
    local wanted=$1
    shift
    printf '%s\n' "$@" >"$folder/lines"
    input=$folder/lines run "$wanted" chat "$context" --max-tokens 12
}

chat 0 "Who may copy this document?"
exists "$out"
run 0 ask "$context" "Who may copy this document?" --max-tokens 12
cp "$out" "$folder/asked"
chat 0 "Who may copy this document?"
equal_files "$out" "$folder/asked"

chat 0 /help
out_has /budget /reset /stats /help /quit
chat 0 /budget "/budget 0.25" /budget "/budget 1.5" "/budget x"
[ "$(cat "$out")" = $'budget 0.1\nbudget 0.25\nbudget 0.25' ] || fail "budgets shown"
err_has "budget 1.5: allowed is more than 0 and at most 1" "budget x: allowed"
chat 0 /stats "Who may copy this document?" /stats /reset /stats
[ "$(grep -c '^0 tokens used' "$out")" -eq 2 ] || fail "wanted 0 tokens used at the start and after /reset"
out_has "last answer: read"
chat 0 /what "/reset now"
err_has "no command /what; /help shows the commands, and //what asks it as a question" "/reset takes nothing behind it"
chat 0 /quit "Who may copy this document?"
[ ! -s "$out" ] || fail "wanted nothing after /quit"
chat 0 "" "   "
[ ! -s "$out" ] || fail "wanted nothing for empty lines"

# History: the second question's answer may use the first; after /reset the first comes out again.
chat 0 "Who may copy this document?" "Why?" /reset "Who may copy this document?"
label="chat, the last answer after /reset"
tail -n "$(wc -l <"$folder/asked")" "$out" >"$folder/last"
equal_files "$folder/last" "$folder/asked"

# No room: a clear message, and /reset helps.
awk 'BEGIN { for (i = 0; i < 9000; i++) printf "word "; print "" }' >"$folder/long"
{ cat "$folder/long"; echo /reset; echo "Who may copy this document?"; } >"$folder/lines"
input=$folder/lines run 1 chat "$context" --max-tokens 12
err_has "line 1: " "/reset"
equal_files "$out" "$folder/asked"

run 2 chat "$context" "a question"
err_has "too many arguments"

if command -v script >/dev/null; then
    label="chat at a terminal"
    # The terminal hangs up only once the program has read its lines; what is typed is shown, too.
    : >"$out"
    { until_said "tokens of context"; printf '/budget 0.5\n'; until_said "^budget 0.5"; printf '/quit\n'; sleep 2; } |
        script -qec "'$program' chat '$context'" /dev/null >"$out" 2>"$err" || fail "exit code: got $?, wanted 0"
    out_has "tokens of context" "budget 0.5"
fi
finish
