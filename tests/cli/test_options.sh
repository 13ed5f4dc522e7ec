#!/usr/bin/env bash
# needs: nothing. Help, version and bad command lines: what is said and the exit code. No model is ever opened.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
commands="prepare ask chat inspect compare cpu"

run 2
err_has "Usage: squeeze COMMAND"
run 0 --help
out_has "prepare" "compare" "Examples:"
if grep -q "^  serve " "$out"; then commands="$commands serve"; fi
run 0 --version
out_has "squeeze "
grep -qE '^squeeze [0-9]+\.[0-9]+\.[0-9]+$' "$out" || fail "wanted a version number"
run 2 prepaer
err_has "no command 'prepaer'" "--help"
run 2 help prepaer
err_has "no command 'prepaer'"

manual=${SQUEEZE_SOURCE:-$(dirname "$0")/../..}/docs/squeeze.1
for command in $commands; do
    run 0 "$command" --help
    out_has "Usage: squeeze $command" "Options:" "--help" "Examples:"
    cp "$out" "$folder/long"
    run 0 help "$command"
    equal_files "$out" "$folder/long"
    run 0 "$command" -h
    equal_files "$out" "$folder/long"
    while read -r name; do
        grep -qF -- "\\-\\-${name//-/\\-}" "$manual" || fail "docs/squeeze.1 does not name --$name of $command"
    done < <(sed -n 's/^ *\(-., \)\{0,1\}--\(\[no-\]\)\{0,1\}\([a-z-]*\).*/\3/p' "$folder/long")
    run 2 "$command" --no-such-option
    err_has "squeeze $command: unknown option --no-such-option" "--help"
    err_lines 1
done

# What the manual's lists name is an option: of the command that the section is about, or of one that refers to it.
label="docs/squeeze.1"
for command in $commands eval analyze "bench generate" "bench users" "bench kernels" "bench logits"; do
    read -ra words <<<"$command"
    "$program" "${words[@]}" --list-options
done | cut -f 1 | sort -u >"$folder/known"
grep -A 1 '^\.TP' "$manual" | grep -o '\\-\\-[a-z\-]*[a-z]' | sed 's/\\//g' | sort -u >"$folder/named"
[ "$(wc -l <"$folder/named")" -gt 50 ] || fail "few options in the manual"
unknown=$(comm -13 "$folder/known" "$folder/named" | paste -sd ' ')
# Without the server nothing knows the server's.
[ -z "$unknown" ] || [[ $commands != *serve* ]] || fail "the manual has options that no command knows: $unknown"

# Operands.
run 2 prepare
err_has "no document"
run 2 prepare a b
err_has "too many arguments"
run 2 ask book.sqz.gguf
err_has "an argument is missing" "CONTEXT QUESTION"
run 2 prepare -
err_has "-o FILE is needed" "standard input"
run 2 prepare --from a.sqz.gguf
err_has "-o FILE is needed" "--from"
run 2 prepare --from a.sqz.gguf book.txt -o b
err_has "--from takes no document"

# Budgets.
for bad in 0 1.5 -0.1 nan inf 0x1 "" "0.1 " 0.1x 1e-60 101%; do
    run 2 ask c.sqz.gguf q --budget "$bad"
    err_has "--budget $bad: allowed is more than 0 and at most 1, e.g. 0.1"
    run 2 chat c.sqz.gguf "--budget=$bad"
    err_has "--budget $bad: allowed is more than 0 and at most 1, e.g. 0.1"
done
run 2 compare f.jsonl --budget 0.1,1.5
err_has "--budget 1.5: allowed is more than 0 and at most 1, e.g. 0.1"
for bad in 100% 1 -1 150% x; do
    run 2 ask c.sqz.gguf q --prune "$bad"
    err_has "--prune $bad: allowed is 0% to less than 100%, e.g. 90%"
done
run 2 ask c.sqz.gguf q --prune 90% --budget 0.1
err_has "--budget and --prune"

# Other values.
run 2 ask c.sqz.gguf q --temp hot
err_has "--temp hot: allowed is 0 to 10, e.g. 0.7"
run 2 ask c.sqz.gguf q --top-p 0
err_has "--top-p 0: allowed is more than 0 and at most 1"
run 2 ask c.sqz.gguf q --max-tokens 0
err_has "--max-tokens 0: allowed is a whole number from 1 to"
run 2 ask c.sqz.gguf q -n 99999999999999999999999
err_has "-n 99999999999999999999999: allowed is a whole number"
run 2 ask c.sqz.gguf q --seed 4294967296
err_has "--seed 4294967296: allowed is a whole number from 0 to 4294967295"
run 2 ask c.sqz.gguf q --threads
err_has "--threads needs a value: N"
run 2 ask c.sqz.gguf q --json=yes
err_has "--json takes no value, found 'yes'"
run 2 prepare book.txt --rule papr
err_has "--rule papr: allowed is one of default, paper"
run 2 prepare book.txt --levels 9
err_has "--levels 9: allowed is a whole number from 0 to 8"
run 2 prepare book.txt --centroids 0.01,0.05
err_has "--centroids 0.05: allowed is less than the level below, 0.01"
run 2 prepare book.txt --centroids 0.05,0.01 --levels 1
err_has "--centroids names 2 levels, --levels 1"
run 2 prepare book.txt --rope-scale 0.5
err_has "--rope-scale 0.5: allowed is 1 to"
run 2 prepare book.txt -o ''
err_has "-o needs a text that is not empty"
run 2 inspect c.sqz.gguf --plot picture.gif
err_has "--plot picture.gif" ".png or .svg"

