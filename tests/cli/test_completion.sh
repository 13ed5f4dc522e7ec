#!/usr/bin/env bash
# needs: nothing; zsh and fish where they are. What shells complete: commands, options of each, choices, files. The scripts
# ask the program, and --list-options must name what --help does.
# shellcheck disable=SC1090,SC1091,SC2034,SC2154
. "$(dirname "$0")/helpers.bash"
scripts=${SQUEEZE_SOURCE:-$(dirname "$0")/../..}/share/completion
mkdir -p "$folder/bin" "$folder/box/a folder"
ln -s "$(realpath "$program")" "$folder/bin/squeeze"
PATH=$folder/bin:$PATH
cd "$folder/box" || exit 1
touch "book one.txt"

# What is listed is what helps says.
label="squeeze --list-options"
commands=$(squeeze --list-options | cut -f 1 | grep -v '^-')
[ "$(squeeze help --list-options)" = "$(squeeze --list-options)" ] || fail "squeeze help --list-options differs"
[ "$(sed -n '/^Commands:/,/^$/s/^  \([a-z]*\) .*/\1/p' <<<"$(squeeze --help)")" = "$commands" ] || fail "commands: $commands"
for command in $commands "bench generate" "bench users" "bench kernels" "bench cluster" "bench logits" "bench rounding"; do
    case $command in help | bench) continue ;; esac
    read -ra words <<<"$command"
    run 0 "${words[@]}" --help
    sed -n 's/^ *\(-[a-z]*, \)\{0,1\}--\(\[no-\]\)\{0,1\}\([a-z0-9-]*\).*/\3/p' "$out" | sort -u >"$folder/wanted"
    run 0 "${words[@]}" --list-options
    [ "$(awk -F '\t' 'NF != 5 || $1 !~ /^--[a-z]/ || $5 == ""' "$out")" = "" ] || fail "a line of other than five fields"
    awk -F '\t' '$5 !~ /^not: / { print substr($1, 3) }' "$out" | sort -u >"$folder/got"
    cmp -s "$folder/wanted" "$folder/got" || fail "$command: --list-options and --help differ"
done

# check SHELL WORDS... : WANTED...: what completes the last word has each WANTED, or has not: !WANTED.
check() {
    local shell=$1 words=() got wanted
    shift
    while [ "$1" != : ]; do words+=("$1"); shift; done
    shift
    label="$shell: ${words[*]}"
    "complete_$shell" "${words[@]}" >"$out" 2>"$err" || fail "the shell failed"
    for wanted; do
        if [ "${wanted#!}" = "$wanted" ]; then grep -qxF -e "$wanted" "$out" || fail "wanted: $wanted"
        else ! grep -qxF -e "${wanted#!}" "$out" || fail "not wanted: ${wanted#!}"; fi
    done
}
complete_bash() {
    bash -c '. "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _squeeze; printf "%s\n" "${COMPREPLY[@]}"' \
        - "$scripts/squeeze.bash" "$@"
}
# Calls the function with stubs of what zsh has for completion, which print what they would offer.
complete_zsh() {
    zsh -f -c '
        _describe() { print -rl -- ${${(P)2}%%:*} }
        _files() { print -rl -- *(N) }
        _arguments() {
            [[ $1 != -S ]] || shift
            local spec previous=$words[CURRENT-1]
            for spec; do
                [[ $spec == ${previous}[=+]* && $previous == -* ]] || continue
                case ${spec#*\]} in
                *:_files*) _files ;;
                *) print -rl -- ${=${${spec##*:\(}%\)}} ;;
                esac
                return
            done
            [[ $words[CURRENT] == -* ]] || { _files; return }
            for spec; do [[ $spec != -* ]] || print -r -- ${${spec%%\[*}%[=+]}; done
        }
        source=$1; shift
        words=("$@") CURRENT=$#
        # As an autoloaded function is called.
        functions[complete]="$(<$source)"
        complete' - "$scripts/_squeeze" "$@"
}
complete_fish() {
    # shellcheck disable=SC2016 # the variables are fish's
    fish --no-config -c 'source $argv[1]; complete -C (string join " " -- $argv[2..])' "$scripts/squeeze.fish" "$@" | cut -f 1
}

for shell in bash zsh fish; do
    command -v "$shell" >/dev/null || { echo "not tried: $shell is missing"; continue; }
    check "$shell" squeeze "" : prepare ask serve help '!--budget'
    check "$shell" squeeze help "" : prepare '!--budget'
    check "$shell" squeeze bench "" : generate cluster '!prepare'
    check "$shell" squeeze bench generate - : --question --json '!--contexts'
    check "$shell" squeeze ask -- : --budget --model '!--truncate'
    check "$shell" squeeze ask x.sqz.gguf --budget 0.1 -- : --temp '!prepare'
    check "$shell" squeeze prepare --rule "" : default paper '!--rule' '!book one.txt'
    check "$shell" squeeze prepare --quiet "" : "book one.txt"
done
check bash squeeze serve --po : --port '!--host'
check bash squeeze serve --contexts "" : "a folder" '!book one.txt'
check bash squeeze serve -m "" : "a folder" "book one.txt"
check bash squeeze prepare --rule = pa : paper '!default'
check bash squeeze ask --budget "" : '!book one.txt'
finish
