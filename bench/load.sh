#!/usr/bin/env bash
# How fast `squeeze ask` is beside other work on two cores: on an idle machine, beside one busy process that is pinned
# nowhere, and two at once. With a program of an earlier version also how fast that one is on the idle machine.
#
#   bench/load.sh PROGRAM [--baseline PROGRAM] [--context FILE] [--rounds N] [--tokens N] [--json]
#
# A round runs every case once, what is compared in turns and in changing order, since machines change their speed;
# ratios are of one round, and their median is told, with the least and the most. The context is made from this
# repository's documents where FILE is not there yet; without --context it is removed afterwards. Does not start, and
# does not go on, where something else uses the machine. Where there are more cores, two of them are used.
set -euo pipefail
export LC_ALL=C
usage() {
    sed -n 's/^# \{0,1\}//; 5p' "$0" >&2
    exit 2
}
say() { printf '%s\n' "$*" >&2; }

program='' baseline='' context='' rounds=7 tokens=128 json=false command="bench/load.sh $*"
while [ $# -gt 0 ]; do
    case $1 in
    --baseline | --context | --rounds | --tokens)
        [ $# -gt 1 ] || usage
        declare "${1#--}=$2"
        shift
        ;;
    --json) json=true ;;
    -*) usage ;;
    *) program=$1 ;;
    esac
    shift
done
[ -n "$program" ] || usage
for file in "$program" ${baseline:+"$baseline"}; do
    [ -x "$file" ] || { say "load.sh: $file is no program"; exit 1; }
done
if [ "$(nproc)" -gt 2 ]; then # this shell and all it starts
    taskset -cp "$(taskset -cp $$ | awk '{ n = split($NF, set, /[-,]/)
        print set[1] "," ($NF ~ /^[0-9]+-/ ? set[1] + 1 : set[2]) }')" $$ >/dev/null
fi
[ "$(nproc)" -eq 2 ] || { say "load.sh: two cores are needed, $(nproc) may be used here"; exit 1; }

folder=$(mktemp -d "${TMPDIR:-/tmp}/load.XXXXXX")
busy=
stop_busy() {
    [ -z "$busy" ] || kill "$busy" 2>/dev/null || true
    [ -z "$busy" ] || wait "$busy" 2>/dev/null || true
    busy=
}
trap 'stop_busy; rm -rf "$folder"' EXIT

# used: hundredths of a second that all CPUs have worked.
used() { awk '/^cpu / { print $2 + $3 + $4 + $7 + $8 }' /proc/stat; }
# Waits a little for half a second in which nothing else works.
need_idle() {
    local before after tries
    for tries in 1 2 3 4 5 6 7 8; do
        before=$(used)
        sleep 0.5
        after=$(used)
        [ $((after - before)) -gt 6 ] || return 0
    done
    say "load.sh: something else uses $((2 * (after - before)))% of a core, after $tries looks: an idle machine is needed"
    exit 1
}

