# What scripts share that run the program as several processes; sourced behind helpers.bash.
# shellcheck shell=bash
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset OMP_WAIT_POLICY

# need_mpirun: ends the script where there is none, or the program was built without MPI.
need_mpirun() {
    if ! command -v mpirun >/dev/null; then
        echo "skipped: no mpirun (openmpi-bin)"
        finish
    fi
    mpirun --oversubscribe -n 2 "$program" inspect "$folder" >"$out" 2>"$err"
    if grep -q "without MPI" "$err"; then
        echo "skipped: built without MPI"
        finish
    fi
}

# ranks N CODE ARGUMENTS...: as run.
ranks() {
    local n=$1 wanted=$2 got=0
    shift 2
    label="mpirun -n $n squeeze $*"
    mpirun --oversubscribe -n "$n" "$program" "$@" >"$out" 2>"$err" <"${input:-/dev/null}" || got=$?
    [ "$got" -eq "$wanted" ] || fail "exit code: got $got, wanted $wanted"
}

# rank_of PID: its number.
rank_of() { tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | sed -n 's/^OMPI_COMM_WORLD_RANK=//p'; }

# process_of MPIRUN RANK: waits until it has been started.
process_of() {
    local pid tries
    for ((tries = 0; tries < 600; tries++)); do
        for pid in $(pgrep -P "$1"); do
            [ "$(rank_of "$pid")" != "$2" ] || { echo "$pid" && return; }
        done
        sleep 0.1
    done
}

# lose_process N RANK SIGNAL AFTER ARGUMENTS...: `all` is mpirun itself. The signal comes when the command AFTER returns,
# which gets mpirun's number; soon behind it (10 s, and what a loaded machine takes) mpirun has ended, and not well.
lose_process() {
    local n=$1 rank=$2 signal=$3 after=$4 pid got=0 since turn
    shift 4
    label="mpirun -n $n squeeze $1, rank $rank gets SIG$signal"
    mpirun --oversubscribe -n "$n" "$program" "$@" >"$out" 2>"$err" </dev/null &
    local job=$!
    pid=$job
    [ "$rank" = all ] || pid=$(process_of "$job" "$rank")
    "$after" "$job"
    kill "-$signal" "$pid" || fail "rank $rank was not there to be lost"
    since=$SECONDS
    # Turns, not seconds: all of this may stand still for a while (a suspended machine).
    for ((turn = 0; turn < 600; turn++)); do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.2
    done
    if kill -0 "$job" 2>/dev/null; then
        fail "it hangs"
        pkill -KILL -P "$job"
        kill -KILL "$job"
    fi
    wait "$job" || got=$?
    [ "$got" -ne 0 ] || fail "exit code: got 0, wanted another"
    echo "$label: ended after $((SECONDS - since)) s with $got"
}
