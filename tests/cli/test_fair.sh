#!/usr/bin/env bash
# needs: model. Many users of one server: none is refused while there is room, nobody waits for all of another's
# requests, and a full queue refuses, and says when to come again.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
command -v python3 >/dev/null || { echo "python3 is missing" >&2; exit 1; }
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT
printf 'sk-of-ann-0123456789\nsk-of-bob-0123456789\n' >"$folder/keys"
chmod 600 "$folder/keys"

# ask NAMES OPTIONS...: the client's tests of these names, of a server with these options.
ask() {
    local names=$1 port=
    shift
    label="squeeze serve $*"
    : >"$folder/server.err"
    "$program" serve --contexts "$folder/contexts" --port 0 --api-key-file "$folder/keys" "$@" \
        >"$out" 2>"$folder/server.err" </dev/null &
    server=$!
    await_server "$server" "$folder/server.err"
    label="fair_client.py $names"
    # shellcheck disable=SC2086
    python3 "$(dirname "$0")/fair_client.py" "$port" $names >"$out" 2>"$err" || fail "the client's tests: $names"
    cat "$out"
    kill -TERM "$server"
    wait "$server" || fail "the server's end"
}
ask "many every_byte fair" --slots 4 --queue 64
ask full --slots 1 --queue 4
finish
