#!/usr/bin/env bash
# needs: model. What analyze prints and draws, and what it refuses.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"

run 0 analyze
out_has "llama-2-7b: 6.738 billion" "ridge point 403.3 FLOP/byte" "QK^T" "= aggregate"
run 0 analyze --json --batch 1000 --tokens 10000000 --generate 1000
json_in ridge_flop_per_byte 403 404
json_in parameters 6738415000 6738416000
grep -qE 'inf|nan' "$out" && fail "a number that is none"
run 0 analyze --csv
out_has "phase,batch,tokens,operation,flops"
run 0 analyze -m "$whole_model" --json
json_in parameters 134515008 134515008
json_in weight_bits 4 6
run 0 analyze asymptotic
out_has "O(B S_L d^2) + O(B S_L^2 d)" "O(k B S_L d) + O(k d^2)"
run 0 analyze machines --csv
out_has "a100,2020,1.935e+12,fp16,3.12e+14,161." "h100,2022,2.039e+12,fp16,9.894e+14,485."
run 0 analyze maps --json
out_has '"dominant": "attention"'
run 0 analyze what-if --tokens 1M
out_has "squeezed, two levels" "squeezed, codes" "INT4 KV" "squeezed, speculation"
run 0 analyze what-if --tokens 1M --code-words 2 --csv
out_has "squeezed, codes, speculation"
# By rates: a file's, and of this machine, whose file says the same again.
run 0 analyze what-if -q -m "$SQUEEZE_MODEL" --rates here --repeats 1 --tokens 2K --budget 0.1 --gamma 2 --json
json_in token_seconds 1e-6 10
json_in verify_seconds 1e-6 10
json_in tokens_a_cycle 2.4399 2.4401 # 1 + 0.8 + 0.64
cp "$out" "$folder/rates.json"
gain=$(json gain)
run 0 analyze what-if -m "$SQUEEZE_MODEL" --rates "$folder/rates.json" --tokens 2K --budget 0.1 --gamma 2 --json
json_in gain "$(awk -v g="$gain" 'BEGIN { print g * 0.99999 }')" "$(awk -v g="$gain" 'BEGIN { print g * 1.00001 }')"
run 0 analyze what-if -m "$SQUEEZE_MODEL" --rates "$folder/rates.json" --tokens 2K
out_has "tokens a cycle" "drafted at best"
grep -q a6000 "$out" && fail "a machine that does not count"
printf '{"rates": {}}' >"$folder/bad.json"
run 1 analyze what-if --rates "$folder/bad.json"
err_has '"dense_seconds_a_layer" must be a number of seconds'
printf '{}' >"$folder/bad.json"
run 1 analyze what-if --rates "$folder/bad.json"
err_has 'has no "rates"'
sed 's/"tokens": 3.0/"tokens": 4.0/; s/"tokens": 3,/"tokens": 4,/' "$folder/rates.json" >"$folder/bad.json"
run 1 analyze what-if --rates "$folder/bad.json"
err_has '"batches", entry 3: "tokens" must be 3'
run 1 analyze what-if --rates "$folder/none.json"
run 2 analyze maps --rates here
err_has "--rates are of the views what-if and ranks"
run 2 analyze what-if --rates here --shape llama-2-7b
run 2 analyze what-if --rates here --gamma 16
err_has "allowed are 1 to 15"
run 2 analyze what-if --rates here --machine a100
# What was predicted, by rates of these machines, beside what was measured there: bench/results.
python3 - "$SQUEEZE_SOURCE" "$program" "$whole_model" <<'END' || fail "predicted gains"
import json, subprocess, sys
source, program, model = sys.argv[1:]
table = json.load(open(source + "/bench/results/speculation-predicted.json"))
bad = 0
for row in table["rows"]:
    shape = ["--shape", row["shape"]] if row.get("shape") else ["-m", model]
    command = [program, "analyze", "what-if", *shape, "--rates", source + "/" + row["rates"], "--json",
               "--tokens", str(row["context_tokens"]), "--budget", str(row["draft_budget"]),
               "--acceptance", str(row["acceptance"]), "--gamma", str(max(1, row["gamma"]))]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["speculation"][0]
    gain = found["gain"] if row["gamma"] else found["best_gain"]
    measured = json.load(open(source + "/" + row["measured"]["file"]))["rows"][row["measured"]["row"]]
    wanted = measured[row["measured"]["key"]]
    error = gain / wanted - 1
    if not abs(error) < 0.15 or not abs(gain / row["predicted"] - 1) < 1e-3:
        bad = 1
        print(f"{row['measured']}: predicted {gain:.4f}, the table has {row['predicted']}, measured {wanted}", file=sys.stderr)
