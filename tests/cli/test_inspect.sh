#!/usr/bin/env bash
# needs: model. What inspect prints and draws.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"
write_document "$folder/book.txt" 5000
context=$folder/book.sqz.gguf
run 0 prepare -q "$folder/book.txt" --levels 2

run 0 inspect "$context"
out_has "model " "document   book.txt" "context " "layers " "rule " "sizes " "level" "budget" "mass lost"
run 0 inspect "$context" --verify
out_has "every checksum agrees"

run 0 inspect "$context" --json
json_in tokens 300 1600
json_in layers 1 1000
json_in levels 2 2
json_in file_bytes "$(stat -c %s "$context")" "$(stat -c %s "$context")"
out_has '"budget": 0.1,' '"source": "book.txt"'
kv=$(json kv_bytes)
[ "$kv" -lt "$(json file_bytes)" ] || fail "keys and values are larger than the file"
# Larger budgets read more and lose less.
awk '/"budget":/ { gsub(/[",]/, ""); budget = $2 } /"read_bytes":/ { gsub(/,/, ""); read_bytes = $2 }
     /"lost_mass":/ { gsub(/,/, ""); if (n++ && (read_bytes < last_read || $2 > last_lost + 1e-9)) bad = 1
                      last_read = read_bytes; last_lost = $2 }
     END { exit bad || n < 5 }' "$out" || fail "budgets are not ordered"

json_in format_version 2 2
out_has '"rounded_keys": false'

# INT8 keys alone: a smaller file, which says what a budget of 1 reads; it can be asked, and squeezed again.
small=$folder/small.sqz.gguf
run 0 prepare -q "$folder/book.txt" --levels 2 --keys int8 -o "$small"
[ $((100 * $(stat -c %s "$small"))) -lt $((88 * $(stat -c %s "$context"))) ] || fail "INT8 keys do not make the file smaller"
run 0 inspect "$small"
out_has "keys int8," "exact      no: a budget of 1 reads every key, but keys are kept as int8 alone"
run 0 inspect "$small" --json
json_in format_version 3 3
out_has '"rounded_keys": true'
json_in kv_bytes 1 $((kv * 4 / 5))
run 0 ask "$small" "What is this about?" --budget 1 --max-tokens 3
run 0 prepare -q --from "$small" --keys f16 -o "$folder/again.sqz.gguf"
run 0 inspect "$folder/again.sqz.gguf" --json
json_in format_version 2 2
json_in kv_bytes "$kv" "$kv"

# Keys and values of 4 + 4 bits, and of 4: half the file and a third of it; asked, and squeezed to one another.
for format in int4+4 int4; do
    most=$([ "$format" = int4 ] && echo 46 || echo 64)
    run 0 prepare -q "$folder/book.txt" --levels 2 --rows "$format" -o "$small"
    [ $((100 * $(stat -c %s "$small"))) -lt $((most * $(stat -c %s "$context"))) ] ||
        fail "--rows $format: $(stat -c %s "$small") of $(stat -c %s "$context") bytes"
    run 0 inspect "$small"
    out_has "keys and values $format," "a budget of 1 reads everything, but keys and values are kept as $format, rounded"
    if [ "$format" = int4 ]; then out_has "exact      no: "; else out_has "exact      to int8 alone: "; fi
    out_has "own rows   of questions and answers as $format, too"
    run 0 inspect "$small" --json
    json_in format_version 4 4
    out_has '"rounded_keys": true' "\"rows\": \"$format\"" '"keys": "f16"'
    run 0 ask "$small" "What is this about?" --budget 0.3 --max-tokens 3
    run 0 ask "$small" "What is this about?" --budget 1 --max-tokens 3
    run 1 ask "$small" "What is this about?" --exact f16
    if [ "$format" = int4 ]; then
        err_has "in 4 bits, to which no answer can be exact" "--rows int4+4 for exact int8"
        run 1 ask "$small" "What is this about?" --exact int8
        err_has "in 4 bits, to which no answer can be exact"
    else
        err_has "in 4 + 4 bits, so that no answer can be exact to the model; allowed is exact int8"
        for draft in upper both; do
            run 0 ask "$small" "What is this about?" --exact int8 --draft self --draft-rows $draft --max-tokens 8 \
                --draft-tokens 3 --draft-steady --json
            out_has '"exact": "int8"' "\"draft_rows\": \"$draft\""
            json_in n_cycles 1 8
            json_in budget_read 0.5 0.8
        done
    fi
done
run 0 prepare -q --from "$small" --rows int8 -o "$folder/again.sqz.gguf"
run 0 inspect "$folder/again.sqz.gguf" --json
out_has '"rows": "int4+4"'
run 0 prepare -q --from "$folder/again.sqz.gguf" -o "$small"
run 0 inspect "$small" --json
json_in format_version 2 2
json_in kv_bytes "$kv" "$kv"
run 2 prepare -q "$folder/book.txt" --keys int8 --rows int4 -o "$small"
err_has "--keys int8 and --rows int4 say two things of keys"

# What rounding loses: more by 4 bits than by 8, and of keys less their mean more than of those less their cluster's centroid.
run 0 bench rounding -c "$context" --queries 4 --threads 2 --json
awk '/"way":/ { gsub(/[",]/, ""); way = $2 } /"bits":/ { gsub(/,/, ""); bits = $2 } /"error":/ { gsub(/,/, ""); e[way bits] = $2 }
     END { exit !(e["keys_centroid_turned8"] > 0 && e["keys_centroid_turned4"] > 20 * e["keys_centroid_turned8"] &&
                  e["keys_centroid_turned4"] < e["keys_mean_turned4"] && e["keys_channel4"] > 0 && e["values_token4"] > 20 * e["values_token8"]) }' "$out" ||
    fail "rounding: $(cat "$out")"
run 0 bench rounding -c "$context" --queries 1
out_has "keys less their centroid, turned" "values by token"
run 1 bench rounding -c "$folder/again.sqz.gguf"
err_has "rounded already"
run 2 bench rounding
err_has "no context"

run 0 inspect "$context" --layer 0
out_has "layer 0 alone"
run 0 inspect "$context" --layer 0 --json
json_in layer 0 0
run 2 inspect "$context" --layer 5000
err_has "--layer 5000: the context has layers 0 to"

if command -v gnuplot >/dev/null; then
    run 0 inspect "$context" --plot "$folder/box/it's a picture.png"
    box_holds "it's a picture.png"
    [ "$(head -c 4 "$folder/box/it's a picture.png" | od -An -tx1 | tr -d ' ')" = 89504e47 ] || fail "wanted a PNG"
    run 0 inspect "$context" --plot "$folder/box/p.svg"
    grep -q "keys in a cluster" "$folder/box/p.svg" || fail "wanted labelled axes"
    grep -q "share of the KV bytes read (%)" "$folder/box/p.svg" || fail "wanted labelled axes"
    grep -q "attention mass lost (%)" "$folder/box/p.svg" || fail "wanted labelled axes"
    rm -f "$folder/box/"*
fi
label="inspect --plot without gnuplot"
code=0
program=$(realpath "$program")
PATH=$folder/box "$program" inspect "$context" --plot "$folder/box/p.png" >"$out" 2>"$err" || code=$?
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
err_has "gnuplot" "install"
box_holds ""
run 1 inspect "$context" --plot "$folder/none/p.png"
err_has "its folder is not there"
run 0 prepare -q "$folder/book.txt" --levels 0 -o "$folder/dense.sqz.gguf"
run 1 inspect "$folder/dense.sqz.gguf" --plot "$folder/box/p.png"
err_has "nothing to draw"
finish
