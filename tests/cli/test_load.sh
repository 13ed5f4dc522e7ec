#!/usr/bin/env bash
# needs: model. Beside other processes: how threads wait, how many there are, and that answers do not depend on it.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
unset OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_NUM_THREADS KMP_BLOCKTIME KMP_LIBRARY

# ---- How they wait: set before the OpenMP runtime reads it, unless the user says something
# spins: what the runtime read for `squeeze ARGUMENTS`, the last time that it did.
spins() { sed -n "s/.*GOMP_SPINCOUNT = '\([0-9]*\)'.*/\1/p" "$err" | tail -n 1; }
export OMP_DISPLAY_ENV=verbose
run 0 --version
if grep -q GOMP_SPINCOUNT "$err"; then
    chosen=$(spins)
    [ "$chosen" -gt 0 ] && [ "$chosen" -lt 50000 ] || fail "threads spin $chosen times"
    GOMP_SPINCOUNT=77 run 0 --version
    [ "$(spins)" = 77 ] || fail "GOMP_SPINCOUNT=77: threads spin $(spins) times"
    OMP_WAIT_POLICY=passive run 0 --version
    err_has "OMP_WAIT_POLICY = 'PASSIVE'"
    passive=$(spins)
    OMP_WAIT_POLICY=active run 0 --version
    err_has "OMP_WAIT_POLICY = 'ACTIVE'"
    [ "$(spins)" -gt 50000 ] || fail "OMP_WAIT_POLICY=active: threads spin $(spins) times"
    [ "$(spins)" != "$passive" ] || fail "both policies spin $passive times"
    # Every argument arrives, also in a program that bears another name and lies where names need care.
    mkdir "$folder/a folder"
    cp "$program" "$folder/a folder/other name"
    "$folder/a folder/other name" help "" >"$out" 2>"$err" && fail "wanted exit code 2"
    err_has "no command ''"
fi
unset OMP_DISPLAY_ENV
export OMP_WAIT_POLICY=passive

# ---- How many there are, and answers
write_document "$folder/book.txt" 2000
context=$folder/book.sqz.gguf
run 0 prepare -q "$folder/book.txt"
question="What are the freedoms that the license protects?"
run 0 ask "$context" "$question" --max-tokens 24 --threads 1 -v
err_has "; 1 thread"
cp "$out" "$folder/one"
for n in 2 3; do
    run 0 ask "$context" "$question" --max-tokens 24 --threads "$n" -v
    err_has "; $n threads"
    equal_files "$out" "$folder/one"
done
# Beside busy processes as many as were asked for, and without a number at most one a core; the same answer.
busy=()
for _ in 1 2; do
    (while :; do :; done) &
    busy+=($!)
done
trap 'kill "${busy[@]}" 2>/dev/null; rm -rf "$folder"' EXIT
run 0 ask "$context" "$question" --max-tokens 24 --threads 2 -v
err_has "; 2 threads"
equal_files "$out" "$folder/one"
run 0 ask "$context" "$question" --max-tokens 24 --json
json_in threads_least 1 "$(nproc)"
json_in threads_most 1 "$(nproc)"
run 0 ask "$context" "$question" --max-tokens 24
equal_files "$out" "$folder/one"
kill "${busy[@]}"
OMP_NUM_THREADS=1 run 0 ask "$context" "$question" --max-tokens 4 -v
err_has "; 1 thread"
if command -v taskset >/dev/null; then
    cpu=$(taskset -cp $$ | sed 's/.*: //; s/[-,].*//')
    label="squeeze ask on one CPU"
    taskset -c "$cpu" "$program" ask "$context" "$question" --max-tokens 4 -v >"$out" 2>"$err"
    err_has "; 1 thread"
fi
finish
