#!/usr/bin/env bash
# needs: model. The files of a model: shards, all of them part of its fingerprint; what is no regular file.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
make_model=${SQUEEZE_SOURCE:?}/tests/make_model.py
write_document "$folder/book.txt" 1000
"$make_model" "$SQUEEZE_MODEL" "$folder/m" --layers 2 --shards 3 || exit 1
first=$folder/m-00001-of-00003.gguf second=$folder/m-00002-of-00003.gguf third=$folder/m-00003-of-00003.gguf
context=$folder/book.sqz.gguf
ask=(ask "$context" "Who may copy it?" --max-tokens 2 -m "$first")

run 0 prepare -q "$folder/book.txt" -m "$first"
run 0 "${ask[@]}"

# Shards elsewhere, of another name, are the same model.
mkdir "$folder/box"
for i in 1 2 3; do
    ln -s "$folder/m-0000$i-of-00003.gguf" "$folder/box/other-0000$i-of-00003.gguf"
done
run 0 ask "$context" "Who may copy it?" --max-tokens 2 -m "$folder/box/other-00001-of-00003.gguf"

# One byte of one tensor of the last shard.
cp "$third" "$folder/third"
put_bytes "$third" $(($(stat -c %s "$third") - 5000)) '\x55\xaa\x55'
run 1 "${ask[@]}"
err_has "prepared with another model"
cp "$folder/third" "$third"
run 0 "${ask[@]}"

cp "$second" "$third"
run 1 "${ask[@]}"
err_has "$third: part 2 of 3: part 3 of 3 is wanted under this name"
rm "$third"
run 1 "${ask[@]}"
err_has "$third: No such file or directory: part 3 of the 3 files of this model is missing"
mkfifo "$third"
run 1 "${ask[@]}"
err_has "$third: it is a pipe; a model is a regular file"
run 1 prepare -q "$folder/book.txt" -m "$second" -o "$folder/x.sqz.gguf"
err_has "this is part 2 of a model of 3 files: give the first, whose name ends in -00001-of-00003.gguf"
cp "$first" "$folder/renamed.gguf"
run 1 prepare -q "$folder/book.txt" -m "$folder/renamed.gguf" -o "$folder/x.sqz.gguf"
err_has "its name must end in -00001-of-00003.gguf"

# Nothing waits for a pipe, or reads a device for ever.
mkfifo "$folder/pipe"
for path in "$folder/pipe" "$folder" /dev/zero; do
    run 1 analyze -m "$path"
    err_has "$path: it is a" "a model is a regular file"
    run 1 prepare "$folder/book.txt" -m "$path" -o "$folder/x.sqz.gguf"
    err_has "$path: it is a" "a model is a regular file"
done
finish
