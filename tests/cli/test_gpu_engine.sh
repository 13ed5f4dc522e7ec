#!/usr/bin/env bash
# needs: model. Where this build can use a graphics card: the engine on one that is made of host memory (tests/fake_gpu) against
# the engine on the CPU, with the first four layers of the model, in its shape and in others.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
[ -x "${SQUEEZE_TEST_GPU:-}" ] || finish
few_layers
export SQUEEZE_GPU_PATH=$SQUEEZE_FAKE_GPU
# on_host_card NAME NOISE [CHANGE...]: test_gpu with a variant of the model's first four layers. What does not depend on
# the model is tested with the first.
on_host_card() {
    local name=$1 noise=$2
    label="test_gpu $name"
    "$SQUEEZE_SOURCE/tests/make_model.py" "$SQUEEZE_MODEL" "$folder/$name.gguf" "${@:3}" || exit 1
    SQUEEZE_MODEL=$folder/$name.gguf SQUEEZE_TEST_FOLDER=$folder SQUEEZE_TEST_NOISE=$noise "$SQUEEZE_TEST_GPU" "$skip" \
        >"$out" 2>"$err" || fail "the engine on a card of host memory"
    grep 'KL\|products' "$out"
}
skip=test_none
on_host_card quantised 0.005
grep -q "^[1-9][0-9]* products of ours" "$out" || fail "no product of the text's was ours"
grep -q "^[1-9][0-9]* groups of products" "$out" || fail "no product of a single token was ours"
skip="test_built_*"
# Another architecture: three of the four layers have a window, shorter than a question gets. One row more or less in
# it makes a divergence of 0.0001.
SQUEEZE_TEST_TOKENS=600 on_host_card windows 0.00002 --f16 --architecture cohere2 --without ffn_norm \
    cohere2.attention.sliding_window=u32:72 cohere2.attention.layer_norm_epsilon=f32:1e-5 \
    cohere2.logit_scale=f32:0.5
# A head dimension that rows are padded for, and that ggml has no kernel for on a card (what llama.cpp's own attention
# adds up in F16 is seen); INT8 keys.
SQUEEZE_TEST_TOKENS=600 on_host_card narrow 0.0005 --f16 llama.attention.head_count=u32:12 \
    llama.attention.head_count_kv=u32:4 llama.rope.dimension_count=u32:48
SQUEEZE_TEST_KEYS=int8 on_host_card keys 0.00002 --f16
grep -q "4 layers on a card" "$out" || fail "layers with INT8 keys were built on the CPU"
# Rows in planes, which the card reads as they are; built there, too. Of fewer tokens everything would be read.
SQUEEZE_TEST_TOKENS=1600 SQUEEZE_TEST_ROWS=int4+4 on_host_card planes 0.00002 --f16
grep -q "4 layers on a card" "$out" || fail "layers with rows in planes were built on the CPU"
# Two layers on each of two cards.
SQUEEZE_TEST_TOKENS=600 SQUEEZE_FAKE_CARDS=2 on_host_card cards 0.005
grep -q "layers on 2 cards, 2 on the first" "$out" || fail "layers are not shared evenly: $(grep cards "$out")"
# A card that computes tokens of several contexts one by one.
SQUEEZE_TEST_TOKENS=600 SQUEEZE_FAKE_APART=1 on_host_card apart 0.005
# Layers without a kernel, on the CPU from copies.
SQUEEZE_TEST_TOKENS=600 SQUEEZE_FAKE_OBSTACLE="it is odd" on_host_card obstacle 0.005
finish
