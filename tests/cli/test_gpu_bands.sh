#!/usr/bin/env bash
# needs: model. Texts that are read on cards by bands of layers, whose rows are written while others are read: on one card and
# on two, which are made of host memory (tests/fake_gpu), the same file to the byte as without bands.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
[ -d "${SQUEEZE_FAKE_GPU:-}" ] || { echo "this build runs on no card of host memory"; exit 0; }
export SQUEEZE_GPU_PATH=$SQUEEZE_FAKE_GPU

# A model of LongRoPE, whose batches are short enough: a text of four, the last of them shorter.
"$SQUEEZE_SOURCE/tests/make_model.py" "$SQUEEZE_MODEL" "$folder/m.gguf" --layers 4 \
    llama.rope.scaling.type=string:longrope llama.rope.scaling.original_context_length=u32:600 \
    llama.rope.scaling.attn_factor=f32:1 --factors rope_factors_short.weight=1 --factors rope_factors_long.weight=2 || exit 1
export SQUEEZE_MODEL=$folder/m.gguf
write_document "$folder/long.txt" 8000

# prepared NAME CARDS BANDS [OPTION...]
prepared() {
    label=$1
    SQUEEZE_FAKE_CARDS=$2 SQUEEZE_GPU_BANDS=$3 run 0 prepare -q "$folder/long.txt" -o "$folder/$1.sqz.gguf" --json "${@:4}"
    [ "$(json n_card_layers)/$(json n_host_layers)" = 4/0 ] || fail "layers left to the CPU: $(json n_host_layers)"
    [ "$1" = whole ] || equal_files "$folder/whole.sqz.gguf" "$folder/$1.sqz.gguf"
}
prepared whole 1 1
prepared bands 1 3
prepared turns 2 2
prepared layers 2 2 --split layers
label=

# A card that is lost while a band is read: no file.
for loss in 30 80 150; do
    SQUEEZE_FAKE_CARDS=2 SQUEEZE_FAKE_LOSS=$loss SQUEEZE_GPU_BANDS=2 "$program" prepare -q "$folder/long.txt" \
        -o "$folder/lost.sqz.gguf" >"$out" 2>"$err" && fail "prepared by a card that was lost at call $loss"
    err_has "card"
    [ ! -e "$folder/lost.sqz.gguf" ] || fail "a card that was lost at call $loss left a file"
done
