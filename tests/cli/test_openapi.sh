#!/usr/bin/env bash
# needs: model; python3-venv and a package index, else it is skipped. The server against its OpenAPI document, which
# schemathesis reads: status codes, types and bodies of answers, what is refused and what is not.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
. "$(dirname "$0")/clients.bash"
need_model
few_layers
need_packages
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT
mkdir "$folder/contexts"
write_document "$folder/book.txt" 1500
run 0 prepare -q "$folder/book.txt" -o "$folder/contexts/book.sqz.gguf"

label="squeeze serve"
"$program" serve --contexts "$folder/contexts" --port 0 --max-tokens 1 --slots 16 --max-body 1 --auto-prepare 0 \
    >"$out" 2>"$folder/server.err" </dev/null &
server=$!
await_server "$server" "$folder/server.err"

label="schemathesis"
cd "$folder" || exit 1 # it keeps notes where it runs
"$python" -m schemathesis.cli --config-file "${SQUEEZE_SOURCE:?}/tests/cli/schemathesis.toml" run \
    "http://127.0.0.1:$port/openapi.json" --checks all --phases coverage,fuzzing --max-examples 2 --seed 1 --no-shrink \
    --request-timeout 300 --max-response-time 300 --generation-database none --warnings off >"$folder/report" 2>&1 || {
    sed -n '/FAILURES\|ERRORS/,$p' "$folder/report" | cut -c 1-500 >&2
    fail "the server is not as its document"
}
grep -A 2 'Test cases' "$folder/report"
kill -TERM "$server"
wait "$server" || fail "the server's end"
finish
