#!/usr/bin/env bash
# Prepares a document that every Debian machine has, the GNU General Public License, and asks it two questions whose
# answers stand in it.
#
#   scripts/demo.sh <program> <folder>
set -euo pipefail

if [ $# -ne 2 ]; then
    echo 'usage: scripts/demo.sh PROGRAM FOLDER' >&2
    exit 2
fi
program=$1
folder=$2
document=/usr/share/common-licenses/GPL-3
context=$folder/gpl-3.sqz.gguf

# The answers stand in section 15 ("There is no warranty for the program") and in the last paragraph, which sends authors
# of subroutine libraries to the Lesser General Public License.
questions=(
    'Does the program come with a warranty?'
    'Which license is recommended for a subroutine library?'
)

if [ ! -r "$document" ]; then
    echo "demo: error: $document, which Debian's base-files brings, is not there;" \
        "use a text of your own: $program prepare TEXT" >&2
    exit 1
fi
mkdir -p "$folder"
if [ "$context" -nt "$document" ] && [ "$context" -nt "$program" ]; then
    echo "demo: $context is there already"
else
    echo "demo: preparing $document, once"
    "$program" prepare "$document" -o "$context"
fi
for question in "${questions[@]}"; do
    printf '\n> %s\n' "$question"
    "$program" ask -v --max-tokens 40 "$context" "$question"
done
printf '\ndemo: the answers can be checked in %s. Ask more: %s chat %s\n' "$document" "$program" "$context"
