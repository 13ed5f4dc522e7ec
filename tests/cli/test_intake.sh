#!/usr/bin/env bash
# needs: model. Texts on their way in, by every route: one form, files that are no text and the commands that are
# recommended for them, several questions of which one is bad, outputs that cannot be written.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
cd "$folder" || exit 1
mkdir box
text="The lighthouse at Grey Point was built in 1874 by Ida Morrow, who kept it for thirty years."
for i in 1 2 3 4; do printf '%s\nIts lamp burned %d litres of oil a night, & was lit at dusk.\n' "$text" "$i"; done >doc.txt
context=c.sqz.gguf
run 0 prepare -q --json doc.txt -o $context
tokens=$(json n_document_tokens)

# ---- Documents: one form
sed 's/$/\r/' doc.txt >crlf.txt
{ printf '\xef\xbb\xbf'; cat doc.txt; } >mark.txt
printf '%s' "$(cat doc.txt)" >no-end.txt
for file in crlf.txt mark.txt no-end.txt; do
    run 0 prepare -q --json $file -o other.sqz.gguf --levels 0
    json_in n_document_tokens "$tokens" "$tokens"
done

# ---- Documents that are no text: named, and the command works where its program is
# unfit FILE PART...: refused with the parts and nothing written; $command is what is recommended.
unfit() {
    local file=$1
    shift
    run 1 prepare "$file" -o box/x.sqz.gguf
    err_has "$file" "$@"
    err_lines 1
    box_holds ""
    command=$(sed -n 's/.*[:;] \(.*\) | squeeze prepare - -o box\/x.sqz.gguf$/\1/p' "$err")
}
# gives FILE PART...: the same, and its command prints the document.
gives() {
    unfit "$@"
    command -v "${command%% *}" >/dev/null || return 0
    label=$command
    [ -n "$command" ] && bash -c "$command" >"$out" 2>"$err" </dev/null || fail "the command recommended for $1"
    out_has "$text"
}
iconv -f UTF-8 -t UTF-16 doc.txt >utf16.txt
gives utf16.txt "UTF-16"
iconv -f UTF-8 -t UTF-16LE doc.txt >utf16le.txt
gives utf16le.txt "UTF-16" "UTF-16LE"
iconv -f UTF-8 -t UTF-16BE doc.txt >"a utf16be'.txt"
gives "a utf16be'.txt" "UTF-16"
iconv -f UTF-8 -t UTF-32 doc.txt >utf32.txt
gives utf32.txt "UTF-32"
{ cat doc.txt; printf 'caf\xe9\n'; } >latin1.txt
gives latin1.txt "not UTF-8: byte 0xe9 at offset $(($(stat -c %s doc.txt) + 3))"
{ cat doc.txt; printf 'caf\xc3\xa9 caf\xc3\xa9 caf\xc3\n'; } >damaged.txt
gives damaged.txt "damaged"
{ cat doc.txt; printf 'a\0b\n'; } >nul.txt
gives nul.txt "NUL byte at offset $(($(stat -c %s doc.txt) + 1))"
for program_of in gzip bzip2 xz zstd; do
    command -v $program_of >/dev/null || continue
    $program_of -c doc.txt >packed
    gives packed "compressed by $program_of"
done
tar -cf docs.tar doc.txt
gives docs.tar "tar archive"
{ printf '{\\rtf1\\ansi '; cat doc.txt; echo '}'; } >doc.rtf
gives doc.rtf RTF
xml_text="<w:p><w:t>${text}</w:t></w:p><w:p><w:t>A &amp; B</w:t></w:p>"
if command -v python3 >/dev/null; then
    # zip_of FILE NAME TEXT: an archive with one member, as office programs write theirs.
    zip_of() {
        python3 -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as z:
    if sys.argv[4:]: z.writestr("mimetype", sys.argv[4], zipfile.ZIP_STORED)
    z.writestr(sys.argv[2], sys.argv[3])
    for n in ("xl/workbook.xml", "ppt/presentation.xml"):
        if n.split("/")[0] == sys.argv[2].split("/")[0]: z.writestr(n, "<x/>")' "$@"
    }
    zip_of doc.docx word/document.xml "$xml_text"
    gives doc.docx "Word"
    zip_of doc.xlsx xl/sharedStrings.xml "$xml_text"
    gives doc.xlsx "Excel"
    zip_of doc.pptx ppt/slides/slide1.xml "$xml_text"
    gives doc.pptx "PowerPoint"
    zip_of doc.odt content.xml "$xml_text" application/vnd.oasis.opendocument.text
    gives doc.odt "OpenDocument"
    zip_of doc.epub text/1.xhtml "$xml_text" application/epub+zip
    gives doc.epub "EPUB"
    zip_of docs.zip doc.txt "$text"
    gives docs.zip "ZIP"
