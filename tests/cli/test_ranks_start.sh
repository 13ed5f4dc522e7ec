#!/usr/bin/env bash
# needs: model. A rank that stops before MPI starts, while it does, or soon after that: the others end, and say why. All at the
# same time, since it is waiting. RANKS_SEED chooses the moments, which are printed.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
. "$(dirname "$0")/ranks.bash"
need_model
few_layers
mkdir "$folder/box"
need_mpirun
write_document "$folder/box/book.txt" 12000
book=$folder/box/book.sqz.gguf
run 0 prepare "$folder/box/book.txt" -q --shards 4 --sinks 4 --window 8
many=()
for i in $(seq 60); do many+=("Question $i: what does the licence say?"); done

# Rank $STOPPED_RANK stops itself: before it is the program, or so many seconds after that.
cat >"$folder/stopped" <<'END'
#!/bin/bash
if [ "$OMPI_COMM_WORLD_RANK" = "$STOPPED_RANK" ]; then
    if [ "$STOPPED_AFTER" = 0 ]; then kill -STOP $$; else (sleep "$STOPPED_AFTER"; kill -STOP $$) & fi
fi
exec "$@"
END
chmod +x "$folder/stopped"
# stop_one NAME N RANK AFTER: of N ranks, into the files NAME.*
stop_one() {
    local since=$SECONDS got=0
    STOPPED_RANK=$3 STOPPED_AFTER=$4 timeout -s KILL 120 mpirun --oversubscribe -n "$2" -x STOPPED_RANK -x STOPPED_AFTER \
        "$folder/stopped" "$program" ask "$book" --budget 0.4 --max-tokens 400 "${many[@]}" >"$folder/$1.out" \
        2>"$folder/$1.err" </dev/null || got=$?
    echo "$got $((SECONDS - since))" >"$folder/$1.ended"
}
seed=${RANKS_SEED:-$((RANDOM * 32768 + RANDOM))}
moment() { awk -v seed="$((seed + $1))" 'BEGIN { srand(seed); print 0.05 + 1.2 * rand() }'; }
stop_one default 2 1 0 &
export SQUEEZE_START_SECONDS=4
lanes=(default)
for of in "2 0 0" "4 3 0" "2 0 $(moment 1)" "2 1 $(moment 2)" "4 2 $(moment 3)" "2 1 $(moment 4)"; do
    lanes+=("lane${#lanes[@]}")
    # shellcheck disable=SC2086
    stop_one "${lanes[-1]}" $of &
done
wait
said="MPI did not start within|rank [0-9] of [0-9] was not heard of|rank 0 was not heard of"
i=0
for of in "2 1 0, 8 s" "2 0 0" "4 3 0" "2 0 $(moment 1)" "2 1 $(moment 2)" "4 2 $(moment 3)" "2 1 $(moment 4)"; do
    name=${lanes[$i]}
    i=$((i + 1))
    read -r got seconds <"$folder/$name.ended"
    cp "$folder/$name.err" "$err"
    cp "$folder/$name.out" "$out"
    label="ranks, rank that stops and when: $of (RANKS_SEED=$seed)"
    echo "$label: $seconds s"
    if [ "$got" -eq 0 ] || [ "$seconds" -ge 100 ]; then fail "ended with $got after $seconds s"; fi
    grep -qE "$said" "$err" || fail "does not say why"
done
cp "$folder/default.err" "$err"
err_has "MPI did not start within 8 s" "SQUEEZE_START_SECONDS"
cp "$folder/lane1.err" "$err"
err_has "MPI did not start within 4 s"

# What the variable may say, and a server whose ranks are never started.
for wrong in x 0 -3 1e9 nan; do
    SQUEEZE_START_SECONDS=$wrong ranks 2 1 ask "$book" x
    err_has "SQUEEZE_START_SECONDS='$wrong': allowed are 1 to 3600 seconds"
done
"$program" serve --help >/dev/null 2>&1 || finish # built without
mkdir "$folder/bin"
printf '#!/bin/sh\nexec sleep 1000\n' >"$folder/bin/mpirun"
chmod +x "$folder/bin/mpirun"
SQUEEZE_START_SECONDS=1 PATH=$folder/bin:$PATH run 1 serve --contexts "$folder/box" --port 0 --ranks 2
err_has "before its 2 ranks answered" "mpirun has not started 2 ranks within 7 s"
finish
