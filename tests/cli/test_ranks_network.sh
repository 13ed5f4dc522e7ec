#!/usr/bin/env bash
# needs: model. Ranks on several hosts: network namespaces, joined by veth pairs and a bridge, and by lines that are slow and lose
# packets. Answers are those of one process, and a line that breaks ends the request. Skipped where namespaces are not
# permitted.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
. "$(dirname "$0")/hosts.bash"
trap 'drop_hosts; rm -rf "$folder"' EXIT
make_hosts 4
# ranks N ARGUMENTS...: as run, with 0
ranks() {
    local got=0
    label="$1 hosts: squeeze ${*:2}"
    start_on_hosts "$@" >"$out" 2>"$err" </dev/null || got=$?
    [ "$got" -eq 0 ] || fail "exit code: got $got, wanted 0: $(cat "$err")"
}

program=$(realpath "$program")
mkdir "$folder/box"
write_document "$folder/box/book.txt" 12000
book=$folder/box/book.sqz.gguf
run 0 prepare "$folder/box/book.txt" -q --shards 4 --sinks 4 --window 8
question="Who may copy this licence?"
run 0 ask "$book" --budget 0.4 --max-tokens 12 --json "$question"
json answer >"$folder/alone"
same() {
    json answer | cmp -s - "$folder/alone" || fail "another answer than one process gives: $(json answer)"
}
ranks 2 analyze ranks --rates here --repeats 1 -q --tokens 4K --ranks 1,2 --json
json_in host_ranks 1 1
json_in message_seconds 1e-6 1
if grep -q "without MPI" "$err"; then
    echo "skipped: built without MPI"
    exit 77
fi
for n in 2 4; do
    ranks "$n" ask "$book" --budget 0.4 --max-tokens 12 --json "$question"
    json_in n "$n" "$n"
    same
done

# crossing DELAY_US JITTER_US LOSS_PERCENT RATE_MBIT: sets lines, then least, median and lost of 100 datagrams there and back.
crossing() {
    slow_lines "$@" || fail "lines cannot be changed: $no_slow_lines"
    read -r least median lost < <(on_host 1 "$(dirname "$0")/line_client.py" ask "$hosts_prefix.2" 9 100)
}
# Lines are what they are said to be, as seen from hosts; then 5 ms there, 5 back, one packet of a hundred lost.
if ! slow_lines 0 0 0 0; then
    echo "neither delay nor loss was tried: no netem in this kernel, and $no_slow_lines"
else
    on_host 2 "$(dirname "$0")/line_client.py" answer 9 >"$folder/answering" &
    disown
    for ((i = 0; i < 100; i++)); do
        [ ! -s "$folder/answering" ] || break
        sleep 0.1
    done
    label="lines of hosts over $hosts_device"
    crossing 5000 0 0 0
    if [ "$least" -lt 10000 ] || [ "$lost" -ne 0 ]; then fail "5 ms each way: $least us at least, $lost lost"; fi
    crossing 0 0 20 0
    if [ "$lost" -lt 8 ] || [ "$lost" -gt 70 ]; then fail "a fifth of the packets, each way: $lost of 100 lost"; fi
    crossing 5000 1000 1 0
    if [ "$least" -lt 8000 ]; then fail "4 to 6 ms each way: $least us at least"; fi
    slow_lines 5000 0 1 0
    for n in 2 4; do
        since=$SECONDS
        ranks "$n" ask "$book" --budget 0.4 --max-tokens 12 --json "$question"
        same
        echo "$n hosts, 5 ms and 1% over $hosts_device: $((SECONDS - since)) s"
    done
fi

# A host that is cut off at a random moment: the request ends, with the rank's name, soon (10 s, and what a loaded
# machine takes), and nothing is left running.
many=()
for i in $(seq 60); do many+=("Question $i: what does the licence say?"); done
label="a line that breaks"
: >"$out"
start_on_hosts 2 ask "$book" --budget 0.4 --max-tokens 400 "${many[@]}" >"$out" 2>"$err" </dev/null &
job=$!
for ((i = 0; i < 600; i++)); do
    [ ! -s "$out" ] || break
    sleep 0.1
done
sleep "$(awk -v seed="$RANDOM" 'BEGIN { srand(seed); print 2 * rand() }')"
cut_off 2
since=$SECONDS
while [ "$(squeezes 1)$(squeezes 2)" != 00 ] && [ $((SECONDS - since)) -lt 60 ]; do sleep 0.2; done
echo "$label: ranks ended after $((SECONDS - since)) s"
[ "$(squeezes 1)" = 0 ] || fail "rank 0 hangs"
[ "$(squeezes 2)" = 0 ] || fail "rank 1 hangs on the host that was cut off"
# What it said reaches the file through mpirun; where all stood still for a while mpirun may be first to find its host lost.
for ((i = 0; i < 100; i++)); do
    ! grep -qE "rank 1 of 2 was not heard of|lost communication with a remote daemon" "$err" || break
    sleep 0.1
done
grep -q "lost communication with a remote daemon" "$err" || err_has "rank 1 of 2 was not heard of"
for i in $(seq "$hosts"); do ip netns pids "$hosts_name-$i" | xargs -r kill -KILL; done
got=0
wait "$job" || got=$?
[ "$got" -ne 0 ] || fail "exit code: got 0, wanted another"
run 0 ask "$book" --max-tokens 1 x
finish