# Options without effect together, from each command's table: named, also in --help, before anything is opened.
# vain NAMES WHERE COMMAND...: the options named, the condition.
vain() {
    local names=$1 where=$2
    shift 2
    run 2 "$@"
    err_has "$names no effect $where: "
    err_lines 1
}
vain "--truncate, --rope-scale, --reserve, --raw have" "with --from" \
    prepare --from c --truncate 100 --rope-scale 2 --raw --reserve 9000 -o o
vain "-m has" "with --from" prepare --from c -m none.gguf -o o
vain "--truncate has" "with --from" prepare --from=c --truncate -o o
vain "--centroids, --metric, --code-words, --no-tail, --seed have" "with --levels 0" \
    prepare book.txt --levels 0 --seed 4 --no-tail --code-words 1 --metric cosine --centroids 0.1
vain "--top-p, --seed have" "with --temp 0" ask c q --seed 7 --top-p 0.5
vain "--seed has" "with --temp 0" chat c --temp 0.0 --seed 7
vain "--draft, --draft-tokens have" "with --exact off" ask c q --draft self --draft-tokens 3
vain "--draft-budget has" "with --draft ngram" ask c q --exact f16 --draft ngram --draft-budget 0.1
vain "--draft-rows has" "with --exact f16" ask c q --exact f16 --draft-rows both
vain "--budget has" "with --exact int8" ask c q --exact int8 --budget 0.2
vain "--draft-rows has" "without --rows" eval f.jsonl --speculate --draft-rows both
vain "--budget has" "with --exact f16" chat c --exact f16 --budget 0.2
run 2 ask c q --exact f32
err_has "--exact f32: allowed is" "int8"
run 2 ask c q --exact f16 --draft-tokens 17
err_has "--draft-tokens 17"
vain "--window has" "with --levels 0" compare f.jsonl --levels 0 --window 9
vain "-b has" "with --levels 0" compare f.jsonl --levels 0 -b 0.2
vain "--answer-tokens has" "with --no-distances" eval f.jsonl --no-distances --answer-tokens 3
vain "--reply-tokens has" "with --no-scores and without --speculate" eval f.jsonl --no-scores --reply-tokens 3
vain "--skip, --prompts have" "without a file" eval --synthetic niah_single:4K --skip 2 --prompts p.json
vain "--document-seed has" "without --synthetic" eval f.jsonl --document-seed 3
vain "--code-words has" "without 'squeezed' in --methods and without 'int4' in --methods" eval f.jsonl --methods paper,quest --code-words 1
vain "--maps has" "without 'squeezed' in --methods" eval f.jsonl --methods quest --maps m.svg
vain "--heads, --compared have" "with 'machines'" analyze machines --heads 4 --compared 3
vain "--shape, --machine have" "with 'asymptotic'" analyze asymptotic --shape llama-2-7b --machine a6000
vain "-q has" "without --context and without --rates here" analyze -q
vain "-t has" "without --context and without --machine here and without --rates here" analyze -t 2
vain "--groups has" "with --keys" bench cluster --keys k.f32 --groups 4
vain "--format has" "without --keys" bench cluster --format f16
run 0 prepare --help
out_has "--model, --truncate, --rope-scale, --reserve, --raw, --gpu-layers, --gpu-memory, --split," "--gpu-copies" \
    "with --from: the context is taken as its model read it" "with --levels 0:"
run 0 ask --help
out_has "--top-p, --seed with --temp 0:"
# Each of them counts alone, and of an option that is given twice the last one.
run 1 ask none.sqz.gguf q --temp 0.5 --top-p 0.5 --seed 7
err_has "none.sqz.gguf"
run 1 ask none.sqz.gguf q --temp 0 --temp 0.5 --seed 7
err_has "none.sqz.gguf"
run 2 ask none.sqz.gguf q --temp 0.5 --temp 0 --seed 7

# Files that are not there.
run 1 prepare "$folder/none.txt"
err_has "none.txt: No such file or directory"
run 1 ask "$folder/none.sqz.gguf" q
err_has "none.sqz.gguf" "No such file or directory"
label="squeeze ask with no model to find"
write_document "$folder/short.txt" 400
code=0
env -u SQUEEZE_MODEL SQUEEZE_CACHE="$folder/empty" "$program" prepare "$folder/short.txt" >"$out" 2>"$err" || code=$?
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
err_has "no model: $folder/empty/models/" "make demo" "-m FILE.gguf"

run 0 cpu
out_has "portable" "llama.cpp" "weights in  CPU" "threads" "proof"
run 0 cpu --json
out_has '"name": "portable"' '"features": [' '"buffers": [' '"proof": '
json_in threads 1 1024
[ "$(grep -c '"chosen": true' "$out")" -eq 1 ] || fail "wanted one chosen variant"

# Standard output that cannot be written.
label="squeeze --help >/dev/full"
code=0
"$program" --help >/dev/full 2>"$err" || code=$?
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
err_has "standard output" "No space left on device"
label="squeeze --help into a closed pipe"
mkfifo "$folder/pipe"
: <"$folder/pipe" &
exec 7>"$folder/pipe"
wait $!
code=0
"$program" --help >&7 2>"$err" || code=$?
exec 7>&-
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
[ ! -s "$err" ] || fail "a reader that went away wants no message"
finish
