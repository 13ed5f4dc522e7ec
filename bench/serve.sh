#!/usr/bin/env bash
# `squeeze serve` beside llama-server of the same llama.cpp, on the same model, with the same threads: users on one
# document and on documents of their own, the first token after a restart, what serving costs over `squeeze ask`, gaps
# between streamed tokens while another document is read, and idle streams.
#
#   bench/serve.sh PROGRAM --llama LLAMA-SERVER --model MODEL.gguf --documents FOLDER --out FILE.json
#                  [--work FOLDER] [--steps "STEP ..."] [OPTIONS of serve_client.py]
#
# FOLDER has long texts, .txt or L-Eval's .jsonl (`input`); the first nine of at least 5.2 bytes a token are taken.
# --work keeps contexts, llama-server's saved slots and every step's figures, so that steps can run apart and again;
# without it all is made anew and removed. Steps, in order: prepare and read (contexts of the documents, and what
# llama-server keeps of them: minutes, no figures), alone, one, many, restart, overhead, gap, idle, table (joins what the
# steps found into --out). An idle machine is needed; one, many and restart take --only squeeze or --only llama.
#
# llama-server: a slot a user, flash attention, its cache of each slot's document restored from a file, so that no user
# waits for reading; with one unified cache and with a cache for each slot, of which the faster is compared with.
set -euo pipefail
export LC_ALL=C
usage() {
    sed -n 's/^# \{0,1\}//; 6,7p' "$0" >&2
    exit 2
}

program='' out='' work='' more=() command="bench/serve.sh $*"
steps='prepare read alone one many restart overhead gap idle table'
while [ $# -gt 0 ]; do
    case $1 in
    --out | --work | --steps)
        [ $# -gt 1 ] || usage
        declare "${1#--}=$2"
        shift
        ;;
    --*)
        [ $# -gt 1 ] || usage
        more+=("$1" "$2")
        shift
        ;;
    *) program=$1 ;;
    esac
    shift
done
if [ ! -x "$program" ] || [ -z "$out" ]; then usage; fi
if [ -z "$work" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/serve.XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi
ulimit -n "$(ulimit -Hn)"
for step in $steps; do
    python3 "$(dirname "$0")/serve_client.py" "$step" --squeeze "$program" --work "$work" --out "$out" \
        --command "$command" "${more[@]}"
done
