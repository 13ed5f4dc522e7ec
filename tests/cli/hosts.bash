# Hosts that are network namespaces of this machine, joined by veth pairs and a bridge (device v0), and by lines that are slow and
# lose packets: of v0 by netem, or on a kernel without it of a TAP device t0 (tests/slow_line.c). Sourced behind helpers.bash.
# shellcheck shell=bash disable=SC2154
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset OMP_WAIT_POLICY
export OMP_NUM_THREADS=1

# Names of this process's own: others may run the same.
hosts=0 hosts_name=sqz$$
hosts_net=$((64 + $$ / 256 % 64)).$(($$ % 256))
# What MPI goes over, and the first three numbers of its addresses.
hosts_device=v0 hosts_prefix=10.$hosts_net
# Not empty: a host has a processor of its own, as far as there are enough.
hosts_cores=${hosts_cores:-}
# Where MPI's own files lie, by host: hosts of one name that share a folder take it from under each other. Paths of sockets
# are short.
hosts_folder=$(mktemp -d /tmp/sqz.XXXXXX) || exit 1

# drop_hosts: what runs there ends, hosts and lines are gone. For a script's trap.
drop_hosts() {
    local i
    for i in $(seq "$hosts"); do ip netns pids "$hosts_name-$i" | xargs -r kill -KILL 2>/dev/null; done
    [ -z "${slow_line_in:-}" ] || exec {slow_line_in}>&-
    for i in sw $(seq "$hosts"); do ip netns del "$hosts_name-$i" 2>/dev/null; done
    rm -rf "$hosts_folder"
}

