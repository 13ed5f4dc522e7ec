# Completion of squeeze's command line in bash. What there is the program itself says (--list-options), in lines of a name,
# a short form, an argument, choices and help, separated by tabs: nothing here goes out of date.
# shellcheck shell=bash

# _squeeze_files KIND: completes names of files, or of folders alone.
_squeeze_files() {
    compopt -o filenames 2>/dev/null
    case $1 in
    FOLDER) mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
    *) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
    esac
}

_squeeze() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} list at=1
    local -a asked=("${COMP_WORDS[0]/#\~/$HOME}")
    COMPREPLY=()
    # Words in front that choose a command, and a subject of it.
    list=$("${asked[@]}" --list-options 2>/dev/null) || return
    while [ "$at" -lt "$COMP_CWORD" ] && [[ ${COMP_WORDS[at]} != -* ]] &&
        [ -n "$(awk -F '\t' -v word="${COMP_WORDS[at]}" '$1 == word' <<<"$list")" ]; do
        [ "${COMP_WORDS[at]}" = help ] || asked+=("${COMP_WORDS[at]}")
        list=$("${asked[@]}" --list-options 2>/dev/null) || return
        at=$((at + 1))
    done
    # "--name=value" comes as three words.
    [ "$current" != = ] || current=
    [ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD - 2]}
    local argument choices
    IFS='|' read -r argument choices < <(awk -F '\t' -v name="$before" '
        name ~ /^-/ && (name == $1 || name == $2) && $3 != "" { print $3 "|" $4; exit }' <<<"$list")
    case $argument in
    FILE | FOLDER | CONTEXT) _squeeze_files "$argument" ;;
    ?*) mapfile -t COMPREPLY < <(compgen -W "${choices//,/ }" -- "$current") ;;
    *)
        if [[ $current == -* ]] || ! grep -q '^-' <<<"$list" || [ "${#asked[@]}" -eq 1 ]; then
            mapfile -t COMPREPLY < <(compgen -W "$(cut -f 1 <<<"$list")" -- "$current")
        else
            _squeeze_files FILE
        fi
        ;;
    esac
}
complete -F _squeeze squeeze