fi
# A page with the text, in plain ASCII.
{
    printf '%%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n'
    printf '2 0 obj\n<< /Type /Pages /Kids [3 0 R] /Count 1 >>\nendobj\n3 0 obj\n<< /Type /Page /Parent 2 0 R '
    printf '/MediaBox [0 0 900 200] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>\nendobj\n'
    printf '4 0 obj\n<< /Length %d >>\nstream\nBT /F 12 Tf 40 100 Td (%s) Tj ET\nendstream\nendobj\n' \
        $((${#text} + 32)) "$text"
    printf '5 0 obj\n<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>\nendobj\n'
    printf 'trailer\n<< /Root 1 0 R >>\n%%%%EOF\n'
} >doc.pdf
gives doc.pdf "PDF"
printf '\x89PNG\r\n\x1a\n\0\0' >image
unfit image "PNG" tesseract
unfit "$context" "a prepared context" "ask and chat"
ln -s "$SQUEEZE_MODEL" model
unfit model "a GGUF model" "-m"
printf '\xe2\x80\x8b\xc2\xa0\n' >unseen.txt
unfit unseen.txt "empty"

# ---- Documents without a name of their own
mkfifo pipe
run 2 prepare pipe
err_has "-o FILE is needed" "pipe"
input=doc.txt run 2 prepare /dev/stdin
err_has "-o FILE is needed"
label="squeeze prepare <(...)"
code=0
bash -c '"$1" prepare <(cat doc.txt)' _ "$program" >"$out" 2>"$err" || code=$?
[ "$code" -eq 2 ] || fail "exit code: got $code, wanted 2"
err_has "-o FILE is needed"

# ---- Questions: one answer by every route
asked="Who built the lighthouse?"
run 0 ask $context "$asked" --max-tokens 6
cp "$out" answer
run 0 ask $context "  $asked"$'\n' --max-tokens 6
equal_files "$out" answer
for end in '' '\n' '\r\n' '\r\n\r\n'; do
    printf "%s$end" "$asked" >question
    input=question run 0 ask $context - --max-tokens 6
    equal_files "$out" answer
    input=question run 0 chat $context --max-tokens 6
    equal_files "$out" answer
done
printf '\xef\xbb\xbf%s' "$asked" >question
input=question run 0 ask $context - --max-tokens 6
equal_files "$out" answer
printf 'Who built\0 it?\n' >question
input=question run 1 ask $context -
err_has "the question has a NUL byte at offset 9" "| squeeze ask $context -"
{ cat question; echo "$asked"; printf '/stats\0\n'; } >questions
input=questions run 1 chat $context --max-tokens 6
err_has "line 1 has a NUL byte at offset 9" "line 3 has a NUL byte"
equal_files "$out" answer
run 2 ask $context - -
err_has "standard input can be read only once"

# ---- One bad question costs the others nothing
run 1 ask $context "$asked" "" $'caf\xe9' "$asked" --max-tokens 6
err_has "question 2 is empty" "question 3 is not UTF-8" "question 4: the answer was cut off after 6 tokens"
{ cat answer; echo; cat answer; } >both
equal_files "$out" both
awk 'BEGIN { for (i = 0; i < 9000; i++) printf "word " }' >long
input=long run 1 ask $context - "$asked" --max-tokens 6 --json --budget 1
err_has "question 1: " "tokens"
err_lines 1
[ "$(grep -c '"error": ".*tokens' "$out")" -eq 1 ] || fail "wanted one error beside the answer"
[ "$(grep -c '"end": "max-tokens"' "$out")" -eq 1 ] || fail "wanted one answer"
run 1 ask $context --json ""
out_has '"error": "the question is empty'

# ---- chat: questions that begin with a slash
printf '/etc?\n//etc?\n /help\r\n' >questions
input=questions run 0 chat $context --max-tokens 6
err_has "no command /etc?" "//etc? asks it"
out_has "//..."
grep -v -e '^/' "$out" >slash
run 0 ask $context "/etc?" --max-tokens 6
head -n "$(wc -l <"$out")" slash >first
equal_files "$out" first
printf '%s' "$asked" >question # the input ends in a line
input=question run 0 chat $context --max-tokens 6
equal_files "$out" answer

# At a terminal, lines that are pasted together are one question.
if command -v script >/dev/null; then
    run 0 ask $context "Who built it"$'\n'"and when?" --max-tokens 6
    tail -n 1 "$out" >pasted
    label="several lines pasted into a chat at a terminal"
    : >"$out"
    {
        until_said "tokens of context"
        printf 'Who built it\nand when?\n'
        until_said "cut off after"
        printf '/stats\n'
        until_said "last answer: read"
        printf '/quit\n'
        sleep 2
    } |
        script -qec "'$program' chat $context --max-tokens 6" /dev/null >"$out" 2>"$err" || fail "exit code: got $?"
    [ "$(grep -c 'cut off after' "$out")" -eq 1 ] || fail "wanted one answer"
    out_has "$(cat pasted)"
fi

# ---- Outputs that cannot be written
for arguments in "ask $context Who --max-tokens 2" "ask $context Who --max-tokens 2 --json" "chat $context" \
    "inspect $context" "inspect $context --json" "cpu" "--version" "--help"; do
    label="squeeze $arguments, standard output /dev/full"
    code=0
    # shellcheck disable=SC2086
    "$program" $arguments >/dev/full 2>"$err" <question || code=$?
    [ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
    err_has "cannot write to standard output: No space left on device"
done
finish
