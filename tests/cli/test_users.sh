#!/usr/bin/env bash
# needs: model. Many users at once: the bench of it, whose answers together are checked against those alone.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
few_layers
mkdir "$folder/box"
cd "$folder/box" || exit
write_document "$folder/book.txt" 2500
run 0 prepare -q "$folder/book.txt" -o "$folder/c.sqz.gguf"
context=$folder/c.sqz.gguf

run 2 bench users
err_has "no context"
run 2 bench users -c "$context" --users 0
run 2 bench users -c "$context" --users 65
run 2 bench users -c "$context" --plot page.gif
run 1 bench users -c "$context" --question-tokens 2 -q
err_has "the template alone takes"
run 1 bench users -c "$context" --tokens 4096 --question-tokens 256 -q --users 1 --model "$folder/none.gguf"
err_has "none.gguf"
box_holds ""

run 0 bench users -c "$context" --users 1,3 --tokens 3 --repeats 2 --question-tokens 30 --budget 0.5 --json
err_has "answers alone and together" "round 2 of 2, 3 users"
[ "$(grep -c '"users":' "$out")" -eq 2 ] || fail "wanted two rows"
for key in tokens_s vs_one vs_llama first_token_s share_of_products; do
    [ "$(grep -c "\"$key\": [0-9]" "$out")" -eq 2 ] || fail "$key: wanted in two rows"
done
json_in answers_compared 3 3
json_in answers_equal 0 3
json_in generated_tokens 3 3
json_in memory_a_user_bytes -1e6 2e6
out_has '"apart": false'
# A context each: ours a copy, llama.cpp's a cache filled from the first.
run 0 bench users -c "$context" --apart --users 2 --tokens 3 --repeats 1 --question-tokens 30 --budget 0.5 -q --json
out_has '"apart": true' '"together": "each"'
json_in answers_compared 2 2
json_in llama_tokens_s 0.1 1e6
# All keys for all of them, on the CPU, too; one selection for all is a card's.
run 0 bench users -c "$context" --users 3 --tokens 2 --repeats 1 --question-tokens 30 --budget 0.5 -q --json -ngl 0 --together all
out_has '"together": "all"'
json_in answers_compared 3 3
run 1 bench users -c "$context" --users 2 --tokens 2 --repeats 1 -q -ngl 0 --together one
err_has "on a card alone"
# A longer question beside the usual one.
run 0 bench generate -c "$context" --no-prepare --repeats 1 --tokens 2 --long-question 50 -q --json
json_in long_question_tokens 50 50
[ "$(grep -c '"long_question_seconds":' "$out")" -eq 3 ] || fail "wanted the long question by three"
if command -v gnuplot >/dev/null; then
    run 0 bench users -c "$context" --users 2 --tokens 2 --repeats 1 --question-tokens 30 -q --plot users.svg
    out_has "tokens/s" "answers together as alone"
    grep -q "users at once" users.svg || fail "the picture has no axis"
    box_holds users.svg
fi
finish
