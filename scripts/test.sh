#!/usr/bin/env bash
# Install what the tests need, lint, and run them. Arguments go to pytest.
#
#     bash scripts/test.sh [PYTEST ARGUMENT …]
#
# Takes the active virtual environment, or makes .venv (see environment.sh). With OPEN_CLIP_REPO set to a clone of
# OpenCLIP the trainer's tests run on the real pinned commit, OpenCLIP's own tests among them; else on the tree that
# setup_open_clip.sh makes from the wheels.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
case ${1:-} in -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac

source scripts/environment.sh
use_environment quickstart,test

ruff check .
ruff format --check .
for script in scripts/*.sh configs/*.sh; do bash -n "$script"; done
exec "$PYTHON" -m pytest "$@"
