#!/usr/bin/env bash
# needs: model. Graphics cards: what squeeze gpu says without one; then, where this build can use one, the engine on a card
# that is made of host memory (tests/fake_gpu), the commands with the first four layers of the model. test_gpu_engine.sh has
# the engine by itself.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
write_document "$folder/book.txt" 1500

mkdir "$folder/empty"
export SQUEEZE_GPU_PATH=$folder/empty
run 0 gpu
out_has "Everything runs on the CPU: this build has no libsqueeze_cuda.so" "not loaded"
run 0 gpu --json
out_has '"usable": false' '"cards": []' '"kernels": null'
run 0 prepare -q "$folder/book.txt"
run 1 ask "$folder/book.sqz.gguf" "Who?" -ngl 99
err_has "99 layers on a card: this build has no libsqueeze_cuda.so"
run 2 ask "$folder/book.sqz.gguf" "Who?" -ngl
err_has "-ngl needs a value: N"
run 2 ask "$folder/book.sqz.gguf" "Who?" -ngl some
run 0 ask "$folder/book.sqz.gguf" "Who?" -ngl 0 --max-tokens 4
run 1 analyze -q -c "$folder/book.sqz.gguf" -ngl 99
err_has "99 layers on a card: this build has no libsqueeze_cuda.so"

