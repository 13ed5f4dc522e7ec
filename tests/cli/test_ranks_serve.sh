#!/usr/bin/env bash
# needs: model. A server of several ranks: what it refuses, that it answers as one process does, and what is lost when a rank
# dies or stops at a random moment, there and of ask and chat: an error soon, no process, no file, and all as before.
# RANKS_SEED chooses the moments, which are printed; RANKS_LANES some of what is done (killed, stopped: servers; ask, chat).
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
for tool in python3 curl; do
    command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done

# What cannot be, wherever.
run 2 serve --hosts a,b
err_has "--hosts: only with --ranks"
for hosts in -x -oProxyCommand=x 'a;b' 'a,,b' 'a,' /etc $'a\nb' 'a b'; do
    run 2 serve --ranks 2 "--hosts=$hosts"
    err_has "no file, and no names of letters"
done
run 2 serve --ranks 0
err_has "--ranks 0: allowed is a whole number from 1 to 1024"
if ! command -v mpirun >/dev/null; then
    echo "skipped: no mpirun (openmpi-bin)"
    finish
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset OMP_WAIT_POLICY
few_layers
mkdir "$folder/contexts" "$folder/tmp" "$folder/shm"
run 1 serve --contexts "$folder/contexts" --port 0 --ranks 2 -m "$folder/none.gguf"
if grep -q "without MPI" "$err"; then
    echo "skipped: built without MPI"
    finish
fi
err_has "none.gguf" "before its 2 ranks answered"
label="serve --ranks without mpirun"
got=0
PATH=$folder/none "$program" serve --contexts "$folder/contexts" --port 0 --ranks 2 >"$out" 2>"$err" || got=$?
[ "$got" -eq 1 ] || fail "exit code: got $got, wanted 1"
err_has "mpirun is not found in PATH"

write_document "$folder/book.txt" 20000

# A context in shards that is prepared anew while ranks have it open, and one that is deleted: all of its files go.
mkdir "$folder/few"
shards=(-q --shards 2 --sinks 4 --window 8 -o "$folder/few/c.sqz.gguf")
run 0 prepare "$folder/book.txt" "${shards[@]}"
: >"$folder/few.err"
"$program" serve --contexts "$folder/few" --port 0 --ranks 2 --threads 1 2>"$folder/few.err" &
server=$!
await_server "$server" "$folder/few.err"
ask_few() {
    label="a request of $1 for context c"
    curl -s -m 60 -o "$out" -w '%{http_code}' "http://127.0.0.1:$port/v1/$1" "${@:3}" >"$folder/code"
    [ "$(cat "$folder/code")" = "$2" ] || fail "status: got $(cat "$folder/code"), wanted $2"
}
question=(-d '{"model": "c", "max_tokens": 4, "messages": [{"role": "user", "content": "Who?"}]}')
for _ in $(seq 300); do
    curl -s "http://127.0.0.1:$port/health" | grep -q '"ok"' && break
    sleep 0.1
done
ask_few chat/completions 200 "${question[@]}"
ask_few contexts/c 200
bytes=$(cat "$folder/few/"*.gguf | wc -c)
out_has "\"bytes\":$bytes,"
run 0 prepare "$folder/book.txt" "${shards[@]}" --seed 9
ask_few chat/completions 409 "${question[@]}"
out_has "context_unusable" "is another file here than at rank 0"
! grep -F "$folder" "$out" || fail "a client is told a path of the server's"
ask_few contexts 200
[ "$(grep -o '"id"' "$out" | wc -l)" -eq 1 ] || fail "shards are listed beside their index"
ask_few chat/completions 200 "${question[@]}"
ask_few contexts/c 200 -X DELETE
[ -z "$(ls "$folder/few")" ] || fail "files left of a deleted context: $(ls "$folder/few")"
kill "$server"
wait "$server" || fail "the server ended with $?"

run 0 prepare "$folder/book.txt" -q --shards 4 --sinks 4 --window 8 -o "$folder/contexts/book.sqz.gguf"
sha256sum "$folder"/contexts/* >"$folder/before"
# Open MPI's own files are looked for as well.
export TMPDIR=$folder/tmp OMPI_MCA_btl_vader_backing_directory=$folder/shm RANKS_FOLDER=$folder
label="ranks_client.py"
seed=${RANKS_SEED:-$((RANDOM * 32768 + RANDOM))}
python3 "$(dirname "$0")/ranks_client.py" "$program" "$folder/contexts/book.sqz.gguf" "$folder/contexts" "$seed" \
    >"$out" 2>"$err" || fail "ranks that die, with RANKS_SEED=$seed"
cat "$out"
sha256sum "$folder"/contexts/* | cmp -s - "$folder/before" || fail "files of contexts have changed"
left=$(find "$folder/shm" -type f | head)
[ -z "$left" ] || fail "shared memory that is left: $left"
finish
