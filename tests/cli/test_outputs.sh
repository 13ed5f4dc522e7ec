#!/usr/bin/env bash
# needs: model. Places to write to: what is an input, not ours or not writable is refused before any work, whatever the
# command, and nothing of it is touched.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box" "$folder/in"
box=$folder/box
printf '{"document": "%s", "questions": ["Who?"], "answers": ["Ida."]}\n' \
    "$(printf 'The lamp was lit by Ida Morrow in the year %d. ' {1..40})" >"$folder/in/d.jsonl"
ln -s d.jsonl "$folder/in/link.jsonl"
ln "$folder/in/d.jsonl" "$folder/in/hard.jsonl"
ln -s nowhere "$folder/in/dangling"
printf 'notes of mine\n' >"$folder/in/notes.txt"
printf '<html><svg></svg></html>\n' >"$folder/in/page.svg"
mkfifo "$folder/in/pipe.svg"
cp -a "$folder/in" "$folder/before"

# refused CODE MESSAGE COMMAND...: with every input as it was, nothing made, and before the model was opened.
refused() {
    local code=$1 message=$2
    shift 2
    run "$code" "$@"
    err_has "$message"
    err_lines 1
    diff -r --no-dereference --exclude=pipe.svg "$folder/in" "$folder/before" >/dev/null || fail "an input was changed"
    box_holds ""
}
model=$SQUEEZE_MODEL
# A model that is none: whoever gets as far as opening it says so.
export SQUEEZE_MODEL=$folder/in/notes.txt
cd "$folder/in" || exit 1
for name in d.jsonl ./d.jsonl link.jsonl hard.jsonl "$folder/in/d.jsonl"; do
    refused 2 "--record $name is d.jsonl, which is read" eval d.jsonl --record "$name"
done
refused 2 "--record notes.txt is $folder/in/notes.txt, which is read" eval d.jsonl --record notes.txt
refused 2 "--plot page.svg: the file there is not a picture" eval d.jsonl --plot page.svg
refused 2 "is not a regular file" eval d.jsonl --maps pipe.svg
refused 2 "--record new/: the name of a folder" eval d.jsonl --record new/
refused 2 "--record $box: is a folder" eval d.jsonl --record "$box"
refused 1 "--record dangling: a symbolic link that leads nowhere" eval d.jsonl --record dangling
refused 1 "--record no/where/r: its folder is not there; make it first: mkdir -p no/where/" \
    eval d.jsonl --record no/where/r
refused 1 "make it first: mkdir -p 'it'\\''s new/'" eval d.jsonl --record "it's new/r"
refused 1 "--plot no/p.svg: its folder is not there" eval d.jsonl --plot no/p.svg
refused 1 "--maps no/p.svg: its folder is not there" eval d.jsonl --maps no/p.svg
refused 1 "notes.txt/r: Not a directory" eval d.jsonl --record notes.txt/r
refused 1 "--keep no/kept: its folder is not there" eval d.jsonl --keep no/kept
refused 2 "--keep page.svg: there is a file of that name" compare d.jsonl --keep page.svg
refused 2 "--plot and --maps both write $box/p.svg" eval d.jsonl --plot "$box/p.svg" --maps "$box/p.svg"
refused 1 "--plot no/p.svg: its folder" inspect c.sqz.gguf --plot no/p.svg
refused 2 "--plot page.svg: the file there" analyze --plot page.svg
refused 2 "--plot page.svg: the file there" bench kernels --plot page.svg
refused 2 "--write-keys notes.txt is notes.txt, which is read" bench cluster --keys notes.txt --write-keys notes.txt
refused 2 "--write-assignment notes.txt: a file is there" bench cluster --write-assignment notes.txt
refused 2 "-o notes.txt is notes.txt, which is read" prepare notes.txt -o notes.txt
refused 2 "-o d.jsonl: the file there is not a context file" prepare notes.txt -o d.jsonl
refused 1 "-o no/c: its folder is not there" prepare notes.txt -o no/c
input=notes.txt refused 2 "-o notes.txt is standard input, which is read" prepare - -o notes.txt
if [ "$(id -u)" -ne 0 ]; then
    mkdir -m 500 "$folder/closed"
    refused 1 "nothing can be written into its folder" eval d.jsonl --record "$folder/closed/r"
fi
label="eval d.jsonl >>d.jsonl"
code=0
same=d.jsonl
"$program" eval d.jsonl >>"$same" 2>"$err" || code=$?
[ "$code" -eq 2 ] || fail "exit code: got $code, wanted 2"
err_has "standard output is d.jsonl, which is read"
equal_files d.jsonl "$folder/before/d.jsonl"
SQUEEZE_MODEL=$model refused 2 "not a context file" prepare notes.txt -o page.svg
mkdir "$folder/models"
cp "$folder/before/notes.txt" "$folder/models/m.gguf"
SQUEEZE_MODEL=$folder/models/m.gguf refused 2 "which is read" prepare notes.txt -o "$folder/models/m.gguf"
head -c 100000 "$model" >"$folder/models/other.gguf"
refused 2 "not a context file" prepare notes.txt -o "$folder/models/other.gguf"

# Names that differ give contexts of names that differ; what is a context may be replaced, by its own document or -o.
export SQUEEZE_MODEL=$model
for name in report-2024.06 report-2024.07 book.md; do
    printf 'The report %s says that the lamp was lit by Ida Morrow.\n' "$name"{,,,,,,,} >"$box/$name"
done
for name in report-2024.06 report-2024.07 book.md; do
    run 0 prepare -q --threads 1 "$box/$name"
done
box_holds book.md book.sqz.gguf report-2024.06 report-2024.06.sqz.gguf report-2024.07 \
    report-2024.07.sqz.gguf
cp "$box/book.sqz.gguf" "$folder/book"
cp "$box/book.md" "$box/book.TXT"
run 2 prepare -q "$box/book.TXT"
err_has "book.sqz.gguf is there, prepared from another document than book.TXT; choose a name with -o"
equal_files "$box/book.sqz.gguf" "$folder/book"
run 0 prepare -q "$box/book.md"
run 0 prepare -q "$box/book.TXT" -o "$box/book.sqz.gguf"
run 2 prepare --from "$box/book.sqz.gguf" -o "$box/book.sqz.gguf"
err_has "which is read"
: >"$box/empty.sqz.gguf"
run 0 prepare -q --from "$box/book.sqz.gguf" -o "$box/empty.sqz.gguf"
finish
