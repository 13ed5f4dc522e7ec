#!/usr/bin/env bash
# needs: model. Control characters of names, out of files or of files, reach no terminal.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
mkdir "$folder/box"
evil=$'evil\033[31m\a\n\xc2\x9b31m\xe2\x80\xaetxt.\x7f'

# Lines and tabs belong to tables and answers; nothing else below U+0020, no DEL, no C1, no override may be there.
plain() {
    local file
    for file in "$out" "$err"; do
        ! LC_ALL=C grep -qP '[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]' "$file" ||
            fail "control characters in $(basename "$file")"
    done
}

write_document "$folder/box/$evil" 1200
run 0 prepare "$folder/box/$evil" -o "$folder/box/$evil.gguf"
plain
out_has "evil?[31m? ?31m?txt.?.gguf: "
run 0 inspect "$folder/box/$evil.gguf"
plain
out_has "document   evil?[31m? ?31m?txt.?"
run 0 inspect --json "$folder/box/$evil.gguf"
plain
out_has '"source": "evil\u001B[31m\u0007\n\u009b31m\u202etxt.\u007f"'
run 1 ask "$folder/none $evil" "Who?"
plain
err_has "none evil?[31m? ?31m?txt.?: cannot be opened"
run 2 "$evil"
plain
run 2 inspect --layer "$evil" "$folder/box/$evil.gguf"
plain
run 1 chat -m "$folder/none $evil" "$folder/box/$evil.gguf"
plain

# A model whose architecture is an escape sequence: a GGUF of one key.
printf 'GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\24\0\0\0\0\0\0\0general.architecture\10\0\0\0\11\0\0\0\0\0\0\0\33[31mevil' \
    >"$folder/model.gguf"
run 1 analyze -m "$folder/model.gguf"
plain
err_has "?[31mevil"
run 1 ask -m "$folder/model.gguf" "$folder/box/$evil.gguf" "Who?"
plain
run 1 inspect "$folder/model.gguf"
plain

# What a parser says of a data set.
printf '{"input": "%s\n' "$evil" >"$folder/$evil.jsonl"
run 1 eval "$folder/$evil.jsonl"
plain
finish