if [ -x "${SQUEEZE_TEST_GPU:-}" ]; then
    export SQUEEZE_GPU_PATH=$SQUEEZE_FAKE_GPU
    run 0 gpu
    out_has "made of host memory" "libsqueeze_cuda.so" "libggml-cuda.so" "INT8 keys become F16"
    run 0 gpu --json
    out_has '"usable": true' '"reason": null' '"way": "device"' '"compute_capability": 9'
    # Exact answers of rows of 4 + 4 bits, drafted on the upper planes; and the same on a card that has no kernels for them.
    write_document "$folder/planes.txt" 14000
    run 0 prepare -q "$folder/planes.txt" -o "$folder/planes.sqz.gguf" --rows int4+4 -ngl 0
    exact_int8() {
        run 0 ask "$folder/planes.sqz.gguf" "Who may copy it?" --max-tokens 8 --json --exact int8 --draft self --draft-tokens 3 \
            --draft-budget 0.2 --draft-steady "$@"
        out_has '"n_cycles":' '"draft_rows": "upper"'
    }
    exact_int8 -ngl 0
    answer=$(json answer)
    exact_int8
    [ "$(json fallback)" = null ] || fail "rows in planes: $(json fallback)"
    [ "$(json answer)" = "$answer" ] || fail "another answer of rows in planes: $(json answer)"
    json_in budget_read 0.4 0.7
    SQUEEZE_FAKE_PLANES=none exact_int8
    [ "$(json answer)" = "$answer" ] || fail "another answer where they become F16: $(json answer)"
    # The commands choose the card by themselves, and answer as on the CPU.
    run 0 prepare -q "$folder/book.txt" -o "$folder/b.sqz.gguf"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --budget 1 --max-tokens 4 --json
    answer=$(json answer)
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --budget 1 --max-tokens 4 --json -ngl 0
    [ "$(json answer)" = "$answer" ] || fail "another answer on the CPU: $answer"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --budget 1 --max-tokens 4 --json
    [ "$(json fallback)" = null ] || fail "a fallback without an obstacle"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 4 --json --exact f16 --draft self --draft-tokens 3 \
        --draft-steady
    [ "$(json answer)" = "$answer" ] || fail "another answer by drafts: $(json answer)"
    out_has '"n_cycles":'
    json_in budget_read 1 1
    export SQUEEZE_FAKE_OBSTACLE="it is odd"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --budget 1 --max-tokens 4 --json
    err_has "attention of 4 of 4 layers runs on the CPU, from copies" "of layer 0, it is odd"
    [ "$(json answer)" = "$answer" ] || fail "another answer from copies: $answer"
    # What the card cannot build the CPU does, which is said; the file is as good.
    write_document "$folder/long.txt" 5000
    run 0 prepare -q "$folder/long.txt" -o "$folder/c.sqz.gguf" --json
    err_has "4 of 4 layers were clustered on the CPU" "no kernel for their shape or these options"
    run 0 prepare -q "$folder/book.txt" -o "$folder/o.sqz.gguf" --json
    err_has "attention of layer 0, and perhaps of others, was read on the CPU, from copies, because there is no kernel"
    out_has '"fallback": "attention of layer 0'
    unset SQUEEZE_FAKE_OBSTACLE
    run 0 prepare -q "$folder/long.txt" -o "$folder/c.sqz.gguf" --json
    [ "$(json n_card_layers)/$(json n_host_layers)" = 4/0 ] || fail "layers left to the CPU: $(json n_host_layers)"
    run 0 prepare -q "$folder/long.txt" -o "$folder/c.sqz.gguf" --json --levels 2
    err_has "4 of 4 layers were clustered on the CPU"
    for room in 0.001 0.002 0.004; do
        run 0 prepare -q "$folder/long.txt" -o "$folder/c.sqz.gguf" --json --gpu-memory "$room"
        err_has "of 4 layers were clustered on the CPU"
        run 0 inspect "$folder/c.sqz.gguf"
    done

    # A card that is lost at some call: one sentence, no file of half a context, no answer of half a model.
    mkdir "$folder/lost"
    for loss in 1 2 5 17 60 200 700; do
        export SQUEEZE_FAKE_LOSS=$loss
        label="a card that is lost at call $loss"
        if "$program" prepare -q "$folder/book.txt" -o "$folder/lost/c.sqz.gguf" >"$out" 2>"$err"; then
            exists "$folder/lost/c.sqz.gguf"
            rm "$folder/lost/c.sqz.gguf"
        else
            err_has "card"
            err_lines 1
        fi
        [ -z "$(ls -A "$folder/lost")" ] || fail "left: $(ls -A "$folder/lost")"
        "$program" ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 8 >"$out" 2>"$err" ||
            err_has "card"
    done
    unset SQUEEZE_FAKE_LOSS

    # What is measured: on the card where the card has the methods, and the card's distributions beside the CPU's.
    printf '{"input": "%s", "instructions": ["Who may copy it?"], "outputs": ["Everyone may."]}\n' \
        "$(sed 's/\\/\\\\/g; s/"/\\"/g' "$folder/book.txt" | awk '{ printf "%s\\n", $0 }')" >"$folder/one.jsonl"
    run 0 compare "$folder/one.jsonl" -q --budget 0.5,1 --against-cpu --json
    out_has '"gpu_layers": 5' '"compared_with": "CPU"'
    json_in kl_mean 0 0.02
    run 0 compare "$folder/one.jsonl" -q --json -ngl 0
    out_has '"gpu_layers": 0' '"compared_with": "dense"'
    run 2 compare "$folder/one.jsonl" --against-cpu -ngl 0
    run 0 eval "$folder/one.jsonl" -q --methods squeezed,paper --budget 0.5 --no-scores --json
    out_has '"gpu_layers": 5'
    run 0 eval "$folder/one.jsonl" -q --methods squeezed,window --budget 0.5 --no-scores --json
    out_has '"gpu_layers": 0'
    err_has "computed on the CPU alone"

    # Prediction and measurement: rates come from whole tokens on three contexts of their own, at five budgets.
    write_document "$folder/longer.txt" 6000
    run 0 prepare -q "$folder/longer.txt" -o "$folder/c.sqz.gguf"
    SQUEEZE_GPU_PRODUCTS=ggml run 0 analyze -q -c "$folder/c.sqz.gguf" --lengths 600 --budget 0.4,1 --measure 1 \
        --repeats 1 --json
    out_has '"gpu_layers": 5' '"name": "made of host memory"' '"flops_per_second": null' '"precision": null'
    runs_of_parts 4
    for key in bytes_per_second dense_seconds_a_layer lookup_seconds_a_layer rows_seconds_a_byte misfit; do
        json_in "$key" 0 1e15
    done
    awk '/"calibration":/ { within = 1 } /\]/ { within = 0 }
         within && /"(tokens|budget_read|measured_seconds|fitted_seconds)":/ { gsub(/[",:]/, ""); value[$1] = $2
             if (!($2 > 0)) bad = 1 }
         within && /}/ { n++; lengths[value["tokens"]]++; exact += value["budget_read"] == 1
             if (value["budget_read"] < 0.9) chosen++ }
         END { for (i in lengths) bad = bad || lengths[i] != 5
               exit bad || n != 15 || length(lengths) != 3 || exact < 3 || chosen < 4 }' "$out" ||
        fail "wanted 15 measured tokens of three lengths that rates come from"
    SQUEEZE_GPU_PRODUCTS=ggml SQUEEZE_FAKE_OBSTACLE="it is odd" run 0 analyze -q -c "$folder/c.sqz.gguf" --lengths 64 \
        --budget 0.4 --measure 1 --repeats 1 --machine a100
    err_has "attention of 4 of 4 layers runs on the CPU, from copies"
    out_has "5 layers on a card; rates are those of tokens on 1" "machine  a100:" "attained: a token on 32 tokens"
    run 2 analyze -q -c "$folder/c.sqz.gguf" --precision fp16
    err_has "--precision fp16: of a card that is measured only bytes are bounded"
    # Of three quarters of it, which rates would come from, everything is read.
    head -c 4100 "$folder/longer.txt" >"$folder/part.txt"
    run 0 prepare -q "$folder/part.txt" -o "$folder/part.sqz.gguf"
    run 1 analyze -q -c "$folder/part.sqz.gguf" --lengths 128 --measure 1 --repeats 1 --machine a100
    err_has "nothing tells what choosing takes on a card" "-ngl 0"

    # A server on a card squeezes documents by the thread that answers, which goes on answering.
    label="squeeze serve on a card"
    mkdir "$folder/contexts"
    : >"$folder/server.err"
    "$program" serve --contexts "$folder/contexts" --port 0 >"$out" 2>"$folder/server.err" </dev/null &
    server=$!
    await_server "$server" "$folder/server.err"
    python3 "$(dirname "$0")/serve_client.py" "$port" meanwhile >"$out" 2>"$err" || fail "answers waited for a document"
    kill -TERM "$server"
    wait "$server" || fail "the server ended with $?"

    # By the public callback instead of a device of our own, on two cards. There products are ggml's.
    export SQUEEZE_FAKE_CARDS=2
    SQUEEZE_GPU_PRODUCTS=ggml run 0 prepare -q "$folder/book.txt" -o "$folder/b.sqz.gguf"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 4 --json
    answer=$(json answer)
    export SQUEEZE_GPU_WAY=callback
    run 0 gpu --json
    out_has '"usable": true' '"way": "callback"'
    run 0 gpu
    out_has "by llama.cpp's callback"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 4 --json
    [ "$(json answer)" = "$answer" ] || fail "another answer by the callback: $answer"
    run 0 prepare -q "$folder/book.txt" -o "$folder/c.sqz.gguf"
    equal_files "$folder/b.sqz.gguf" "$folder/c.sqz.gguf"
    run 0 ask "$folder/b.sqz.gguf" "Who may copy it?" --max-tokens 4 -ngl 2
    SQUEEZE_GPU_WAY=stairs run 0 gpu
    out_has 'SQUEEZE_GPU_WAY is "stairs": allowed here is callback or device'
    unset SQUEEZE_GPU_WAY
    GGML_CUDA_GRAPH_OPT=1 run 0 gpu
    out_has "Everything runs on the CPU: GGML_CUDA_GRAPH_OPT=1 is not supported"
fi
finish
