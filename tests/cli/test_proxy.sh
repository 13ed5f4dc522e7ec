#!/usr/bin/env bash
# needs: model; nginx and openssl, else it is skipped. share/nginx/squeeze.conf as it is, but for ports and certificate, in
# front of two servers on one folder: streams come through unbuffered, contexts are shared, users are spread, and when one
# server is killed the other answers all.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
for wanted in python3 nginx openssl; do
    PATH=$PATH:/usr/sbin command -v "$wanted" >/dev/null || { echo "skipped: $wanted is missing" >&2; exit 77; }
done
PATH=$PATH:/usr/sbin
source=${SQUEEZE_SOURCE:-$(dirname "$0")/../..}
servers=()
nginx=0
trap 'kill -9 "${servers[@]}" 2>/dev/null; kill "$nginx" 2>/dev/null; rm -rf "$folder"' EXIT

for number in 0 1 2 3 4 5 6 7; do printf 'sk-proxy-test-%04d\n' "$number"; done >"$folder/keys"
chmod 600 "$folder/keys"
ports=()
# start NUMBER [PORT]: a server, whose port is then in ports.
start() {
    label="squeeze serve, the server number $1"
    : >"$folder/server$1.err"
    "$program" serve --contexts "$folder/contexts" --api-key-file "$folder/keys" --port "${2:-0}" --threads 1 --slots 4 \
        >"$out" 2>"$folder/server$1.err" </dev/null &
    servers[$1]=$!
    local port
    await_server "${servers[$1]}" "$folder/server$1.err"
    ports[$1]=$port
}
start 0
start 1

# The example, with what is this machine's.
label=nginx
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
    -keyout "$folder/key.pem" -out "$folder/certificate.pem" 2>/dev/null || fail "no certificate"
https=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
sed -e "s/127.0.0.1:8080/127.0.0.1:${ports[0]}/; s/127.0.0.1:8081/127.0.0.1:${ports[1]}/" -e "s/listen 443/listen 127.0.0.1:$https/" \
    -e "s|/etc/ssl/certs/squeeze.pem|$folder/certificate.pem|; s|/etc/ssl/private/squeeze.key|$folder/key.pem|" \
    "$source/share/nginx/squeeze.conf" >"$folder/squeeze.conf"
{
    [ "$(id -u)" -ne 0 ] || echo "user $(id -un);"
    printf 'daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log stderr;\nevents {}\nhttp {\n    access_log off;\n'
    for kind in client_body proxy fastcgi uwsgi scgi; do echo "    ${kind}_temp_path $kind;"; done
    printf '    include %s;\n}\n' "$folder/squeeze.conf"
} >"$folder/nginx.conf"
nginx -e stderr -p "$folder" -c "$folder/nginx.conf" >"$out" 2>"$err" &
nginx=$!

# ask WHAT...: the client's tests of these names.
ask() {
    label="proxy_client.py $*"
    python3 "$(dirname "$0")/proxy_client.py" "$https" "$folder/certificate.pem" "${ports[@]}" "$@" >"$out" 2>"$folder/client.err" || {
        cat "$folder/client.err" >>"$err"
        fail "the client's tests: $*"
    }
}
for _ in $(seq 100); do
    curl -sk -o /dev/null "https://localhost:$https/health" && break
    kill -0 "$nginx" 2>/dev/null || { fail "nginx did not start"; finish; }
    sleep 0.1
done
ask stream shared spread upload in_work
# The second starts anew while the first is preparing a document.
kill -TERM "${servers[1]}"
wait "${servers[1]}" || fail "the second server's end"
start 1 "${ports[1]}"
ask not_mine
kill -9 "${servers[0]}"
wait "${servers[0]}" 2>/dev/null
ask one_left
kill -TERM "${servers[1]}"
wait "${servers[1]}" || fail "the second server's end"
kill "$nginx"
wait "$nginx" || fail "nginx's end"
finish
