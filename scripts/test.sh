#!/usr/bin/env bash
# Install what the tests need, check style and types, and run the tests. Arguments go to pytest.
#
#     bash scripts/test.sh [PYTEST ARGUMENT …]
#
# The script uses the active virtual environment; if there is none, it makes .venv at the
# repository's root. If OPEN_CLIP_REPO is set to a clone of OpenCLIP, the trainer's tests run on the
# real pinned commit, with OpenCLIP's own tests; otherwise on the same trainer from PyPI packages.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' scripts/test.sh; exit ;; esac

# shellcheck source-path=SCRIPTDIR source=environment.sh
source scripts/environment.sh
extras=quickstart,export,test
case " $* " in *" extended "*) extras+=,evaluate ;; esac # 280 MB, and a second for each process
use_environment "$extras"

ruff check .
ruff format --check .
shellcheck -x scripts/*.sh configs/*.sh .ci/run
mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # each of several processes would take all cores
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
