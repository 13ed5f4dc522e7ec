#!/usr/bin/env bash
# Makes a Debian package of a build: the program with its man page and completion, the library, and a systemd unit for
# `squeeze serve` (share/debian/). The pinned llama.cpp is inside the program and the library, so that the package depends
# on none; what it does depend on dpkg-shlibdeps reads from the binaries.
#
#   scripts/deb.sh BUILD-FOLDER [FOLDER]     writes FOLDER/squeeze_VERSION_ARCHITECTURE.deb (default: BUILD-FOLDER)
#
# DEB_REVISION is the part of the version behind the dash (1), DEB_COMPRESSION dpkg-deb's (xz); DEBFULLNAME and DEBEMAIL name who made it; with
# SOURCE_DATE_EPOCH the same build gives the same package.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo 'usage: scripts/deb.sh BUILD-FOLDER [FOLDER]' >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$(realpath "$1")
out=$(realpath "${2:-$1}")
for tool in dpkg-deb dpkg-shlibdeps strip; do
    command -v "$tool" >/dev/null || { echo "deb: error: $tool is missing; install dpkg-dev and binutils" >&2; exit 1; }
done
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/stage
documents=$stage/usr/share/doc/squeeze
version=$(sed -n 's/^#define SQZ_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\).*/\2/p' "$root/include/squeeze.h" | paste -sd .)
revision=${DEB_REVISION:-1}
maintainer="${DEBFULLNAME:-squeeze maintainers} <${DEBEMAIL:-squeeze@users.noreply.github.com}>"
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(stat -c %Y "$root/NEWS.md")}

# put MODE FILE TO: a file of ours, compressed where the name says so.
put() {
    mkdir -p "$(dirname "$stage/$3")"
    case $3 in
    *.gz) gzip -9nc "$2" >"$stage/$3" ;;
    *) cp "$2" "$stage/$3" ;;
    esac
    chmod "$1" "$stage/$3"
}
# As a field of a copyright file has more than one line.
as_field() {
    sed 's/^$/./; s/^/ /'
}

# ---- Files -------------------------------------------------------------------------------

DESTDIR=$stage cmake --install "$build" --prefix /usr --strip >"$work/install.log" || { tail -n 5 "$work/install.log" >&2; exit 1; }
find "$stage/usr" -name '*.a' -exec strip --strip-debug --enable-deterministic-archives {} +
find "$stage/usr" -name 'lib*.so*' -type f -exec chmod 644 {} +
[ -x "$stage/usr/bin/squeeze" ] || { echo "deb: error: $build has no program" >&2; exit 1; }
find "$stage/usr/share/man" -name '*.1' -exec gzip -9n {} +
mv "$stage/usr/share/zsh/site-functions" "$stage/usr/share/zsh/vendor-completions"
mv "$stage/usr/bin/squeeze" "$work/squeeze"
has_server=$("$work/squeeze" --list-options | grep -c '^serve' || true)
mv "$work/squeeze" "$stage/usr/bin/squeeze"
if [ "$has_server" -gt 0 ]; then
    put 644 "$root/share/debian/squeeze.service" usr/lib/systemd/system/squeeze.service
    put 644 "$root/share/debian/default" etc/default/squeeze
fi

put 644 "$root/share/debian/lintian-overrides" usr/share/lintian/overrides/squeeze
mkdir -p "$documents"
licence=$work/llama.licence
mv "$documents/LICENSE.llama.cpp" "$licence" 2>/dev/null || echo "see https://github.com/ggml-org/llama.cpp" >"$licence"
rm -f "$documents/LICENSE"
sed -n '/Copyright (C)/,/^ \* You can contact/{/You can contact/d; s/^ \* \{0,1\}//; p}' \
    "$(sed -n 's/^XXHASH_INCLUDE_DIR:PATH=//p' "$build/CMakeCache.txt")/xxhash.h" >"$work/xxhash.licence"
while IFS= read -r line; do
    case $line in
    '@llama text@') as_field <"$licence" ;;
    '@xxhash text@') sed '1,/^$/d; ${/^$/d}' "$work/xxhash.licence" | as_field ;;
    *'@llama holders@') echo "Copyright: $(sed -n 's/^Copyright (c) //p' "$licence" | head -n 1)" ;;
    *'@xxhash holders@') echo "Copyright: $(sed -n 's/^Copyright (C) //p' "$work/xxhash.licence")" ;;
    *) printf '%s\n' "$line" ;;
    esac
done <"$root/share/debian/copyright" >"$documents/copyright"
put 644 "$root/NEWS.md" usr/share/doc/squeeze/changelog.gz
printf 'squeeze (%s-%s) unstable; urgency=medium\n\n  * Built from the sources of %s.\n\n -- %s  %s\n' "$version" "$revision" \
    "$version" "$maintainer" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" >"$work/changelog"
put 644 "$work/changelog" usr/share/doc/squeeze/changelog.Debian.gz

# ---- What dpkg reads ---------------------------------------------------------------------

mkdir -p "$stage/DEBIAN" "$work/debian"
printf 'Source: squeeze\n\nPackage: squeeze\nArchitecture: any\n' >"$work/debian/control"
mapfile -t binaries < <(find "$stage/usr" -type f \( -name 'lib*.so*' -o -path '*/bin/squeeze' \))
depends=$(cd "$work" && dpkg-shlibdeps -O "${binaries[@]/#/-e}" | sed -n 's/^shlibs:Depends=//p')
cat >"$stage/DEBIAN/control" <<CONTROL
Package: squeeze
Version: $version-$revision
Section: science
Priority: optional
Architecture: $(dpkg --print-architecture)
Maintainer: $maintainer
Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$stage" | cut -f 1)
Depends: $depends, adduser
Suggests: nginx, pandoc, poppler-utils
Description: many questions about one long document
 Reads a document once with a language model, and answers questions about it by
 reading a tenth of its keys and values (Squeezed Attention). The program
 prepares documents, answers and serves them over HTTP to many users, by the
 interfaces that clients of OpenAI's and Anthropic's speak; the library does the
 same for other programs. Models are GGUF files; none comes along.
CONTROL
soname=$(find "$stage/usr" -name 'libsqueeze.so.*.*' -type l -printf '%f\n')
[ -z "$soname" ] || printf 'libsqueeze %s squeeze (>= %s)\n' "${soname#libsqueeze.so.}" "$version" >"$stage/DEBIAN/shlibs"
[ -z "$soname" ] || echo 'activate-noawait ldconfig' >"$stage/DEBIAN/triggers"
if [ "$has_server" -gt 0 ]; then
    echo /etc/default/squeeze >"$stage/DEBIAN/conffiles"
    for script in postinst prerm postrm; do put 755 "$root/share/debian/$script" "DEBIAN/$script"; done
fi
(cd "$stage" && find usr -type f -printf '%P\0' | sort -z | sed -z 's|^|usr/|' | xargs -0 md5sum >DEBIAN/md5sums)
find "$stage" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group "-Z${DEB_COMPRESSION:-xz}" --build "$stage" "$out" >/dev/null
echo "$out/squeeze_$version-${revision}_$(dpkg --print-architecture).deb"
