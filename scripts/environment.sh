# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and evaluate.sh: the Python environment in which they run.
#
# use_environment EXTRA[,EXTRA]: use the active virtual environment, or make .venv at the
# repository's root if none is active. Install this package there with the given extras of
# pyproject.toml, and set PYTHON. If no environment is active, the versions are those that the tests
# ran on, where tests/ has a list for this Python. In an active environment, also .venv, the ranges
# of pyproject.toml apply, so that your torch stays. Run again, it installs only after a change.

use_environment() {
    local root extras=$1 version constraints=()
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        VIRTUAL_ENV=$root/.venv
        [ -x "$VIRTUAL_ENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VIRTUAL_ENV"
        version=$("$VIRTUAL_ENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        [ ! -f "$root/tests/constraints-$version.txt" ] ||
            constraints=(-c "$root/tests/constraints-$version.txt")
    fi
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    export PYTHON=$VIRTUAL_ENV/bin/python
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: found $("$PYTHON" --version) in $VIRTUAL_ENV, expected 3.10 or newer: set" \
            "PYTHON to a newer one, and remove .venv if it was made with the older one" >&2
        exit 1
    }

    local stamp=$VIRTUAL_ENV/.recipe-$extras wanted
    wanted="$(cat "$root/pyproject.toml" "${constraints[@]:1}" | git hash-object --stdin) $root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing this package ($extras) into $VIRTUAL_ENV"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" \
            -e "${root}[$extras]"
        echo "$wanted" >"$stamp"
    fi
}
