#!/usr/bin/env bash
# needs: nothing. bench kernels on small layers: what it prints, that every time was checked first, what it refuses.
# Times mean nothing here; the figures beside them must hang together.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
input=/dev/null

# rows: one line a row of the JSON output: its members as name=value, sorted by nothing, separated by blanks.
rows() {
    awk '/^    \{/ { row = ""; inside = 1; next }
         /^    \}/ { if (inside) print row; inside = 0; next }
         inside { line = $0; gsub(/^ *"|,$|"/, "", line); sub(/: /, "=", line); row = row " " line }' "$out"
}
# row_of PATTERN...: the rows that hold every member, e.g. row_of op=dense tokens=1024.
row_of() {
    local lines member
    lines=$(rows)
    for member in "$@"; do
        lines=$(grep -F " $member" <<<"$lines ") || true
    done
    printf '%s' "$lines"
}
# member NAME: of the row on standard input.
member() {
    sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}
# row_in LOW HIGH NAME PATTERN...: the member of the one row lies between them.
row_in() {
    local low=$1 high=$2 name=$3 row value
    shift 3
    row=$(row_of "$@")
    [ "$(grep -c . <<<"$row")" -eq 1 ] || { fail "wanted one row of $*, got: $row"; return; }
    value=$(member "$name" <<<"$row ")
    awk -v x="$value" -v low="$low" -v high="$high" \
        'BEGIN { exit !(x ~ /^-?[0-9.]+([eE][-+]?[0-9]+)?$/ && x + 0 >= low + 0 && x + 0 <= high + 0) }' ||
        fail "$name of $*: got '$value', wanted $low to $high"
}

# ---- Everything, small
run 0 bench kernels -q --shape smollm2 --tokens 4K --queries 1,17 --block 16 --levels 1,2 --index f16,int8 \
    --keys f16,int8 --repeats 2 --json
n_rows=$(rows | grep -c .)
[ "$n_rows" -ge 30 ] || fail "rows: got $n_rows, wanted at least 30"
[ "$(rows | grep -c ' verified=true')" -eq "$n_rows" ] || fail "every row must have been verified"
for name in ms ms_min ms_max gb_s vs_dense vs_ggml; do
    [ "$(rows | grep -c " $name=[0-9n]")" -eq "$n_rows" ] || fail "every row needs $name"
done
rows | awk '{ for (i = 1; i <= NF; i++) { split($i, x, "="); v[x[1]] = x[2] }
              if (!(v["ms_min"] <= v["ms"] && v["ms"] <= v["ms_max"])) bad = 1 } END { exit bad }' ||
    fail "the median must lie between the fastest and the slowest"
for op in dense ggml lookup sparse merge squeezed; do
    for queries in 1 17; do
        [ -n "$(row_of "op=$op " tokens=4096 "queries=$queries ")" ] || fail "no row of $op for $queries queries"
    done
done
[ -n "$(row_of op=causal queries=17)" ] || fail "no row of causal for 17 queries"
[ -n "$(row_of op=read "queries=1 ")" ] || fail "no row of the bare read for one query"
[ -z "$(row_of op=read queries=17)" ] || fail "the bare read is one query's"
[ -z "$(row_of op=causal "queries=1 ")" ] || fail "one query is no causal block"
row_in 1e-9 1e-5 error op=dense tokens=4096 "queries=1 "
row_in 1e-9 1e-5 error op=causal tokens=4096 "queries=17 "
row_in 1e-7 0.05 error op=ggml tokens=4096 "queries=1 "
for levels in 1 2; do
    for index in f16 int8; do
        row_in 0.11 0.14 budget_read op=squeezed "levels=$levels " "index=$index " keys=f16 tokens=4096 "queries=1 "
        row_in 1e-9 1e-3 error op=squeezed "levels=$levels " "index=$index " keys=f16 tokens=4096 "queries=17 "
        row_in 1e-9 1e-3 error op=squeezed "levels=$levels " "index=$index " keys=int8 tokens=4096 "queries=17 "
    done
