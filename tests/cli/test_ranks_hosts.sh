#!/usr/bin/env bash
# needs: model. A server whose ranks are on two hosts: network namespaces. It answers as one process does; a rank that is killed on
# either, or a line that is cut off, ends requests with the rank's name, and all is as before afterwards; nothing is left on
# the other host. Skipped where namespaces are not permitted. RANKS_SEED chooses the moments.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
command -v python3 >/dev/null || { echo "python3 is missing" >&2; exit 1; }
few_layers
. "$(dirname "$0")/hosts.bash"
trap 'drop_hosts; rm -rf "$folder"' EXIT
make_hosts 2
program=$(realpath "$program")
mkdir "$folder/contexts"
write_document "$folder/book.txt" 20000
run 0 prepare "$folder/book.txt" -q --shards 4 --sinks 4 --window 8 -o "$folder/contexts/book.sqz.gguf"
start_on_hosts 2 inspect "$folder" >"$out" 2>"$err" </dev/null
if grep -q "without MPI" "$err"; then
    echo "skipped: built without MPI"
    exit 77
fi
export RANKS_FOLDER=$folder
run_daemons
# As a user says them who has no ssh and several networks; docs/ranks.md.
export OMPI_MCA_plm=rsh OMPI_MCA_plm_rsh_agent=$hosts_folder/far_agent OMPI_MCA_btl=self,tcp
export OMPI_MCA_btl_tcp_if_include=$hosts_device OMPI_MCA_oob_tcp_if_include=$hosts_device HOSTS_DEVICE=$hosts_device
# far: what runs on the second host beside its daemon.
cat >"$folder/far" <<END
#!/bin/bash
for pid in \$(ip netns pids "$hosts_name-2"); do
    name=\$(cat "/proc/\$pid/comm" 2>/dev/null)
    [ "\$name" = bash ] || [ -z "\$name" ] || [ "\$(cut -d ' ' -f 3 "/proc/\$pid/stat" 2>/dev/null)" = Z ] || echo "\$pid \$name"
done
END
chmod +x "$folder/far"
label="hosts_client.py"
seed=${RANKS_SEED:-$((RANDOM * 32768 + RANDOM))}
line="ip -n $hosts_name-2 link set $hosts_device"
on_host 1 "$(dirname "$0")/hosts_client.py" "$program" "$folder/contexts/book.sqz.gguf" "$folder/contexts" "$seed" \
    "$(host_list 2)" "$line down" "$line up" "$folder/far" >"$out" 2>"$err" || fail "a server on two hosts, with RANKS_SEED=$seed"
cat "$out"
finish