need_idle
: "${context:=$folder/context.sqz.gguf}"
if [ ! -f "$context" ]; then
    say "preparing 4,000 tokens"
    source=$(dirname "$0")/..
    cat "$source"/README.md "$source"/docs/*.md >"$folder/book.txt"
    "$program" prepare -q --truncate=4000 "$folder/book.txt" -o "$context" 2>/dev/null
fi

# ask PROGRAM RESULT: one answer; RESULT gets its JSON.
ask() {
    "$1" ask "$context" "Explain in detail what this text is about." --max-tokens "$tokens" --json >"$2"
}
value() { sed -n "s/^ *\"$2\": \([0-9.e+-]*\),\{0,1\}\$/\1/p" "$1"; }
# put CASE RESULT...: a line "CASE tokens/s first-token-seconds" in the list of results; of several the sum and the
# worst.
put() {
    local case=$1 file
    shift
    for file; do
        [ "$(value "$file" n_tokens)" -ge 16 ] || { say "load.sh: an answer is too short to be timed"; exit 1; }
        echo "$(value "$file" tokens_per_second) $(value "$file" first_token_seconds)"
    done | awk -v case="$case" '{ speed += $1; if ($2 > first) first = $2 } END { print case, speed, first }' \
        >>"$folder/list"
}
idle() {
    ask "$2" "$folder/a"
    put "$1" "$folder/a"
}

"$program" ask "$context" "Why?" --max-tokens 2 >"$folder/a" # pages of model and context come to memory
for ((round = 0; round < rounds; round++)); do
    say "round $((round + 1)) of $rounds"
    need_idle
    if [ -n "$baseline" ] && ((round % 2)); then idle before "$baseline"; fi
    idle idle "$program"
    if [ -n "$baseline" ] && ! ((round % 2)); then idle before "$baseline"; fi
    sh -c 'while :; do :; done' &
    busy=$!
    idle busy "$program"
    stop_busy
    ask "$program" "$folder/a" &
    ask "$program" "$folder/b"
    wait $!
    put two "$folder/a" "$folder/b"
done

# Medians of each case and of the ratios to the same round's idle run.
# version PROGRAM: with the commit of the folder it lies in, where that is one.
version() {
    "$1" --version | sed -n '1s/^squeeze //p' | tr -d '\n'
    git -C "$(dirname "$1")" log -1 --format=' (%h)' 2>/dev/null || true
}
model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
awk -v json=$json -v rounds="$rounds" -v tokens="$tokens" -v command="$command" -v version="$(version "$program")" \
    -v before="${baseline:+$(version "$baseline")}" -v cpu="$model" -v kernel="$(uname -sr)" -v date="$(date -u +%F)" '
function sort(a, n, i, j, t) {
    for (i = 2; i <= n; i++) for (j = i; j > 1 && a[j] < a[j - 1]; j--) { t = a[j]; a[j] = a[j - 1]; a[j - 1] = t }
}
# Median, least and most of what a round gave, as text.
function three(table, name, format, i, a, middle) {
    for (i = 1; i <= rounds; i++) a[i] = table[name, i]
    sort(a, rounds)
    middle = rounds % 2 ? a[(rounds + 1) / 2] : (a[rounds / 2] + a[rounds / 2 + 1]) / 2
    format = json == "true" ? "{\"median\": " format ", \"least\": " format ", \"most\": " format "}" \
                            : format " (" format " to " format ")"
    return sprintf(format, middle, a[1], a[rounds])
}
function ratios_of(name, over, under, i) {
    if (!n[over] || !n[under]) return
    label[++ratios] = name
    for (i = 1; i <= rounds; i++) ratio[name, i] = speed[over, i] / speed[under, i]
}
function print_json_object(title, table, names, n_names, format, i) {
    printf ",\n  \"%s\": {", title
    for (i = 1; i <= n_names; i++)
        printf "%s\n    \"%s\": %s", (i > 1 ? "," : ""), names[i], three(table, names[i], format)
    printf "\n  }"
}
function print_json(i, parts) {
    printf "{\n"
    for (i = 1; i <= ratios; i++) {
        split(three(ratio, label[i], "%.3f"), parts, /[:,]/)
        printf "  \"%s\": %s,\n", label[i], parts[2] + 0
    }
    gsub(/["\\]/, "\\\\&", command)
    printf "  \"rounds\": %d,\n  \"answer_tokens\": %d,\n  \"cores\": 2,\n  \"cpu\": \"%s\"", rounds, tokens, cpu
    print_json_object("ratios", ratio, label, ratios, "%.3f")
    print_json_object("tokens_per_second", speed, name, cases, "%.1f")
    print_json_object("first_token_seconds", first, name, cases, "%.3f")
    printf ",\n  \"system\": \"%s\",\n  \"version\": \"%s\"", kernel, version
    if (before) printf ",\n  \"version_before\": \"%s\"", before
    printf ",\n  \"date\": \"%s\",\n  \"command\": \"%s\"\n}\n", date, command
}
function print_table(i) {
    printf "%s, 2 cores, squeeze %s, %d rounds\n\n", cpu, version, rounds
    printf "%-24s %-26s %s\n", "", "tokens/s", "first token, s"
    for (i = 1; i <= cases; i++)
        printf "%-24s %-26s %s\n", text[name[i]], three(speed, name[i], "%.1f"), three(first, name[i], "%.3f")
    printf "\n"
    for (i = 1; i <= ratios; i++) printf "%-24s %s\n", label[i], three(ratio, label[i], "%.3f")
}
{
    if (!n[$1]++) name[++cases] = $1
    speed[$1, n[$1]] = $2
    first[$1, n[$1]] = $3
}
END {
    text["before"] = "idle, before"
    text["idle"] = "idle"
    text["busy"] = "beside a busy process"
    text["two"] = "two at once, together"
    ratios_of("beside_busy", "busy", "idle")
    ratios_of("two_at_once", "two", "idle")
    ratios_of("idle_vs_before", "idle", "before")
    if (json == "true") print_json()
    else print_table()
}' "$folder/list"