done
# 4,096 rows of 3 heads, one more of the user each, 64 numbers, keys and values of two bytes.
row_in 3146496 3146496 bytes op=dense tokens=4096 "queries=1 "
json_in code_words 2 2
coded=$(row_of op=lookup "levels=1 " index=int8 tokens=4096 "queries=1 " | member bytes)
# Blocks select clusters, no codes among their bytes: 2 blocks, 3 heads, 201 clusters of 64 numbers and three more.
row_in 91656 91656 bytes op=lookup "levels=1 " index=int8 tokens=4096 "queries=17 "

json_in read_bandwidth_gb_s 0.1 10000
json_in peak_gflops 0.1 1000000
json_in threads 1 1024
out_has '"cache": "cold"' '"command": "squeeze bench kernels -q --shape smollm2' '"cpu": "'
grep -q '"version": "[0-9]*\.[0-9]*\.[0-9]*"' "$out" || fail "no version"

# ---- Without codes, and with the most
run 0 bench kernels -q --shape smollm2 --tokens 4K --queries 1 --levels 1 --index f16,int8 --code-words 0 --repeats 1 \
    --no-ggml --json
json_in code_words 0 0
row_in 0.11 0.14 budget_read op=squeezed "levels=1 " index=int8 "queries=1 "
# The same work in fewer bytes.
f16=$(row_of op=lookup "levels=1 " index=f16 tokens=4096 "queries=1 " | member bytes)
int8=$(row_of op=lookup "levels=1 " index=int8 tokens=4096 "queries=1 " | member bytes)
awk -v a="$f16" -v b="$int8" 'BEGIN { exit !(b > 0.5 * a && b < 0.65 * a) }' ||
    fail "bytes of the lookup: $f16 in F16, $int8 in INT8"
# With codes at least what a head's take once: 24 directions of 64 numbers, 16 entries and a spread, 9 parts.
awk -v a="$int8" -v b="$coded" 'BEGIN { exit !(b - a >= 3 * (24 * (2 * (64 + 16) + 4) + 36)) }' ||
    fail "bytes of the lookup: $coded with codes, $int8 without"
run 0 bench kernels -q --heads 4 --head-dim 32 --kv-heads 4 --tokens 2K --queries 1,3 --levels 1,2 --index int8 \
    --code-words 4 --repeats 1 --no-ggml --json
json_in code_words 4 4
[ "$(rows | grep -c ' verified=true')" -eq "$(rows | grep -c .)" ] || fail "every row must have been verified"

# ---- Other shapes, a picture, the table; a path in the command is cut
run 0 bench kernels --heads 8 --kv-heads 2 --head-dim 96 --layer-heads 1 --tokens 1100,3000 --queries 1,5 --no-ggml \
    --no-cold --no-huge-pages --threads 1 --repeats 1 --budget 20% --json
err_has "bench: custom, 1,100 tokens: drawing" "finding thresholds" "checking results" "round 1 of 1"
[ -z "$(row_of op=ggml)" ] || fail "--no-ggml has rows of ggml"
row_in 4 4 heads op=dense tokens=3000 "queries=5 "
row_in 1 1 kv_heads op=dense tokens=3000 "queries=5 "
row_in 0.17 0.23 budget_read op=squeezed "levels=1 " tokens=3000 "queries=1 "
out_has '"cache": "warm"' '"huge_pages": false' '"vs_ggml": null'
if command -v gnuplot >/dev/null; then
    run 0 bench kernels -q --shape qwen2.5-0.5b --tokens 1K,2K --queries 1 --levels 1 --repeats 1 \
        --plot "$folder/cost.svg"
    out_has "qwen2.5-0.5b, 2,048 tokens, 1 query" "vs ggml" "squeezed, 1 level" "GB/s"
    exists "$folder/cost.svg"
    grep -q "dense: n" "$folder/cost.svg" || fail "the picture has no slope of dense"
    run 0 bench kernels -q --shape smollm2 --tokens 1K --queries 1 --levels 1 --repeats 1 --no-ggml --json \
        "--plot=$folder/cost.png"
    exists "$folder/cost.png"
    out_has '--plot=cost.png"'
fi

