#!/usr/bin/env bash
# needs: model; python3-venv and a package index, else it is skipped. The server as the packages that people use know one:
# openai, anthropic and litellm of PyPI, each with a script that asks for all that it has names for.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
. "$(dirname "$0")/clients.bash"
need_model
need_packages
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT
contexts=$folder/contexts
mkdir "$contexts"
write_document "$folder/book.txt" 3000
run 0 prepare -q "$folder/book.txt" -o "$contexts/book.sqz.gguf"
printf 'sk-client-test-0123456789\n' >"$folder/keys"
chmod 600 "$folder/keys"

label="squeeze serve"
"$program" serve --contexts "$contexts" --port 0 --api-key-file "$folder/keys" --slots 4 --queue 4 --max-body 1 \
    >"$out" 2>"$folder/server.err" </dev/null &
server=$!
await_server "$server" "$folder/server.err"

export CLIENT_DOCUMENT=$folder/book.txt
for package in openai anthropic litellm; do
    label="client_$package.py"
    "$python" "$(dirname "$0")/client_$package.py" "$port" sk-client-test-0123456789 >"$folder/$package.out" 2>"$err" || {
        grep -A 40 FAILED "$folder/$package.out" >&2
        fail "the package $package"
    }
done
kill -TERM "$server"
wait "$server" || fail "the server's end"
cat "$folder"/*.out # how long each took
finish