sys.exit(bad or len(table["rows"]) < 4)
END
# The same of ranks: the tables of bench/results are found again, and no error is above 15%.
python3 - "$SQUEEZE_SOURCE" "$program" "$whole_model" <<'END' || fail "ranks-predicted-*.json and what was measured"
import glob, json, subprocess, sys
source, program, model = sys.argv[1:]
bad = n = 0
for path in sorted(glob.glob(source + "/bench/results/ranks-predicted-*.json")):
    for row in json.load(open(path))["rows"]:
        shape = ["--shape", row["shape"]] if row.get("shape") else ["-m", model]
        rates = ["--rates", source + "/" + row["rates"]] if row.get("rates") else []
        shards = ["--shards", str(row["shards"])] if row.get("shards") else []
        command = [program, "analyze", "ranks", *shape, *rates, *shards, "--json", "--tokens", str(row["context_tokens"]),
                   "--budget", str(row["budget"]), "--ranks", str(row["ranks"])]
        step = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["steps"][0]
        ms = 1e3 * step["seconds_a_token"]
        if row.get("of") == "attention of a layer":
            ms = (ms - 1e3 * step["model_seconds"]) / 32
        n += 1
        if not abs(row["predicted_ms"] / row["ms"] - 1) < 0.15 or not abs(ms / row["predicted_ms"] - 1) < 1e-3:
            bad = 1
            print(f"{path}: {row}: predicted {ms:.5g} ms", file=sys.stderr)
sys.exit(bad or n < 6)
END
run 0 analyze ranks
out_has "llama-3-8b" "Where more ranks stop paying"
run 0 analyze ranks --tokens 10M --ranks 1,16 --rank-memory 141 --csv
grep -q "^10485760,1,.*,no" "$out" || fail "10M tokens on one H200"
grep -q "^10485760,16,.*,yes" "$out" || fail "10M tokens on sixteen H200s"
run 0 analyze ranks --tokens 1M --budget 0.05 --hosts-latency-us 1000 --ranks 8,16 --json
json_in fewest_ranks 2 2
json_in fastest_ranks 8 8
# Of 32 layers 24 with a window have no messages, and no more rows than its own.
run 0 analyze ranks --tokens 1M --budget 1 --ranks 2 --json
json_in message_layers 32 32
totals=$(json totals_seconds) memory=$(json memory_bytes)
run 0 analyze ranks --tokens 1M --budget 1 --ranks 2 --window-layers 24 --window 1024 --json
json_in message_layers 8 8
times() { awk -v x="$1" -v by="$2" 'BEGIN { printf "%.9g", x * by }'; }
json_in totals_seconds "$(times "$totals" 0.2499)" "$(times "$totals" 0.2501)"
json_in memory_bytes 1 "$(times "$memory" 0.3)"
run 2 analyze ranks --rates here --ranks 2 --repeats 1 -q
err_has "no message was measured"
run 0 analyze ranks --rates here --ranks 1,2,4 --shards 4 --cores 1 --latency-us 1000 --bandwidth 0.125 --repeats 1 -q --tokens 4K --json
json totals_seconds >/dev/null
cp "$out" "$folder/rates.json"
json_in message_seconds 1e-3 1e-3
json_in message_seconds_a_byte 8e-9 8e-9
run 0 analyze ranks -m "$SQUEEZE_MODEL" --rates "$folder/rates.json" --tokens 4K --ranks 1 --shards 4 --json
json_in ranks 1 1
run 1 analyze ranks --rates "$SQUEEZE_SOURCE/bench/results/speculation-rates-sapphire-rapids-2cores.json"
err_has 'has no "ranks_machine"'
run 2 analyze --ranks 2
err_has "they are of the view ranks"
run 2 analyze ranks --kv-bits 8
err_lines 1
run 0 analyze complexity
out_has "O(c' log N + k)"
run 0 analyze complexity --code-words 2 --compared 100 --retained 50 --csv --tokens 1M
out_has "O(c' log N + o + k),1048576,400,250,50,"
run 0 analyze --budget 0.1 --code-words 2 --coded 0.25 --tokens 100000 --csv
grep -q "^decode,1,100000,codes,.*memory" "$out" || fail "wanted the codes of a decode step"

