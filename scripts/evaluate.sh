#!/usr/bin/env bash
# Evaluate checkpoints zero-shot with LAION's clip-benchmark, next to published models.
#
#     bash scripts/evaluate.sh CHECKPOINT … --model M [--suite S] [--data DIR] [further options]
#
#     CHECKPOINT …   checkpoints of a run, state dicts or safetensors; several of a run give its
#                    learning curve
#     --model M      an OpenCLIP model name, or a model config FILE.json
#     --suite S      imagenet (default), retrieval, datacomp38, or names of data sets with commas
#     --data DIR     folder of the data sets in WebDataset form; default: download them from the Hub
#     --output DIR   folder for the results; default: evaluation/ in the folder of the run
#     --batch-size N, --workers N    images at a time (64), and processes that decode (4)
#     --device NAME  cuda or cpu; default: a GPU if there is one
#
# The script writes results.jsonl, in clip-benchmark's format, and accuracy.png.
# docs/evaluate-and-export.md describes the data sets and their metrics.
#
# The script installs clip-benchmark with this package (the extra `evaluate`) into the active virtual
# environment; if there is none, into .venv. Run it again to continue: data sets that are in
# results.jsonl are not evaluated again.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$ROOT/scripts/environment.sh"
case " $* " in
    *" -h "* | *" --help "*)
        sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        printf '\nAll options: python scripts/evaluate.py --help\n'
        exit ;;
esac
use_environment evaluate
exec "$PYTHON" "$ROOT/scripts/evaluate.py" "$@"
