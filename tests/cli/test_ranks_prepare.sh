#!/usr/bin/env bash
# needs: model. A document prepared by several processes: files are those of one process with as many shards, byte for byte,
# whatever the last turn is; answers; what is refused; and that nothing half-written stays when a rank dies, stops or is
# interrupted.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
. "$(dirname "$0")/ranks.bash"
need_model
few_layers
need_mpirun
mkdir "$folder/alone" "$folder/box"
write_document "$folder/book.txt" 20000
fixed=(--sinks 4 --window 8)

# same_files NAME: what is in the two folders of that context.
same_files() {
    local file n=0
    for file in "$folder/alone/$1"*; do
        n=$((n + 1))
        equal_files "$file" "$folder/box/${file##*/}"
    done
    [ "$n" -gt 2 ] || fail "files of $1 of one process: got $n"
}

# ---- The same files -----------------------------------------------------------------------
# 4,227 tokens are 9 blocks, the last of a few tokens: a last turn in which one rank has a part of a block and others none.
run 0 prepare "$folder/book.txt" -q "${fixed[@]}" --shards 4 -o "$folder/alone/four.sqz.gguf"
for n in 2 4; do
    rm -f "$folder/box/"*
    ranks "$n" 0 prepare "$folder/book.txt" -q "${fixed[@]}" --shards 4 --json -o "$folder/box/four.sqz.gguf"
    json_in n "$n" "$n"
    # Of its own tokens a rank sends queries to all others, of theirs outputs.
    [ "$(json partial_output_bytes)" = "$((9 * 65 * 4)).0" ] || fail "bytes of an output: got $(json partial_output_bytes)"
    json_in bytes_a_token_layer 1 $((9 * (65 + 64) * 4 * (n - 1) * 13 / 10 / n))
    same_files four
done
run 0 ask "$folder/box/four.sqz.gguf" --budget 0.4 --max-tokens 16 --json "Who may copy this licence?"
json answer >"$folder/alone.answer"
ranks 4 0 ask "$folder/box/four.sqz.gguf" --budget 0.4 --max-tokens 16 --json "Who may copy this licence?"
json answer | cmp -s - "$folder/alone.answer" || fail "answers differ"

# A shard for each rank where nothing is said, and a number of ranks that is no power of two; from standard input, whose
# name is none. 5 and 6 blocks.
for length in 2560 2700; do
    input=$folder/book.txt run 0 prepare - -q "${fixed[@]}" --truncate=$length --shards 3 -o "$folder/alone/three.sqz.gguf"
    rm -f "$folder/box/"*
    input=$folder/book.txt ranks 3 0 prepare - -q "${fixed[@]}" --truncate=$length -o "$folder/box/three.sqz.gguf"
    box_holds three.sqz.gguf three-0000{1,2,3}-of-00003.sqz.gguf
    same_files three
done

# ---- Refused ----------------------------------------------------------------------------------
rm -f "$folder/box/"*
ranks 2 2 prepare "$folder/book.txt" --shards 3 -o "$folder/box/b.sqz.gguf"
err_has "allowed under mpirun -n 2 are its multiples"
ranks 2 2 prepare --from "$folder/alone/three.sqz.gguf" -o "$folder/box/b.sqz.gguf"
err_has "--from is one process"
ranks 2 2 prepare "$folder/book.txt" --gpu-layers 3 -o "$folder/box/b.sqz.gguf"
err_has "a model on the CPU"
ranks 2 1 prepare "$folder/book.txt" --shards 90 -o "$folder/box/b.sqz.gguf"
err_has "the last would be empty"
ranks 2 1 prepare "$folder/none.txt" -o "$folder/box/b.sqz.gguf"
err_has "No such file"
ranks 2 1 prepare "$folder/book.txt" -o "$folder/none/b.sqz.gguf"
err_has "$folder/none"
box_holds
# A rank that has a folder of its own under that name, or another model, would leave a context in pieces.
if unshare -m true 2>/dev/null; then
    run 0 prepare "$folder/book.txt" -q --shards 2 --truncate=1700 -o "$folder/alone/b.sqz.gguf"
    cp "$folder/alone/b"* "$folder/box"
    apart() {
        # shellcheck disable=SC2016
        ranks 1 1 prepare "$folder/book.txt" -q -o "$folder/box/b.sqz.gguf" : -n 1 \
            unshare -m sh -c "mount $1"' && exec "$@"' rank "$program" prepare "$folder/book.txt" -q -o "$folder/box/b.sqz.gguf"
        err_has "rank 1 of 2: $2"
        box_holds b.sqz.gguf b-0000{1,2}-of-00002.sqz.gguf
        same_files b
    }
    apart "-t tmpfs -o size=600k none $folder/box" "$folder/box/b-00002-of-00002.sqz.gguf: not enough space"
    apart "-t tmpfs none $folder/box" "$folder/box/b.sqz.gguf: its folder is another one here than at rank 0"
    apart "--bind $whole_model $SQUEEZE_MODEL" "$SQUEEZE_MODEL is another model here than at rank 0"
fi

# ---- Ranks that die, stop or are interrupted ---------------------------------------------------
# An old context stays as it is.
run 0 prepare "$folder/book.txt" -q --shards 2 --truncate=1700 -o "$folder/alone/b.sqz.gguf"
cat "$folder/book.txt" "$folder/book.txt" "$folder/book.txt" >"$folder/long.txt"
# Until it reads, and some time more: less than one thread a rank takes for the text.
reads() {
    local i
    for ((i = 0; i < 1200; i++)); do
        grep -q "^read: " "$err" && break
        sleep 0.1
    done
    sleep "$(awk -v seed="$RANDOM" 'BEGIN { srand(seed); print rand() }')"
}
lose() {
    rm -f "$folder/box/"*
    cp "$folder/alone/b"* "$folder/box"
    OMP_NUM_THREADS=1 lose_process "$@" reads prepare "$folder/long.txt" --rope-scale 4 -o "$folder/box/b.sqz.gguf"
    box_holds b.sqz.gguf b-0000{1,2}-of-00002.sqz.gguf
    same_files b
}
lose 2 1 KILL
err_has "rank 1" "signal 9"
lose 2 0 KILL
err_has "rank 0" "signal 9"
lose 4 2 STOP
err_has "rank 2 of 4 was not heard of"
lose 2 0 STOP
err_has "rank 0 was not heard of"
lose 3 2 INT
err_has "rank 2 of 3: interrupted"
lose 2 0 TERM
err_has "interrupted; nothing was written"
lose 2 all INT # mpirun gives its processes a second, which they may not need to say anything
run 0 ask "$folder/box/b.sqz.gguf" --max-tokens 1 x
finish
