# What every script of this folder shares; each sources it first.
#
# Environment: SQUEEZE or SQUEEZE_PROGRAM is the program under test, SQUEEZE_MODEL the model of those that need one,
# SQUEEZE_TEST_FOLDER a folder to write into (else the system's temporary one), SQUEEZE_SOURCE the source folder.
# A script calls `run CODE ARGUMENTS...`, then checks what it printed, and ends with `finish`.
# shellcheck shell=bash
set -u
program=${SQUEEZE:-${SQUEEZE_PROGRAM:?set SQUEEZE to the program to test}}
folder=$(mktemp -d "${SQUEEZE_TEST_FOLDER:-${TMPDIR:-/tmp}}/cli.XXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
out=$folder/out err=$folder/err
failures=0
label="(nothing run yet)"
export SQUEEZE_MODEL=${SQUEEZE_MODEL:-}
export LC_ALL=C.UTF-8
# Tests may share the cores: threads that wait must not take them from those that work.
export OMP_WAIT_POLICY=passive
# The source folder stays as it is.
export PYTHONDONTWRITEBYTECODE=1

# fail WHAT: counts a failure and shows the last command's output.
fail() {
    failures=$((failures + 1))
    printf 'FAILED: %s\n  command: %s\n' "$1" "$label" >&2
    sed 's/^/  stdout: /' "$out" 2>/dev/null | head -n 20 >&2
    sed 's/^/  stderr: /' "$err" 2>/dev/null | head -n 20 >&2
}

# run CODE ARGUMENTS...: runs the program; standard input is empty unless $input names a file.
run() {
    local wanted=$1 got=0
    shift
    label="squeeze $*"
    "$program" "$@" >"$out" 2>"$err" <"${input:-/dev/null}" || got=$?
    [ "$got" -eq "$wanted" ] || fail "exit code: got $got, wanted $wanted"
}

# err_has / out_has TEXT...: each must occur.
has() {
    local file=$1 text
    shift
    for text in "$@"; do
        grep -qF -- "$text" "$file" || fail "wanted in $(basename "$file"): $text"
    done
}
err_has() { has "$err" "$@"; }
out_has() { has "$out" "$@"; }
err_lines() {
    local got
    got=$(wc -l <"$err")
    [ "$got" -eq "$1" ] || fail "lines on standard error: got $got, wanted $1"
}

# json KEY: the first value of that name in the output, one a line as --json prints it.
json() {
    sed -n "s/^ *\"$1\": \(.*[^,]\),\{0,1\}\$/\1/p" "$out" | head -n 1
}
# json_in KEY LOW HIGH: a number within the bounds; what is no number fails.
json_in() {
    local value
    value=$(json "$1")
    awk -v x="$value" -v low="$2" -v high="$3" \
        'BEGIN { exit !(x ~ /^-?[0-9.]+([eE][-+]?[0-9]+)?$/ && x + 0 >= low + 0 && x + 0 <= high + 0) }' ||
        fail "$1: got '$value', wanted $2 to $3"
}

# runs_of_parts N: the output is analyze -c's in JSON, with N runs: parts add up to what is predicted, errors are of the times
# beside them, and some run has read codes.
runs_of_parts() {
    awk -v wanted="$1" '
        /"measured_seconds":/ { gsub(/,/, ""); measured = $2 }
        /"predicted_seconds":/ { gsub(/,/, ""); predicted = $2 }
        /"error":/ { gsub(/,/, ""); n++
                     off = $2 - (predicted / measured - 1)
                     if (!(measured > 0 && predicted > 0 && off * off < 1e-6)) bad = 1 }
        /"(rest|lookup|codes|rows)_seconds":/ { gsub(/,/, ""); parts += $2; if ($2 < 0) bad = 1 }
        /"coded_share":/ && predicted { gsub(/,/, "")
                                        if (!($2 >= 0 && $2 <= 1 && (parts / predicted - 1) ^ 2 < 1e-6)) bad = 1
                                        coded += $2 > 0; parts = predicted = 0 }
        END { exit bad || n != wanted || coded == 0 }' "$out" || fail "wanted $1 runs of parts, whose errors are theirs"
}

# until_said PATTERN: waits until a line of the output matches, two minutes at most.
until_said() {
    local i
    for ((i = 0; i < 1200; i++)); do
        grep -qE -- "$1" "$out" && return
        sleep 0.1
    done
}

exists() { [ -s "$1" ] || fail "wanted a file that is not empty: $1"; }
absent() { [ ! -e "$1" ] || fail "wanted no file: $1"; }
# only FILE...: the names in $folder/box must be these and no others.
box_holds() {
    local got wanted
    got=$(find "$folder/box" -mindepth 1 -printf '%f\n' | sort | paste -sd ' ')
    wanted=$(printf '%s\n' "$@" | sort | paste -sd ' ')
    [ "$got" = "$wanted" ] || fail "files in the folder: got '$got', wanted '$wanted'"
}
equal_files() { cmp -s "$1" "$2" || fail "files differ: $1 $2"; }

need_model() {
    [ -f "$SQUEEZE_MODEL" ] && return
    echo "set SQUEEZE_MODEL to the default model: '$SQUEEZE_MODEL' is no file" >&2
    exit 1
}

# few_layers: from here on the model's first four layers are the model, an eighth of the work. Its answers are no sentences
# and need not end: for what does not depend on what the model says. $whole_model is the model itself.
few_layers() {
    whole_model=$SQUEEZE_MODEL
    "${SQUEEZE_SOURCE:?}/tests/make_model.py" "$whole_model" "$folder/few_layers.gguf" --layers 4 || exit 1
    export SQUEEZE_MODEL=$folder/few_layers.gguf
}

# write_document FILE BYTES: an English text of about that many bytes, ending at a line's end.
write_document() {
    local licence=/usr/share/common-licenses/GPL-3
    [ -r "$licence" ] || { echo "$licence is missing" >&2; exit 1; }
    head -c "$2" "$licence" | sed '$d' >"$1"
}

# put_bytes FILE OFFSET TEXT: overwrites bytes; TEXT may hold \xNN.
put_bytes() {
    printf '%b' "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

finish() {
    [ "$failures" -eq 0 ] || { echo "$failures failed" >&2; exit 1; }
    echo "ok"
    exit 0
}

# await_server PID FILE: until the server, whose standard error goes to FILE, says where it listens; the port is then in
# $port. FILE is to be emptied before the server starts, or the port of the one before is found.
await_server() {
    port=
    for _ in $(seq 600); do
        port=$(sed -n 's/.*listening on http:.*:\([0-9]*\)$/\1/p' "$2")
        if [ -n "$port" ] || ! kill -0 "$1" 2>/dev/null; then break; fi
        sleep 0.1
    done
    cp "$2" "$err"
    [ -n "$port" ] || { fail "the server did not start"; finish; }
}
