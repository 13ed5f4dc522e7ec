#!/usr/bin/env bash
# needs: model; chromium and chromedriver (Debian: chromium-driver), else it is skipped. The page at /: a document is
# uploaded, asked about, at a budget and exactly, by mouse and keyboard, on a narrow screen too. SQUEEZE_PICTURE=FILE
# keeps a screenshot: docs/page.png is one.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
for wanted in python3 chromedriver chromium; do
    command -v "$wanted" >/dev/null || { echo "skipped: $wanted is missing" >&2; exit 77; }
done
server=
trap 'kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT

# A house of many rooms, and one secret.
rooms=(library kitchen observatory workshop greenhouse archive chapel stable mill)
people=(Anna Boris Clara David Elena Frank Greta)
things=("a brass telescope" "seven jars of honey" "a chest of old maps" "a broken clock" "forty candles")
{
    printf '# The house on the hill\n\nAn inventory and a history, written down in the year 1911.\n\n'
    for i in $(seq 24); do
        printf 'Chapter %d. In the %s on floor %d, %s kept %s. ' "$i" "${rooms[i % 9]}" "$((1 + i / 9))" \
            "${people[i * 3 % 7]}" "${things[i * 2 % 5]}"
        printf 'It was repaired in %d after a storm, and the neighbours remembered the day for many years. ' "$((1850 + 2 * i))"
        printf 'Visitors were asked to ring the bell twice and to wait under the lime tree until somebody came.\n\n'
        [ "$i" -ne 15 ] || printf 'The secret code of the garden gate is 4719, and only the gardener Matilda Vogel knows it.\n\n'
    done
} >"$folder/house.txt"

label="squeeze serve"
"$program" serve --contexts "$folder/contexts" --port 0 >"$out" 2>"$folder/server.err" </dev/null &
server=$!
await_server "$server" "$folder/server.err"

label="page_client.py"
python3 "$(dirname "$0")/page_client.py" "$port" "$folder/house.txt" ${SQUEEZE_PICTURE:+"$SQUEEZE_PICTURE"} >"$out" 2>"$err" ||
    fail "the page"
kill -TERM "$server"
wait "$server" || fail "the server's end"
finish
