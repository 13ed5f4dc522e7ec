#!/usr/bin/env bash
# needs: model; pdftotext and pandoc, else it is skipped. Uploads of PDF, Word, EPUB and HTML documents: which kind they are is
# told by their bytes; damaged and hostile ones fail alone; what is being converted is cancelled, and goes on after a kill.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
for wanted in python3 pdftotext pandoc pgrep; do
    command -v "$wanted" >/dev/null || { echo "skipped: $wanted is missing" >&2; exit 77; }
done
pandoc --help | grep -q -e --sandbox || { echo "skipped: this pandoc has no --sandbox" >&2; exit 77; }
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT
export UPLOADS_SECRET=$folder/secret.txt
echo "SECRET of a file" >"$UPLOADS_SECRET"

# start ARGUMENTS...: the server on a free port, whose number is then in $port.
start() {
    label="squeeze serve $*"
    : >"$folder/server.err"
    "$@" "$(realpath "$program")" serve --contexts "$folder/contexts" --port 0 --stop-seconds 5 >"$out" 2>"$folder/server.err" </dev/null &
    server=$!
    await_server "$server" "$folder/server.err"
}
# ask WHAT...: the client's tests of these names.
ask() {
    label="uploads_client.py $*"
    python3 "$(dirname "$0")/uploads_client.py" "$port" "$server" "$@" >"$out" 2>"$err" || fail "the client's tests: $*"
}
stop() {
    kill -TERM "$server"
    wait "$server" || fail "the server's end"
}

start env
ask kinds damaged reaching_out bomb cancel
cat "$out"
ask begin
children=$(sed -n 's/^children: //p' "$out")
kill -9 "$server"
wait "$server" 2>/dev/null
for _ in 1 2 3 4 5 6 7 8 9 10; do
    # shellcheck disable=SC2086 # several numbers
    ps -o stat= -p $children 2>/dev/null | grep -qv '^Z' || break
    sleep 0.2
done
# shellcheck disable=SC2086
if ps -o stat= -p $children 2>/dev/null | grep -qv '^Z'; then fail "a child outlives the server"; fi
exists "$folder/contexts/slow.job"
start env
ask goes_on
absent "$folder/contexts/slow.job"
stop
mkdir "$folder/nothing"
start env "PATH=$folder/nothing"
ask missing
stop
if grep -qE 'SECRET|Brandt' "$folder/server.err"; then fail "texts in the log"; fi
finish
