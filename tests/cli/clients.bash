# A virtual environment with the packages of clients.txt, kept in the cache by what that file says; sourced behind helpers.bash.
# shellcheck shell=bash disable=SC2154
# need_packages: $python runs with them; where they cannot be had, the test is skipped.
need_packages() {
    local list cache key made
    list=$(dirname "${BASH_SOURCE[0]}")/clients.txt
    python=$(command -v python3) || { echo "skipped: python3 is missing" >&2; exit 77; }
    cache=$("${SQUEEZE_SOURCE:?}/scripts/setup.sh" --where cache)
    key=$({ cat "$list"; "$python" --version; } | sha256sum | cut -c1-12)
    mkdir -p "$cache/clients"
    exec 8>"$cache/clients/lock" # other tests may want them, too
    flock 8
    if [ ! -e "$cache/clients/$key/complete" ]; then
        made=$cache/clients/$key # its programs have this path in them: it cannot be moved into place
        rm -rf "$made"
        "$python" -m venv "$made" >"$folder/venv.log" 2>&1 ||
            { tail -n 3 "$folder/venv.log"; echo "skipped: python3 -m venv (python3-venv) is missing"; exit 77; } >&2
        "$made/bin/pip" install -q --disable-pip-version-check --retries 1 --timeout 20 -r "$list" >"$folder/venv.log" 2>&1 ||
            { tail -n 3 "$folder/venv.log"; echo "skipped: the packages of clients.txt cannot be had"; exit 77; } >&2
        touch "$made/complete"
    fi
    exec 8>&-
    python=$cache/clients/$key/bin/python
    export PYTHONWARNINGS=ignore
}
