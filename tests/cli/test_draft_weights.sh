#!/usr/bin/env bash
# needs: model python3. Weights in 4 bits that draft exact answers: made once and kept, refused where they cannot be.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
make_model=${SQUEEZE_SOURCE:?}/tests/make_model.py
model=$folder/model-f16.gguf other=$folder/other.gguf
"$make_model" "$SQUEEZE_MODEL" "$model" --layers 2 --f16 || exit 1
"$make_model" "$SQUEEZE_MODEL" "$other" --layers 3 --f16 || exit 1
write_document "$folder/book.txt" 9000
context=$folder/book.sqz.gguf
run 0 prepare -q -m "$model" "$folder/book.txt"
exact=(ask "$context" "What is it about?" -m "$model" --max-tokens 24 --exact f16 --draft self --draft-tokens 3 --draft-steady)
export SQUEEZE_CACHE=$folder/cache

run 0 "${exact[@]}" # by the model's own weights
cp "$out" "$folder/own"
run 0 "${exact[@]}" --draft-weights 4bit
equal_files "$out" "$folder/own"
err_has "making 4-bit weights that draft, once, kept as $folder/cache/models/model-f16-"
made=("$folder"/cache/models/*)
[ ${#made[@]} -eq 1 ] || fail "wanted one file beside the default model, found ${made[*]}"
[ "$(($(stat -c %s "${made[0]}") * 2))" -lt "$(stat -c %s "$model")" ] || fail "they are not half as large"
stamp=$(stat -c %y "${made[0]}")
run 0 "${exact[@]}" --draft-weights 4bit --json
json_in n_drafted 1 100
[ "$(stat -c %y "${made[0]}")" = "$stamp" ] || fail "the weights were made again"
run 0 "${exact[@]}" --draft-weights "${made[0]}"
equal_files "$out" "$folder/own"

# What cannot draft.
run 1 "${exact[@]}" --draft-weights "$other"
err_has "$other" "3 layers where the model has 2" "a file of the same model in fewer bits"
run 1 "${exact[@]}" --draft-weights "$folder/book.txt"
err_has "book.txt"
run 1 "${exact[@]}" --draft-weights "$folder/nowhere.gguf"
err_has "nowhere.gguf" "No such file"
run 2 ask "$context" "What?" -m "$model" --draft-weights 4bit
err_has "only exact answers are drafted"
run 2 "${exact[@]}" --draft ngram --draft-weights 4bit
err_has "the text drafts"

# Of weights with few bits, and where nothing can be written, nothing is left.
write_document "$folder/short.txt" 2000
run 0 prepare -q "$folder/short.txt"
run 1 ask "$folder/short.sqz.gguf" "What?" -m "$SQUEEZE_MODEL" --exact f16 --draft-weights 4bit
err_has "bits each as they are" "for example F16 or Q8_0"
[ "$(ls "$folder/cache/models")" = "${made[0]##*/}" ] || fail "something was left: $(ls "$folder/cache/models")"
rm -r "$folder/cache"
echo >"$folder/cache"
run 1 "${exact[@]}" --draft-weights 4bit
err_has "cannot be written"
rm "$folder/cache"
finish