printf '# mine\nmybox bandwidth=100 fp16=10 memory=16 year=2024\n' >"$folder/machines.txt"
run 0 analyze --machines "$folder/machines.txt" --machine mybox
out_has "mybox: 10 TFLOP/s fp16, 100 GB/s, ridge point 100 FLOP/byte"
printf 'mybox bandwidth=-1 fp16=10\n' >"$folder/machines.txt"
run 1 analyze --machines "$folder/machines.txt"
err_has "line 1: 'bandwidth=-1': allowed is a number above 0"
# wrong FILE-TEXT MESSAGE: a machine file that is refused, with the reason
wrong() {
    printf '%b' "$1" >"$folder/machines.txt"
    run 1 analyze machines --machines "$folder/machines.txt"
    err_has "$2"
}
wrong '# none\n\nx bandwidth=inf fp16=1\n' "line 3: 'bandwidth=inf': allowed is a number above 0"
wrong 'x bandwidth=1 fp16=nan\n' "line 1: 'fp16=nan': allowed"
wrong 'x bandwidth=1e300 fp16=1\n' "'bandwidth=1e300': allowed is a number above 0 and at most 1e+09"
wrong 'x bandwidth=0 fp16=1\n' "'bandwidth=0': allowed"
wrong 'x bandwidth=1,5 fp16=1\n' "'bandwidth=1,5': allowed"
wrong 'x bandwidth = 1 fp16 = 1\n' "'bandwidth': allowed"
wrong 'x bandwidth=1\n' "machine x needs bandwidth= and a peak rate"
wrong 'x fp16=1\n' "machine x needs bandwidth= and a peak rate"
wrong 'x bandwidth=1 fp16=1 precision=int4\n' "needs bandwidth= and a peak rate for its precision"
wrong 'x bandwidth=1 fp16=1 precision=fp99\n' "'precision=fp99': allowed are"
wrong 'x bandwidth=1 fp16=1 color=red\n' "'color=red': allowed are bandwidth="
wrong 'x bandwidth=1 fp16=1 year=2024.5\n' "'year=2024.5': a year is a whole number"
wrong 'bandwidth=1 fp16=1\n' "a line begins with the machine's name"
wrong 'here bandwidth=1 fp16=1\n' "not 'here'"
wrong 'x bandwidth=1 fp16=1\n\0033[31mred bandwidth=1 fp16=1\n' "line 2: not a text file: it holds a byte 27"
wrong 'x bandwidth=1 fp16=1 \0000\n' "line 1: not a text file: it holds a byte 0"
run 1 analyze --machines "$folder/nothing"
err_has "No such file"
run 1 analyze --machines "$folder"
err_has "Is a directory"

for bad in "--batch 0" "--batch -1" "--tokens 99999999999999999999" "--kv-bits 0" "--generate 0" "--gamma 0" \
    "--batch 1,,2" "--tokens 0x10" "--weight-bits nan" "--weight-bits inf" "--kv-bits 65" "--layers 0" "--layers 70000" \
    "--budget 0" "--budget 1.1" "--budget nan" "--budget 1e-13" "--budget 0.1,0.2" "--budget 0.1 --levels 9" \
    "--budget 0.1 --levels 0" "--budget 0.1 --centroids 1" "--budget 0.1 --centroids 0.05,0.1" "--budget 0.1 --coded 2" \
    "--code-words 5" "--compared 9 --retained 9 --fan-out 1" "--compared 9 --retained 9 --levels 2" \
    "--acceptance 1.5" "--experts 8" "--experts 8 --active-experts 9" "--window-layers 40 --window 9"; do
    # shellcheck disable=SC2086
    run 2 analyze $bad
    err_has "allowed"
done
# what would not count is refused
for vain in "--code-words 2" "--centroids 0.05" "--coded 0.3" "--levels 2" "--fan-out 8" "--budget 0.1 --coded-keys 9" \
    "--compared 9" "--retained 9" "--compared 9 --retained 9 --budget 0.1" "--compared 9 --retained 9 --coded 0.3" \
    "--gamma 4" "--lengths 100" "--active-experts 2" "--window 512" "--window-layers 4" "machines --batch 2" \
    "asymptotic --tokens 4K" "complexity --batch 1,2" "-m a --shape gpt-2" "-c a --shape gpt-2" "-c a --layers 2" \
    "-c a --tokens 4K" "-c a --code-words 2" "-c a maps" "-ngl 2" "--gpu-memory 1"; do
    # shellcheck disable=SC2086
    run 2 analyze $vain
    err_lines 1
