#!/usr/bin/env bash
# needs: model. A server of several ranks: what it refuses, that it answers as one process does, and what is lost when a rank
# dies or stops at a random moment, there and of ask and chat: an error soon, no process, no file, and all as before.
# RANKS_SEED chooses the moments, which are printed; RANKS_LANES some of what is done (killed, stopped: servers; ask, chat).
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
command -v python3 >/dev/null || { echo "python3 is missing" >&2; exit 1; }

# What cannot be, wherever.
run 2 serve --hosts a,b
err_has "--hosts: only with --ranks"
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