# make_hosts N: host 1 to N. Ends the script, skipped, where that is not possible.
make_hosts() {
    local i tool
    for tool in mpirun ip tc; do
        command -v "$tool" >/dev/null && continue
        echo "skipped: no $tool (openmpi-bin, iproute2)"
        exit 77
    done
    if ! ip netns add "$hosts_name-sw" 2>/dev/null || ! ip -n "$hosts_name-sw" link add br0 type bridge 2>/dev/null; then
        echo "skipped: network namespaces and bridges are not permitted here"
        exit 77
    fi
    ip -n "$hosts_name-sw" link set br0 up
    hosts=$1
    for i in $(seq "$hosts"); do
        ip netns add "$hosts_name-$i"
        if ! ip link add v0 netns "$hosts_name-$i" type veth peer name "p$i" netns "$hosts_name-sw" 2>/dev/null; then
            echo "skipped: no veth here"
            exit 77
        fi
        ip -n "$hosts_name-$i" link set lo up
        ip -n "$hosts_name-$i" addr add "10.$hosts_net.$i/24" dev v0
        ip -n "$hosts_name-$i" link set v0 up
        ip -n "$hosts_name-sw" link set "p$i" master br0 up
    done
    # mpirun starts its other halves with this in place of ssh: AGENT HOST COMMAND...
    cat >"$hosts_folder/agent" <<END
#!/bin/bash
host=\${1##*.}
shift
export TMPDIR=$hosts_folder/\$host
mkdir -p "\$TMPDIR"
[ -z "$hosts_cores" ] || taskset -cp \$(((host - 1) % \$(getconf _NPROCESSORS_ONLN))) \$\$ >/dev/null
exec ip netns exec "$hosts_name-\$host" bash -c "\$*"
END
    # And with this where it must not be that whoever starts processes there can see to it that they end: AGENT HOST COMMAND...
    # hands the command over to what run_daemons has started, or fails where the line is cut off, as ssh does.
    cat >"$hosts_folder/far_agent" <<END
#!/bin/bash
host=\${1##*.}
shift
ip -n "$hosts_name-\$host" link show "\$HOSTS_DEVICE" up | grep -q . || { sleep 1; exit 255; }
printf '%s\n' "\$*" >"$hosts_folder/commands-\$host"
END
    chmod +x "$hosts_folder/agent" "$hosts_folder/far_agent"
}

# run_daemons: each host runs commands that come to it, in processes of its own.
run_daemons() {
    local i
    for i in $(seq "$hosts"); do
        mkfifo "$hosts_folder/commands-$i"
        # shellcheck disable=SC2016
        "$hosts_folder/agent" "$i" 'while read -r command; do bash -c "$command" & done <>'"$hosts_folder/commands-$i" \
            >"$hosts_folder/daemon-$i.log" 2>&1 </dev/null &
        disown
    done
}

# on_host HOST COMMAND...
on_host() { ip netns exec "$hosts_name-$1" "${@:2}"; }

# host_list N: the first N as mpirun takes them, a rank each.
host_list() {
    local list=$hosts_prefix.1:1 i
    for i in $(seq 2 "$1"); do list=$list,$hosts_prefix.$i:1; done
    echo "$list"
}

# Into mpirun_options: how mpirun and ranks reach hosts. They notice by keepalive that a line is cut off, mpirun 8 s later.
set_mpirun_options() {
    mpirun_options=(--mca plm rsh --mca plm_rsh_agent "$hosts_folder/agent" --mca btl "self,tcp"
        --mca btl_tcp_if_include "$hosts_device" --mca oob_tcp_if_include "$hosts_device" --bind-to none
        --mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 3)
}

# start_on_hosts N ARGUMENTS...: squeeze on N hosts, a rank each
start_on_hosts() {
    local n=$1
    shift
    set_mpirun_options
    "$hosts_folder/agent" 1 "$(printf '%q ' mpirun "${mpirun_options[@]}" -x OMP_NUM_THREADS --host "$(host_list "$n")" -n "$n" "$program" "$@")"
}

# slow_lines DELAY_US JITTER_US LOSS_PERCENT RATE_MBIT: what packets of each host go through from now on (a rate of 0: none), and
# what MPI goes over. False, with the reason in $no_slow_lines: there are none.
slow_lines() {
    local i rate=()
    [ "$4" = 0 ] || rate=(rate "$4mbit")
    if [ -z "${slow_line_in:-}" ]; then
        for i in $(seq "$hosts"); do
            on_host "$i" tc qdisc replace dev v0 root netem delay "$1us" "$2us" loss "$3%" "${rate[@]}" limit 10000 2>/dev/null ||
                break
            [ "$i" -lt "$hosts" ] || return 0
        done
        begin_slow_line || return 1
    fi
    echo "$*" >&"$slow_line_in"
    slow_line_ready
}

slow_line_ready() {
    local said
    # shellcheck disable=SC2034
    if ! read -r -t 10 said <&"$slow_line_out"; then
        no_slow_lines=$(cat "$hosts_folder/slow_line.err")
        slow_line_in=
        return 1
    fi
    hosts_device=t0 hosts_prefix=10.$((${hosts_net%.*} + 64)).${hosts_net#*.}
}

begin_slow_line() {
    local i names=()
    for i in $(seq "$hosts"); do names+=("$hosts_name-$i"); done
    mkfifo "$hosts_folder/in" "$hosts_folder/out"
    "${SQUEEZE_SLOW_LINE:?}" t0 "${names[@]}" <"$hosts_folder/in" >"$hosts_folder/out" 2>"$hosts_folder/slow_line.err" &
    # shellcheck disable=SC2034
    slow_line_pid=$!
    exec {slow_line_in}>"$hosts_folder/in" {slow_line_out}<"$hosts_folder/out"
    slow_line_ready || return 1
    for i in $(seq "$hosts"); do
        ip -n "$hosts_name-$i" addr add "$hosts_prefix.$i/24" dev t0
        ip -n "$hosts_name-$i" link set t0 up
    done
}

# cut_off HOST, reconnect HOST: its line.
cut_off() { ip -n "$hosts_name-$1" link set "$hosts_device" down; }
reconnect() { ip -n "$hosts_name-$1" link set "$hosts_device" up; }

# squeezes HOST: how many run there.
squeezes() {
    local pid n=0
    for pid in $(ip netns pids "$hosts_name-$1"); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != "$(basename "$program" | head -c 15)" ] || n=$((n + 1))
    done
    echo "$n"
}
