#!/usr/bin/env bash
# The Debian package of a build, installed into a clean system: a document prepared and asked about by the installed
# command, and by the server as the unit starts it (its command and environment, by its user; systemd does not run there).
# Removing and purging leave the system as it was. Before that lintian and systemd-analyze say what they think.
#
#   check_deb.sh BUILD-FOLDER     works in $SQUEEZE_TEST_FOLDER, with $SQUEEZE_MODEL; the clean system, once made by
#                                 debootstrap, stays in the per-user cache (scripts/setup.sh)
set -euo pipefail

build=$1
folder=$SQUEEZE_TEST_FOLDER
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
skip() { echo "skipped: $*" >&2; exit 77; }
fail() { echo "FAILED: $*" >&2; exit 1; }

# shellcheck source=/dev/null
. /etc/os-release
case ${ID:-} in
debian) mirror=http://deb.debian.org/debian components=main ;;
ubuntu) mirror=http://archive.ubuntu.com/ubuntu components=main,universe ;;
*) skip "neither Debian nor Ubuntu: a package is for the system that it is built on" ;;
esac
[ "$(id -u)" -eq 0 ] || skip "only root can make a clean system and change into it"
for tool in debootstrap dpkg-deb dpkg-shlibdeps unshare curl; do
    command -v "$tool" >/dev/null || skip "$tool is missing"
done
unshare --mount --pid --fork true 2>/dev/null || skip "file systems cannot be mounted here"

# ---- The package itself --------------------------------------------------------------------

