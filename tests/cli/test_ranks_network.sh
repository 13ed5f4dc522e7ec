#!/usr/bin/env bash
# needs: model. Ranks on several hosts: network namespaces, joined by veth pairs and a bridge. Answers are those of one process,
# also over lines that are slow or lose packets where the kernel can make them so (netem), and a line that breaks ends the
# request. Skipped where namespaces are not permitted.
# shellcheck disable=SC1091,SC2016,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
for tool in mpirun ip tc; do
    if ! command -v "$tool" >/dev/null; then
        echo "skipped: no $tool (openmpi-bin, iproute2)"
        exit 77
    fi
done
# Names of this process's own: others may run the same.
name=sqz$$
net=10.$((64 + $$ / 256 % 64)).$(($$ % 256))
hosts=4
drop_hosts() {
    local i
    for i in sw $(seq "$hosts"); do ip netns del "$name-$i" 2>/dev/null; done
}
# Where MPI's own files lie, by host: hosts of one name that share a folder take it from under each other. Paths of sockets
# are short.
sessions=$(mktemp -d /tmp/sqz.XXXXXX) || exit 1
trap 'drop_hosts; rm -rf "$folder" "$sessions"' EXIT
if ! ip netns add "$name-sw" 2>/dev/null || ! ip -n "$name-sw" link add br0 type bridge 2>/dev/null; then
    echo "skipped: network namespaces and bridges are not permitted here"
    exit 77
fi
ip -n "$name-sw" link set br0 up
for i in $(seq "$hosts"); do
    ip netns add "$name-$i"
    if ! ip link add v0 netns "$name-$i" type veth peer name "p$i" netns "$name-sw" 2>/dev/null; then
        echo "skipped: no veth here"
        exit 77
    fi
    ip -n "$name-$i" link set lo up
    ip -n "$name-$i" addr add "$net.$i/24" dev v0
    ip -n "$name-$i" link set v0 up
    ip -n "$name-sw" link set "p$i" master br0 up
done
# mpirun starts its other halves with this in place of ssh.
printf '#!/bin/bash\nhost=${1##*.}\nshift\nexport TMPDIR=%s/$host\nmkdir -p "$TMPDIR"\nexec ip netns exec "%s-$host" bash -c "$*"\n' \
    "$sessions" "$name" >"$folder/agent"
chmod +x "$folder/agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset OMP_WAIT_POLICY
export OMP_NUM_THREADS=1
# mpirun's own processes notice by these that a line is cut off, 8 s later; ranks after 6.
keepalive=(--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 3)
# start N ARGUMENTS...: squeeze on N hosts, a rank each
start() {
    local n=$1 list=$net.1:1 i
    shift
    for i in $(seq 2 "$n"); do list=$list,$net.$i:1; done
    ip netns exec "$name-1" mpirun --mca plm rsh --mca plm_rsh_agent "$folder/agent" --bind-to none --mca btl self,tcp "${keepalive[@]}" \
        --mca btl_tcp_if_include v0 --mca oob_tcp_if_include v0 -x OMP_NUM_THREADS --host "$list" -n "$n" \
        "$program" "$@"
}
# ranks N ARGUMENTS...: as run, with 0
ranks() {
    local got=0
    label="$1 hosts: squeeze ${*:2}"
    start "$@" >"$out" 2>"$err" </dev/null || got=$?
    [ "$got" -eq 0 ] || fail "exit code: got $got, wanted 0: $(cat "$err")"
}
# line QDISC...: what each host's packets go through
line() {
    local i
    for i in $(seq "$hosts"); do
        ip netns exec "$name-$i" tc qdisc del dev v0 root 2>/dev/null
        [ $# -eq 0 ] || ip netns exec "$name-$i" tc qdisc add dev v0 root "$@" 2>/dev/null || return 1
    done
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
# 10 ms there, 10 back, one packet of a hundred lost; else what there is: 20 Mbit/s.
if ! line netem delay 10ms loss 1%; then
    echo "no netem in this kernel: neither delay nor loss was tried"
    line tbf rate 20mbit burst 3000 latency 50ms || fail "neither netem nor tbf"
fi
ranks 2 ask "$book" --budget 0.4 --max-tokens 12 --json "$question"
same
line

# A host that is cut off at a random moment: the request ends, with the rank's name, soon (10 s, and what a loaded
# machine takes), and nothing is left running.
many=()
for i in $(seq 60); do many+=("Question $i: what does the licence say?"); done
label="a line that breaks"
: >"$out"
start 2 ask "$book" --budget 0.4 --max-tokens 400 "${many[@]}" >"$out" 2>"$err" </dev/null &
job=$!
for ((i = 0; i < 600; i++)); do
    [ ! -s "$out" ] || break
    sleep 0.1
done
sleep "$(awk -v seed="$RANDOM" 'BEGIN { srand(seed); print 2 * rand() }')"
ip -n "$name-2" link set v0 down
since=$SECONDS
# squeezes HOST: how many run there. mpirun's own processes may wait for each other for long.
squeezes() {
    local pid n=0
    for pid in $(ip netns pids "$name-$1"); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != "$(basename "$program" | head -c 15)" ] || n=$((n + 1))
    done
    echo "$n"
}
while [ "$(squeezes 1)$(squeezes 2)" != 00 ] && [ $((SECONDS - since)) -lt 300 ]; do sleep 0.2; done
echo "$label: ranks ended after $((SECONDS - since)) s"
[ "$(squeezes 1)" = 0 ] || fail "rank 0 hangs"
[ "$(squeezes 2)" = 0 ] || fail "rank 1 hangs on the host that was cut off"
# What it said reaches the file through mpirun.
for ((i = 0; i < 100; i++)); do
    ! grep -q "rank 1 of 2 was not heard of" "$err" || break
    sleep 0.1
done
err_has "rank 1 of 2 was not heard of"
for i in $(seq "$hosts"); do ip netns pids "$name-$i" | xargs -r kill -KILL; done
got=0
wait "$job" || got=$?
[ "$got" -ne 0 ] || fail "exit code: got 0, wanted another"
run 0 ask "$book" --max-tokens 1 x
finish