# ---- Rows of 4 + 4 bits beside F16
run 0 bench kernels -q --rows --shape smollm2 --tokens 3K --repeats 1 --threads 2 --json
[ "$(grep -c '"verified": true' "$out")" -eq 14 ] || fail "every row must have been verified"
out_has '"rows": "f16"' '"rows": "int4+4"' '"rows": "upper"' '"op": "squeezed"' '"queries": 8' '"vs_f16":' '"op": "flush"'
run 0 bench kernels -q --rows --heads 4 --kv-heads 2 --head-dim 96 --tokens 1K --repeats 1 --code-words 0
out_has "upper" "vs f16"
run 2 bench kernels --rows --queries 1,5
err_has "--queries has no effect with --rows"
run 2 bench kernels --rows --shape smollm2,llama-2-7b
err_has "allowed are one --shape"

# ---- What is too slow or too large is left out, and said
run 0 bench kernels -q --shape smollm2 --tokens 1K,2K --queries 1 --levels 1 --repeats 1 --seconds 0.000001 --json
[ -n "$(row_of op=dense tokens=1024 ms=)" ] || fail "the shortest context must be run"
[ -n "$(row_of op=dense tokens=2048 skipped=)" ] || fail "the longer one must be skipped"
out_has "more than --seconds"
run 0 bench kernels --shape llama-2-7b --tokens 16M --queries 1 --repeats 1
err_has "16,777,216 tokens: needs" "GB are available"
out_has "not run: needs"

# ---- Refused
run 2 bench kernels --shape llama-9
err_has "--shape llama-9: allowed is one of llama-2-7b, llama-3-8b, smollm2, qwen2.5-0.5b"
run 2 bench kernels --shape smollm2,smollm2
err_has "smollm2 occurs twice"
run 2 bench kernels --code-words 5
err_has "code-words" "0 to 4"
for bad in 1000 4X K -1 4096.5 1e6 32M ""; do
    run 2 bench kernels --tokens "4K,$bad"
    err_has "--tokens $bad: allowed are whole numbers from 1024 to 16777216" "4K,64K"
done
run 2 bench kernels --queries 0
err_has "--queries 0: allowed are whole numbers from 1 to 1024"
run 2 bench kernels --levels 3
err_has "--levels 3: allowed are whole numbers from 1 to 2"
run 2 bench kernels --budget 1
err_has "--budget 1: allowed is at most 0.9"
run 2 bench kernels --centroids 0.6
err_has "--centroids 0.6: allowed is more than 0 and at most 0.5"
run 2 bench kernels --index f32
err_has "--index f32: allowed is one of f16, int8"
run 2 bench kernels --heads 8
err_has "needs --heads and --head-dim"
run 2 bench kernels --heads 8 --kv-heads 3 --head-dim 64
err_has "--kv-heads 3: allowed are divisors of the 8 query heads"
run 2 bench kernels --heads 8 --head-dim 72
err_has "--head-dim 72: allowed are multiples of 16"
run 2 bench kernels --heads 8 --head-dim 64 --shape smollm2
err_has "give one or the other"
run 2 bench kernels --shape llama-3-8b --layer-heads 9
err_has "--layer-heads 9: llama-3-8b has 8 KV heads"
run 2 bench kernels --plot picture.gif
err_has "--plot picture.gif" ".png or .svg"
run 2 bench kernel
err_has "cannot measure 'kernel'; allowed: generate, users, kernels"
run 0 bench --help
out_has "generate" "kernels"
run 0 bench kernels --help
cp "$out" "$folder/help"
manual=${SQUEEZE_SOURCE:-$(dirname "$0")/../..}/docs/squeeze.1
while read -r name; do
    grep -qF -- "\\-\\-${name//-/\\-}" "$manual" || fail "docs/squeeze.1 does not name --$name"
done < <(sed -n 's/^ *\(-., \)\{0,1\}--\(\[no-\]\)\{0,1\}\([a-z-]*\).*/\3/p' "$folder/help")

# ---- Interrupted
label="bench kernels, interrupted"
code=0
: >"$err"
"$program" bench kernels --shape smollm2 --tokens 4K --queries 1 --repeats 64 --json >"$out" 2>"$err" &
process=$!
for ((i = 0; i < 300; i++)); do
    grep -q "round 2 of" "$err" && break
    sleep 0.1
done
kill -s INT "$process"
wait "$process" || code=$?
[ "$code" -eq 130 ] || fail "exit code: got $code, wanted 130"
err_has "interrupted"
[ ! -s "$out" ] || fail "an interrupted run has no result"
finish
