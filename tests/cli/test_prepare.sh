#!/usr/bin/env bash
# needs: model. Preparing: where the file goes, what is printed, what another rule or seed changes, what stays.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"
write_document "$folder/box/book.txt" 3000

run 0 prepare "$folder/box/book.txt"
out_has "box/book.sqz.gguf" "tokens" "room left for question and answer"
box_holds book.txt book.sqz.gguf
[ "$(head -c 4 "$folder/box/book.sqz.gguf")" = GGUF ] || fail "wanted a GGUF file"
err_has "read"

run 0 prepare "$folder/box/book.txt" -q -o "$folder/box/again.sqz.gguf"
if [ -s "$out" ] || [ -s "$err" ]; then fail "-q must print nothing"; fi
equal_files "$folder/box/book.sqz.gguf" "$folder/box/again.sqz.gguf"

input=$folder/box/book.txt run 0 prepare - -o "$folder/box/again.sqz.gguf" --json
json_in n_document_tokens 300 1500
json_in n_context_tokens 300 1600
json_in n_left_tokens 1000 8192
json_in seconds 0.01 600
for key in file_bytes read_seconds cluster_seconds calibrate_seconds write_seconds; do
    json_in "$key" 0 1e12
done
out_has '"command": "squeeze prepare - -o' '"rule": "default"'
[ "$(json file_bytes)" = "$(stat -c %s "$folder/box/again.sqz.gguf")" ] || fail "file_bytes is not the file's size"

# Clustered anew, without the model.
cp "$folder/box/book.sqz.gguf" "$folder/before"
SQUEEZE_MODEL='' run 0 prepare --from "$folder/box/book.sqz.gguf" --rule paper --levels 2 \
    -o "$folder/box/paper.sqz.gguf"
equal_files "$folder/before" "$folder/box/book.sqz.gguf"
run 0 inspect "$folder/box/paper.sqz.gguf" --json
out_has '"rule": "paper"' '"levels": 2' '"metric": "cosine"' '"tail": false' '"code_words": 0'
run 0 inspect "$folder/box/book.sqz.gguf" --json
out_has '"rule": "default"' '"code_words": 2'
# The same options on the way over --from give the same clusters.
SQUEEZE_MODEL='' run 0 prepare --from "$folder/box/paper.sqz.gguf" -q -o "$folder/box/back.sqz.gguf"
run 0 inspect "$folder/box/back.sqz.gguf" --json
grep -vE '"(file|source)"' "$out" >"$folder/back"
run 0 inspect "$folder/box/book.sqz.gguf" --json
grep -vE '"(file|source)"' "$out" >"$folder/book"
equal_files "$folder/back" "$folder/book"

# Options are recorded.
run 0 prepare "$folder/box/book.txt" -q -o "$folder/box/paper.sqz.gguf" --no-tail --no-center --no-per-head --sinks 4 \
    --window 8 --iterations 3 --metric cosine --group max --seed 9 --centroids 0.1,0.02 --code-words 3 --raw
run 0 inspect "$folder/box/paper.sqz.gguf" --json
out_has '"tail": false' '"center": false' '"per_head": false' '"sinks": 4' '"window": 8' '"iterations": 3' \
    '"metric": "cosine"' '"group": "max"' '"seed": 9' '"levels": 2' '"template": false' '"code_words": 3'
run 0 inspect "$folder/box/paper.sqz.gguf"
out_has "3 words of code a key"
run 0 prepare "$folder/box/book.txt" -q -o "$folder/box/paper.sqz.gguf" --levels 0
run 0 inspect "$folder/box/paper.sqz.gguf"
out_has "not clustered"

# Truncation and room.
run 0 prepare "$folder/box/book.txt" -o "$folder/box/paper.sqz.gguf" --truncate 200 --json
json_in n_context_tokens 150 200
err_has "were cut to a context of"
run 0 prepare "$folder/box/book.txt" -o "$folder/box/paper.sqz.gguf" --reserve 8000
err_has "tokens are left for question and answer, 8000 were asked for"
run 0 prepare "$folder/box/book.txt" -o "$folder/box/paper.sqz.gguf" --rope-scale 2 --json
json_in n_left_tokens 14000 16384
run 0 ask "$folder/box/paper.sqz.gguf" "Who holds the copyright?" --max-tokens 4

# Not over its own input, and nothing left over.
cp "$folder/box/book.txt" "$folder/before"
run 2 prepare "$folder/box/book.txt" -o "$folder/box/book.txt"
err_has "which is read"
equal_files "$folder/before" "$folder/box/book.txt"
box_holds book.txt book.sqz.gguf again.sqz.gguf paper.sqz.gguf back.sqz.gguf
finish
