#!/usr/bin/env bash
# needs: model. A chat template that llama.cpp does not know: said, plain text in its place, answers that end.
# shellcheck disable=SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
need_model
odd="tokenizer.chat_template=string:{% for m in messages %}<<{{ m['role'] }}: {{ m['content'] }}>>{% endfor %}"
"${SQUEEZE_SOURCE:?}/tests/make_model.py" "$SQUEEZE_MODEL" "$folder/odd.gguf" "$odd" || exit 1
write_document "$folder/book.txt" 1500
context=$folder/book.sqz.gguf

run 0 prepare -q "$folder/book.txt" -m "$folder/odd.gguf"
err_has "the model's chat template is not one that llama.cpp knows" '"Question: ..."'
err_lines 1
run 0 ask "$context" "Who may copy it?" -m "$folder/odd.gguf" --budget 1 --max-tokens 400 --json
err_has "the model's chat template is not one that llama.cpp knows"
err_lines 1
out_has '"end": "end"'
json_in n_tokens 1 399
run 0 inspect "$context"
out_has "without a chat template"

# Nothing to say where no template is asked for, or one is known.
run 0 prepare -q --raw "$folder/book.txt" -m "$folder/odd.gguf"
err_lines 0
run 0 prepare -q "$folder/book.txt"
err_lines 0
finish