done
run 2 analyze --shape nothing
err_has "--shape nothing: allowed is one of llama-2-7b"
run 2 analyze --machine nothing
err_has "--machine nothing: allowed is one of here, p100"
run 2 analyze --machine v100 --precision int4
err_has "no peak rate of v100"
run 2 analyze nonsense
err_has "no view 'nonsense'; allowed: operations"
run 2 analyze --kv-heads 5
err_has "--kv-heads 5: allowed are divisors of the 32 query heads"
run 2 analyze --heads 3
err_has "--kv-heads 32: allowed are divisors of the 3 query heads"
run 2 analyze --json --csv
run 2 analyze --plot picture.gif
err_has ".png or .svg"
run 1 analyze -m "$folder/machines.txt"
err_has "not a GGUF model"
# before anything of a machine is measured, whose rates in INT4 are not known
run 1 analyze -c "$folder/none.sqz.gguf" --precision int4
err_has "No such file"

# ---- A measured run of two lengths and the whole: errors are of the times beside them
write_document "$folder/book.txt" 5000
run 0 prepare -q "$folder/book.txt" -o "$folder/book.sqz.gguf"
run 0 analyze -q -ngl 0 -c "$folder/book.sqz.gguf" --lengths 128,900 --budget 0.3,1 --measure 2 --repeats 2 --json
out_has '"gpu_layers": 0' '"calibration": null' '"name": "here"'
json_in mean_absolute_error 0 3
json_in worst_absolute_error "$(json mean_absolute_error)" 9
for rate in dense_seconds_a_byte lookup_seconds_a_byte codes_seconds_a_key rows_seconds_a_byte misfit; do
    json_in "$rate" 0 1
done
runs_of_parts 6
# whole clusters on two levels
head -c 4000 "$folder/book.txt" >"$folder/part.txt"
run 0 prepare -q --code-words 0 --levels 2 "$folder/part.txt" -o "$folder/part.sqz.gguf"
run 0 analyze -q -ngl 0 -c "$folder/part.sqz.gguf" --lengths 800 --budget 0.3 --measure 2 --repeats 1 --json
json_in codes_seconds_a_key 0 0
json_in coded_share 0 0
json_in predicted_seconds 1e-6 10
run 2 analyze -c "$folder/book.sqz.gguf" --lengths 100000 -ngl 0
err_has "--lengths 100000: the context has"

if command -v gnuplot >/dev/null; then
    for view in operations maps what-if ranks complexity machines asymptotic; do
        run 0 analyze "$view" --plot "$folder/box/$view.svg"
        exists "$folder/box/$view.svg"
    done
    grep -q "arithmetic intensity (FLOP/byte)" "$folder/box/operations.svg" || fail "wanted labelled axes"
    grep -q "context (tokens)" "$folder/box/maps.svg" || fail "wanted labelled axes"
    grep -q "arithmetic intensity (FLOP/byte)" "$folder/box/asymptotic.svg" || fail "wanted labelled axes"
    grep -q "a generated token (ms)" "$folder/box/ranks.svg" || fail "wanted labelled axes"
    grep -q "time at least (ms)" "$folder/box/complexity.svg" || fail "wanted labelled axes"
    run 0 analyze maps --batch 1 --tokens 4K --plot "$folder/box/one.svg"
    [ ! -s "$err" ] || fail "gnuplot complains: $(cat "$err")"
    # a machine without a year is a line, one far from the presets still lies within the axes
    printf 'undated bandwidth=100 fp16=10\nlater bandwidth=100 fp16=10 year=2030\n' >"$folder/machines.txt"
    run 0 analyze machines --machines "$folder/machines.txt" --plot "$folder/box/ridge.svg"
    grep -q ">undated<" "$folder/box/ridge.svg" || fail "wanted a machine without a year"
    grep -q ">later<" "$folder/box/ridge.svg" || fail "wanted a machine of a later year"
    rm -f "$folder/box/"*
fi
label="analyze --plot without gnuplot"
code=0
program=$(realpath "$program")
PATH=$folder/box "$program" analyze maps --plot "$folder/box/p.png" >"$out" 2>"$err" || code=$?
[ "$code" -eq 1 ] || fail "exit code: got $code, wanted 1"
err_has "gnuplot" "install"
box_holds ""
finish
