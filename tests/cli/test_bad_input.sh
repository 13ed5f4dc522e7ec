#!/usr/bin/env bash
# needs: model. Documents, models and contexts that cannot be used: what is said, the exit code, nothing left behind.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
mkdir "$folder/box"
box=$folder/box

# ---- Documents
: >"$folder/empty.txt"
run 1 prepare "$folder/empty.txt" -o "$box/c.sqz.gguf"
err_has "squeeze prepare: " "empty"
printf 'caf\xe9 au lait' >"$folder/latin1.txt"
run 1 prepare "$folder/latin1.txt" -o "$box/c.sqz.gguf"
err_has "UTF-8"
head -c 5000 /dev/zero >"$folder/zeros.txt"
code=0
"$program" prepare -q "$folder/zeros.txt" -o "$folder/zeros.sqz.gguf" >"$out" 2>"$err" || code=$?
label="squeeze prepare of 5,000 zero bytes"
[ "$code" -le 1 ] || fail "exit code: got $code, wanted 0 or 1"
cat /usr/share/common-licenses/GPL-3 /usr/share/common-licenses/GPL-3 >"$folder/long.txt"
run 1 prepare "$folder/long.txt" -o "$box/c.sqz.gguf"
err_has "--truncate" "--rope-scale" "tokens"
grep -qE '[0-9]+ tokens too long' "$err" || fail "wanted by how many tokens it is too long"
run 1 prepare "$folder" -o "$box/c.sqz.gguf"
err_has "Is a directory"
box_holds ""

# ---- Models
write_document "$folder/book.txt" 1500
printf 'not a model at all, only text that is long enough to hold a header' >"$folder/text.gguf"
run 1 prepare -m "$folder/text.gguf" "$folder/book.txt" -o "$box/c.sqz.gguf"
err_has "text.gguf" "GGUF"
run 1 prepare -m "$folder/none.gguf" "$folder/book.txt" -o "$box/c.sqz.gguf"
err_has "none.gguf" "No such file or directory"
head -c 1000000 "$SQUEEZE_MODEL" >"$folder/half.gguf"
run 1 prepare -m "$folder/half.gguf" "$folder/book.txt" -o "$box/c.sqz.gguf"
err_has "half.gguf"
# The architecture's name is a string value behind its key: 4 bytes of type, 8 of length, then "llama".
cp "$SQUEEZE_MODEL" "$folder/model.gguf"
chmod u+w "$folder/model.gguf"
key=$(grep -abom1 'general\.architecture' "$folder/model.gguf" | head -n 1 | cut -d: -f1)
[ "$(tail -c +"$((key + 33))" "$folder/model.gguf" | head -c 5)" = llama ] || fail "wanted a llama model to patch"
put_bytes "$folder/model.gguf" "$((key + 32))" mamba
run 1 prepare -m "$folder/model.gguf" "$folder/book.txt" -o "$box/c.sqz.gguf"
err_has "mamba"
put_bytes "$folder/model.gguf" "$((key + 32))" llama
box_holds ""

# ---- Contexts of another model: the last byte of the last tensor differs
run 0 prepare -q "$folder/book.txt" -o "$folder/good.sqz.gguf"
run 0 ask -m "$folder/model.gguf" "$folder/good.sqz.gguf" "Who?" --max-tokens 2
last=$(($(stat -c %s "$folder/model.gguf") - 1))
byte=$(tail -c 1 "$folder/model.gguf" | od -An -tu1 | tr -d ' ')
put_bytes "$folder/model.gguf" "$last" "\\x$(printf %02x $(((byte + 1) % 256)))"
run 1 ask -m "$folder/model.gguf" "$folder/good.sqz.gguf" "Who?"
err_has "squeeze ask: " "another model"
rm "$folder/model.gguf"

# ---- Damaged contexts; bad NAME MESSAGE: that file must be refused by every reader
bad() {
    run 1 inspect "$folder/$1"
    err_has "$1" "$2"
    run 1 ask "$folder/$1" "Who?"
    err_has "$1" "$2"
    run 1 chat "$folder/$1"
    err_has "$1" "$2"
    run 1 prepare --from "$folder/$1" -o "$box/c.sqz.gguf"
    err_has "$1" "$2"
}
size=$(stat -c %s "$folder/good.sqz.gguf")
: >"$folder/nothing"
bad nothing ""
bad text.gguf ""
for bytes in 3 10 24 100 4000 $((size / 2)) $((size - 1)); do
    head -c "$bytes" "$folder/good.sqz.gguf" >"$folder/cut"
    bad cut ""
done
run 1 inspect "$SQUEEZE_MODEL"
err_has "not a prepared context"
run 1 inspect "$folder"
err_has "$folder"

# flip OFFSET: one bit of a copy.
flip() {
    local byte
    cp "$folder/good.sqz.gguf" "$folder/flipped"
    byte=$(tail -c +"$(($1 + 1))" "$folder/good.sqz.gguf" | head -c 1 | od -An -tu1 | tr -d ' ')
    put_bytes "$folder/flipped" "$1" "\\x$(printf %02x $((byte ^ 4)))"
}
for offset in 0 4 8 16 24 $((size / 3)) $((size / 2)) $((size * 3 / 4)); do
    flip "$offset"
    bad flipped ""
done
# Counts of tensors (byte 8) and of metadata (byte 16) beyond any file.
for offset in 8 16; do
    for count in '\xff\xff\xff\xff\xff\xff\xff\xff' '\xff\xff\xff\xff\xff\xff\xff\x7f' \
        '\x00\x00\x00\x00\x01\x00\x00\x00'; do
        cp "$folder/good.sqz.gguf" "$folder/huge"
        put_bytes "$folder/huge" "$offset" "$count"
        bad huge ""
    done
done
box_holds ""
run 0 inspect "$folder/good.sqz.gguf"
finish
