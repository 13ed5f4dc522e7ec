#!/usr/bin/env bash
# needs: model. The server as a whole: what serve_client.py asks of it, starting, stopping, damaged contexts, keys, and a
# restart in the middle of a job.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
command -v python3 >/dev/null || { echo "python3 is missing" >&2; exit 1; }
client=$(dirname "$0")/serve_client.py
contexts=$folder/contexts
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT

# start ARGUMENTS...: the server on a free port, whose number is then in $port.
start() {
    label="squeeze serve $*"
    : >"$folder/server.err"
    "$program" serve --contexts "$contexts" --port 0 "$@" >"$out" 2>"$folder/server.err" </dev/null &
    server=$!
    await_server "$server" "$folder/server.err"
}
# stop CODE: asks it to end, and waits.
stop() {
    local got=0
    kill -TERM "$server"
    wait "$server" || got=$?
    cp "$folder/server.err" "$err"
    [ "$got" -eq "$1" ] || fail "exit code: got $got, wanted $1"
}
# ask WHAT...: the client's tests of these names.
ask() {
    label="serve_client.py $*"
    python3 "$client" "$port" "$@" >"$out" 2>"$err" || fail "the client's tests: $*"
}

mkdir "$contexts"
write_document "$folder/book.txt" 3000
run 0 prepare -q "$folder/book.txt" -o "$contexts/book.sqz.gguf"
cp "$contexts/book.sqz.gguf" "$contexts/damaged.sqz.gguf"
put_bytes "$contexts/damaged.sqz.gguf" 3000 '\xff\xff\xff\xff\xff\xff\xff\xff'
cp "$contexts/book.sqz.gguf" "$contexts/bad name.sqz.gguf"
export SERVE_DOCUMENT=$folder/book.txt SERVE_FOLDER=$folder

# What cannot be.
run 2 serve --port 99999
err_has "--port 99999: allowed is a whole number from 0 to 65535"
run 1 serve --contexts "$contexts" --port 0 --host 0.0.0.0
err_has "can be reached from other machines" "--api-key-file"
printf 'short\n' >"$folder/keys"
chmod 600 "$folder/keys"
run 1 serve --contexts "$contexts" --port 0 --api-key-file "$folder/keys"
err_has "a key of 5 characters"
run 1 serve --contexts "$folder/book.txt" --port 0
err_has "book.txt"

start --header-seconds 3 --slots 4 --queue 8 --max-body 1
grep -q "1 context, listening" "$folder/server.err" || fail "wanted one context"
ask info models chat stream completions logprobs choices stops schema tools prefix squeeze passages tokenize responses messages
if grep -qE 'purple|elephant|GNU' "$folder/server.err"; then fail "texts in the log"; fi
stop 0

# Rows of 4 + 4 bits: exact to those.
write_document "$folder/longer.txt" 6000
run 0 prepare -q "$folder/longer.txt" --levels 1 --rows int4+4 -o "$contexts/planes.sqz.gguf"
start --slots 2
ask exact
stop 0
rm "$contexts/planes.sqz.gguf"

# What the model says does not matter from here on.
few_layers
rm "$contexts/damaged.sqz.gguf"
run 0 prepare -q "$folder/book.txt" -o "$contexts/book.sqz.gguf"
start --header-seconds 3 --slots 4 --queue 8 --max-body 1
ask bad_json bad_values bad_http split_bytes oversized slow_head wrong_host
ask leaves queue many contexts
cp "$contexts/book.sqz.gguf" "$contexts/cut.sqz.gguf"
ask cut
ask health
if grep -qE 'purple|elephant|GNU' "$folder/server.err"; then fail "texts in the log"; fi
stop 0

# Threads that compute are the scheduler's alone, and it has none before there is work.
if ldd "$program" | grep -q libgomp; then
    declare -A threads
    for n in 1 3; do
        OMP_NUM_THREADS=$n start
        threads[$n]=$(find /proc/"$server"/task -mindepth 1 -maxdepth 1 | wc -l)
        stop 0
    done
    [ "${threads[1]}" -eq "${threads[3]}" ] || fail "threads: ${threads[1]} with one that computes, ${threads[3]} with three"
fi

# Beginnings that are prepared by themselves, also after a restart, and a full folder.
start --auto-prepare 1000
ask auto auto_gone
stop 0
start
ask auto_again
stop 0
rm -f "$contexts"/auto-*
python3 "$client" 0 story >"$folder/story.txt"
run 0 prepare -q "$folder/story.txt" -o "$folder/story.sqz.gguf"
room=$(awk -v book="$(stat -c %s "$contexts/book.sqz.gguf")" -v story="$(stat -c %s "$folder/story.sqz.gguf")" \
    'BEGIN { printf "%.9f", (book + 2.5 * story) / 2 ^ 30 }')
start --disk "$room"
ask disk
stop 0
exists "$contexts/book.sqz.gguf"
rm -f "$contexts"/one.* "$contexts"/three.*

# Two thousand streams that wait for one place.
start --slots 1 --queue 3000
SERVE_PROCESS=$server ask idle
stop 0

# Keys.
printf 'sk-serve-test-0123456789\n' >"$folder/keys"
start --api-key-file "$folder/keys"
ask keys
stop 0

# A job that is killed in the middle goes on, and nothing half-made is listed meanwhile.
start
ask begin_job
kill -9 "$server"
wait "$server" 2>/dev/null
absent "$contexts/long.sqz.gguf"
start
ask end_job
stop 0
exists "$contexts/long.sqz.gguf"
absent "$contexts/long.job"

# An answer in work ends before the server does.
start --stop-seconds 60
python3 "$client" "$port" slow_answer >"$folder/slow.out" 2>&1 &
asking=$!
for _ in $(seq 300); do grep -q begun "$folder/slow.out" && break; sleep 0.1; done
stop 0
wait "$asking" || { cp "$folder/slow.out" "$err"; fail "an answer in work was cut off"; }
finish