rm -rf "${folder:?}"/*
package=$(DEB_COMPRESSION=gzip "$source/scripts/deb.sh" "$build" "$folder")
depends=$(dpkg-deb -f "$package" Depends)
for wanted in libc6 libgomp1 libjansson4 libmicrohttpd adduser; do
    [[ $depends == *$wanted* ]] || fail "$wanted is not among what it depends on: $depends"
done
if command -v lintian >/dev/null; then
    said=$(lintian --allow-root --fail-on warning "$package" 2>&1) || fail "lintian: $said"
fi

# ---- The clean system -------------------------------------------------------------------------

cache=$("$source/scripts/setup.sh" --where cache)
kept=$cache/system-$VERSION_CODENAME-$(dpkg --print-architecture).tar
read -ra names <<<"$(sed 's/ *([^)]*)//g; s/,/ /g' <<<"$depends")"
if [ ! -f "$kept" ]; then
    debootstrap --variant=minbase --components="$components" "$VERSION_CODENAME" "$folder/new" "$mirror" >"$folder/debootstrap.log" 2>&1 ||
        { tail -n 3 "$folder/debootstrap.log" >&2; skip "debootstrap could not make a clean system"; }
    # What the package will need lies ready in apt's cache.
    chroot "$folder/new" apt-get -qq -y install --no-install-recommends --download-only "${names[@]}" >"$folder/apt.log" 2>&1 ||
        { tail -n 3 "$folder/apt.log" >&2; skip "packages could not be downloaded"; }
    tar -C "$folder/new" -cf "$kept.new" .
    mv "$kept.new" "$kept"
    rm -rf "$folder/new"
fi
system=$folder/system
mkdir "$system"
tar -C "$system" --exclude './dev/*' -xf "$kept"
cp "$package" "$system/srv/squeeze.deb"

if command -v systemd-analyze >/dev/null; then
    dpkg-deb -x "$package" "$folder/files"
    unit=$folder/files/usr/lib/systemd/system/squeeze.service
    # What is verified must be there: a copy of the unit that names the program where it lies now.
    sed "s|^ExecStart=/usr|ExecStart=$folder/files/usr|" "$unit" >"$folder/squeeze.service"
    said=$(systemd-analyze verify --man=no "$folder/squeeze.service" 2>&1 | grep -F squeeze || true)
    [ -z "$said" ] || fail "systemd-analyze verify: $said"
    # 0 to 100, of exposure; systemd calls what is below 20 safe, and 96 a service without a word on it.
    if systemd-analyze --help | grep -q -e --threshold; then
        said=$(systemd-analyze security --offline=true --threshold=20 "$folder/squeeze.service" 2>&1) || fail "$said"
    fi
fi

# ---- Within it ----------------------------------------------------------------------------------

# snapshot: the files that there are but for dpkg's and apt's own, and users and groups.
snapshot() {
    find "$system" -xdev \( -path "$system/var/lib/dpkg" -o -path "$system/var/cache" -o -path "$system/var/log" -o \
        -path "$system/var/lib/apt" -o -path "$system/proc" -o -path "$system/dev" -o -path "$system/run" -o \
        -path "$system/srv" \) -prune -o -printf '%P %M %u %g\n' |
        grep -vE '^(etc/(passwd|group|shadow|gshadow|subuid|subgid)-|etc/ld.so.cache|var/lib/systemd) ' | sort
    sort "$system/etc/passwd" "$system/etc/group"
}
# inside COMMAND...: in the system, with /proc and /dev.
inside() {
    # shellcheck disable=SC2016 # they are the inner shell's
    unshare --mount --pid --fork --kill-child sh -c '
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && shift && exec "$@"' - "$system" \
        env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive OMP_WAIT_POLICY=passive \
        chroot "$system" "$@"
}
# What it depends on comes first and stays: what that leaves of itself is not ours (MPI's libraries leave a group).
inside apt-get -qq -y install --no-install-recommends --no-download "${names[@]}" >"$folder/needed.log" 2>&1 ||
    inside apt-get -qq -y install --no-install-recommends "${names[@]}" >"$folder/needed.log" 2>&1 ||
    { tail -n 5 "$folder/needed.log" >&2; fail "what the package depends on cannot be installed"; }
snapshot >"$folder/before"
inside apt-get -qq -y install --no-install-recommends --no-download /srv/squeeze.deb >"$folder/install.log" 2>&1 ||
    inside apt-get -qq -y install --no-install-recommends /srv/squeeze.deb >"$folder/install.log" 2>&1 ||
    { tail -n 5 "$folder/install.log" >&2; fail "the package cannot be installed"; }
[ "$(inside getent passwd _squeeze | cut -d : -f 6,7)" = /var/lib/squeeze:/usr/sbin/nologin ] || fail "the user _squeeze"
[ "$(inside stat -c '%U %G %a' /var/lib/squeeze)" = '_squeeze _squeeze 750' ] || fail "the folder /var/lib/squeeze"
for file in /usr/share/man/man1/squeeze.1.gz /usr/share/bash-completion/completions/squeeze; do
    [ -s "$system$file" ] || fail "$file is missing"
done

# By the command. The build's own program must say the same of what was prepared there.
state=$system/var/lib/squeeze
cp --reflink=auto "$SQUEEZE_MODEL" "$state/model.gguf"
chmod 644 "$state/model.gguf"
head -c 3000 "$system/usr/share/common-licenses/GPL-3" | sed '$d' >"$system/srv/licence.txt"
question="Who holds the copyright of this license?"
inside squeeze prepare -q -m /var/lib/squeeze/model.gguf /srv/licence.txt -o /srv/licence.sqz.gguf ||
    fail "the installed program prepares nothing"
answer=$(inside squeeze ask -m /var/lib/squeeze/model.gguf -n 24 /srv/licence.sqz.gguf "$question" 2>"$folder/ask.err")
wanted=$("${SQUEEZE_PROGRAM:-$build/squeeze}" ask -m "$SQUEEZE_MODEL" -n 24 "$system/srv/licence.sqz.gguf" "$question" 2>"$folder/ask.err")
[ "${answer:-nothing}" = "$wanted" ] || fail "the installed program answers '$answer', the build '$wanted'"
echo "asked: $question answered: $answer"

# By the server: what the unit says, read as systemd does.
unit=$system/usr/lib/systemd/system/squeeze.service
value() { sed -n "s/^$1=//p" "$unit"; }
install -d -o "$(inside id -u _squeeze)" -g "$(inside id -g _squeeze)" "$state/contexts"
install -o "$(inside id -u _squeeze)" -g "$(inside id -g _squeeze)" -m 600 "$system/srv/licence.sqz.gguf" "$state/contexts/"
sed -i 's/--port 8080/--port 0/' "$system/etc/default/squeeze"
cat >"$system/srv/start" <<START
set -a; $(value Environment); . $(value EnvironmentFile | tr -d -); set +a
cd $(value WorkingDirectory); umask $(value UMask)
exec setpriv --reuid $(value User) --regid $(value Group) --init-groups --no-new-privs --bounding-set -all $(value ExecStart)
START
: >"$folder/server.err"
inside sh /srv/start >"$folder/server.out" 2>"$folder/server.err" &
server=$!
trap 'kill -9 $server 2>/dev/null || true' EXIT
port=
for _ in $(seq 300); do
    port=$(sed -n 's/.*1 context, listening on http:.*:\([0-9]*\)$/\1/p' "$folder/server.err")
    if [ -n "$port" ] || ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 0.1
done
[ -n "$port" ] || { cat "$folder/server.err" >&2; fail "the server did not start"; }
served=$(curl -sS "http://127.0.0.1:$port/v1/chat/completions" -d '{"model": "licence", "temperature": 0, "max_tokens": 24,
    "messages": [{"role": "user", "content": "'"$question"'"}]}')
grep -qF '"cached_tokens":' <<<"$served" || fail "the server answers: $served"
! grep -qF '"content":""' <<<"$served" || fail "the server's answer is empty: $served"
curl -sS -o /dev/null "http://127.0.0.1:$port/v1/contexts?name=new" -H 'Content-Type: text/plain' --data-binary 'A small text of one line.'
for _ in $(seq 300); do
    [ ! -f "$state/contexts/new.sqz.gguf" ] || break
    sleep 0.1
done
[ "$(inside stat -c '%U %a' /var/lib/squeeze/contexts/new.sqz.gguf)" = '_squeeze 600' ] || fail "an upload is not the user's"
process=$server
while child=$(pgrep -P "$process"); do process=$child; done
kill -TERM "$process"
wait "$server" || fail "the server ended with $?: $(tail -n 3 "$folder/server.err")"

# Away again.
inside apt-get -qq -y remove squeeze >"$folder/remove.log" 2>&1 || fail "it cannot be removed: $(tail -n 3 "$folder/remove.log")"
for file in "$state/contexts/new.sqz.gguf" "$system/etc/default/squeeze"; do
    [ -f "$file" ] || fail "removing takes $file"
done
inside apt-get -qq -y purge squeeze >"$folder/purge.log" 2>&1 || fail "it cannot be purged: $(tail -n 3 "$folder/purge.log")"
snapshot >"$folder/after"
diff "$folder/before" "$folder/after" >&2 || fail "purging leaves or takes something"
rm -rf "${folder:?}"/*
echo ok
