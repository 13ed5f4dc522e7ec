#!/usr/bin/env bash
# needs: model. Signals that end the program leave nothing behind, also where a file cannot be without a name; a context
# that changes while it is open gives a message.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
mkdir "$folder/box" "$folder/temporary"
write_document "$folder/short.txt" 1200
head -c 5000 /usr/share/common-licenses/GPL-3 >"$folder/long.txt"
context=$folder/box/book.sqz.gguf
run 0 prepare -q "$folder/short.txt" -o "$context"
cp "$context" "$folder/before"

# Without /proc a file has its temporary name from the start, as on file systems that know no nameless ones.
named=()
for user in "" "--map-root-user"; do
    # shellcheck disable=SC2016 # expanded by the inner shell
    hidden=(unshare --mount ${user:+"$user"} sh -c 'mount -t tmpfs none /proc && exec "$@"' sh)
    if "${hidden[@]}" true 2>/dev/null; then
        named=("${hidden[@]}")
        break
    fi
done
[ ${#named[@]} -gt 0 ] || echo "no mount namespace here: files have no names before they are done" >&2

# wait_for FILE TEXT: until it stands there, at most a minute.
wait_for() {
    local i
    for ((i = 0; i < 1200; i++)); do
        grep -qF -- "$2" "$1" && return
        sleep 0.05
    done
    fail "waited in vain for: $2"
}

# ended CODE: the process in $process ends so.
ended() {
    local code=0
    wait "$process" 2>/dev/null || code=$?
    [ "$code" -eq "$1" ] || fail "exit code: got $code, wanted $1"
}

# end_prepare CODE PHASE SIGNAL...: sends the signals once the phase is under way.
end_prepare() {
    local wanted=$1 phase=$2 signal
    shift 2
    label="prepare, $* while it does: $phase"
    : >"$err"
    (ulimit -c 0 && exec "${named[@]}" "$program" prepare "$folder/long.txt" -o "$context") >"$out" 2>"$err" &
    process=$!
    wait_for "$err" "$phase"
    [ ${#named[@]} -eq 0 ] || [ -n "$(find "$folder/box" -name '.sqz-*.tmp')" ] || fail "wanted a temporary file"
    for signal; do kill -s "$signal" "$process" 2>/dev/null; done
    ended "$wanted"
    equal_files "$context" "$folder/before"
    box_holds book.sqz.gguf
}
end_prepare 129 "read:" HUP
err_has "interrupted; nothing was written"
end_prepare 143 "cluster:" TERM
end_prepare 152 "read:" XCPU
end_prepare 129 "read:" HUP HUP
end_prepare 131 "read:" QUIT

label="prepare, HUP ignored as by nohup"
: >"$err"
(trap '' HUP && exec "$program" prepare "$folder/short.txt" -o "$folder/box/other.sqz.gguf") >"$out" 2>"$err" &
process=$!
wait_for "$err" "read:"
kill -s HUP "$process" 2>/dev/null
ended 0
exists "$folder/box/other.sqz.gguf"

text=$(tr -d '"\\\n\t\f' <"$folder/long.txt")
printf '{"input": "%s", "instructions": ["Who?"], "outputs": ["Everyone."]}\n' "$text" >"$folder/eval.jsonl"
# end_compare CODE SIGNAL...
end_compare() {
    local wanted=$1 signal
    shift
    label="compare, $*"
    : >"$err"
    TMPDIR=$folder/temporary "${named[@]}" "$program" compare "$folder/eval.jsonl" >"$out" 2>"$err" &
    process=$!
    wait_for "$err" "read:"
    for signal; do kill -s "$signal" "$process" 2>/dev/null; done
    ended "$wanted"
    [ -z "$(ls -A "$folder/temporary")" ] || fail "left behind: $(ls -A "$folder/temporary")"
}
end_compare 129 HUP
end_compare 143 TERM TERM

# At the next token, or by a page that is gone, whichever comes first: an error of the command that names the file.
says_why() {
    grep -qE "changing.gguf: (the context file changed while it was open|a part of the context file could not)" "$err" ||
        fail "wanted a sentence about the file"
}

# chat_over WHAT COMMAND...: asks, lets the command change the context's file, asks again.
chat_over() {
    local what=$1 i
    shift
    cp "$folder/before" "$folder/changing.gguf"
    touch -d '1 hour ago' "$folder/changing.gguf"
    rm -f "$folder/questions"
    mkfifo "$folder/questions"
    : >"$out"
    "$program" chat "$folder/changing.gguf" --max-tokens 6 <"$folder/questions" >"$out" 2>"$err" &
    process=$!
    exec 5>"$folder/questions"
    label="chat, $what"
    echo "Who may copy?" >&5
    for ((i = 0; i < 1200 && $(wc -l <"$out") == 0; i++)); do sleep 0.05; done # the answer is complete
    "$@"
    echo "Who may change it?" >&5
    exec 5>&-
}
chat_over "another file written over its context" cp "$folder/box/other.sqz.gguf" "$folder/changing.gguf"
ended 1
err_has "the context file changed while it was open: it "
chat_over "its context cut off" truncate -s 100 "$folder/changing.gguf"
ended 1
says_why
cp "$folder/before" "$folder/new.gguf"
chat_over "another file under its context's name" mv "$folder/new.gguf" "$folder/changing.gguf"
ended 0

cp "$folder/before" "$folder/changing.gguf"
label="ask, its context cut off while it answers"
: >"$out"
"$program" ask "$folder/changing.gguf" "Tell a very long story." --max-tokens 5000 --temp 2 --budget 1 >"$out" 2>"$err" &
process=$!
wait_for "$out" " "
truncate -s 4096 "$folder/changing.gguf"
ended 1
says_why
finish
