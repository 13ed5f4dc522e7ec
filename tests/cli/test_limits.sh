#!/usr/bin/env bash
# needs: model. No disk, no permission, no memory: a message, exit code 1, the old file intact, nothing left behind.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
mkdir "$folder/box"
write_document "$folder/book.txt" 3000
context=$folder/box/book.sqz.gguf
run 0 prepare -q "$folder/book.txt" -o "$folder/good.sqz.gguf"
cp "$folder/good.sqz.gguf" "$context"

# ---- Unwritable output
run 1 prepare -q "$folder/book.txt" -o "$folder/none/c.sqz.gguf"
err_has "squeeze prepare: " "none" "its folder is not there; make it first"
mkdir "$folder/folder.sqz.gguf"
run 2 prepare -q "$folder/book.txt" -o "$folder/folder.sqz.gguf"
err_has "folder.sqz.gguf" "is a folder"
if [ "$(id -u)" -ne 0 ]; then
    chmod a-w "$folder/box"
    run 1 prepare -q "$folder/book.txt" -o "$context"
    err_has "Permission denied"
    chmod u+w "$folder/box"
fi
run 1 prepare -q "$folder/book.txt" -o /proc/c.sqz.gguf
err_has "/proc/c.sqz.gguf"
box_holds book.sqz.gguf
equal_files "$context" "$folder/good.sqz.gguf"

# ---- Disk full: a limit of 200 KiB a file, which every machine can set, and a small disk of our own where we may mount
label="prepare with a file-size limit"
code=0
(ulimit -f 200 && exec "$program" prepare -q "$folder/book.txt" -o "$context") >"$out" 2>"$err" </dev/null || code=$?
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
err_has "book.sqz.gguf" "ulimit -f"
box_holds book.sqz.gguf
equal_files "$context" "$folder/good.sqz.gguf"
mkdir "$folder/disk"
if mount -t tmpfs -o size=24m squeeze-test "$folder/disk" 2>/dev/null; then
    trap 'umount "$folder/disk"; rm -rf "$folder"' EXIT
    cp "$folder/good.sqz.gguf" "$folder/disk/c.sqz.gguf"
    run 1 prepare -q "$folder/book.txt" -o "$folder/disk/c.sqz.gguf"
    err_has "No space left on device"
    equal_files "$folder/disk/c.sqz.gguf" "$folder/good.sqz.gguf"
    [ "$(find "$folder/disk" -mindepth 1 | wc -l)" -eq 1 ] || fail "left behind: $(ls -A "$folder/disk")"
fi

# ---- Memory. Every limit must end in a message or in success, never in a crash.
# limited KIB ARGUMENTS...
limited() {
    local limit=$1 code=0
    shift
    label="squeeze $* with $limit KiB of address space"
    (ulimit -v "$limit" && ulimit -c 0 && exec "$program" "$@") >"$out" 2>"$err" </dev/null || code=$?
    [ "$code" -le 1 ] || fail "exit code: got $code, wanted 0 or 1"
    [ "$code" -eq 0 ] || err_has "squeeze"
    memory_code=$code
}
head -c 60000000 /dev/zero | tr '\0' 'a' >"$folder/wide.txt"
limited 60000 prepare "$folder/wide.txt" -o "$folder/box/c.sqz.gguf"
[ "$memory_code" -eq 1 ] || fail "60 MB of text in 60 MB of address space: got $memory_code, wanted 1"
limited 60000 inspect "$folder/good.sqz.gguf"
failed=0
for limit in 100000 200000 300000 400000; do
    limited "$limit" prepare -q --threads 1 "$folder/book.txt" -o "$context"
    failed=$((failed + memory_code))
    limited "$limit" ask --threads 1 "$folder/good.sqz.gguf" "Who?" --max-tokens 2
done
[ "$failed" -gt 0 ] || fail "no limit was too small: the test shows nothing"
box_holds book.sqz.gguf
finish
