#!/usr/bin/env bash
# Download DataComp-12M (captions, image URLs) and DataCompDR-12M (reinforcements), or with --1b the
# reinforcements of DataCompDR-1B, from the Hugging Face Hub.
#
#     bash scripts/download_datacompdr12m.sh --shards 0-3     # a trial: four shards of each
#     bash scripts/download_datacompdr12m.sh                  # all 1,024 of each
#
#     --bf16    apple/DataCompDR-12M-bf16 instead of apple/DataCompDR-12M, into the same folder
#     --1b      only apple/DataCompDR-1B, 65,536 shards (scripts/caption_shards.py makes captions)
#
# No account is needed. If a data set wants a token, set HF_TOKEN or run `hf auth login`.
# HF_ENDPOINT and HF_HOME apply as in huggingface_hub. The script first prints the licences of the
# data sets, and the number of files and bytes; with --dry-run it ends there. It does not start if
# the disk is too small. It writes the shards and the data sets' cards. Run it again after an
# interruption: it downloads only what is missing.
#
# Settings (environment variables) and their defaults:
#     DATACOMP12M_PATH            folder of DataComp-12M; datasets/DataComp-12M
#     DATACOMPDR12M_NOIMG_PATH    folder of DataCompDR-12M; datasets/DataCompDR-12M-noimage
#     DATACOMPDR1B_NOIMG_PATH     folder of DataCompDR-1B; datasets/DataCompDR-1B-noimage
#     WORKERS                     files that are downloaded at the same time; 8
#     PYTHON                      Python interpreter; that of the active environment or of .venv
# The default folders are at the repository's root. Relative paths that you set are relative to the
# current folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
WORKERS=${WORKERS:-8} # files that are downloaded at the same time
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
# .venv is made by quickstart.sh and test.sh.
[ -n "$PYTHON" ] || [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
PYTHON=${PYTHON:-python3}

BF16='' ONE_B='' OPTIONS=()
for option in "$@"; do
    case $option in
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            printf '\nFurther options (the script sets --dataset and --workers):\n\n'
            exec "$PYTHON" "$ROOT/scripts/download_shards.py" --help ;;
        --bf16) BF16=-bf16 ;;
        --1b) ONE_B=1 ;;
        *) OPTIONS+=("$option") ;;
    esac
done

DATASET=datacompdr12m$BF16
if [ -n "$ONE_B" ]; then
    [ -z "$BF16" ] || {
        echo "error: --bf16 is for DataCompDR-12M; there is no bf16 DataCompDR-1B: remove --bf16" \
            "or --1b" >&2
        exit 1
    }
    DATASET=datacompdr1b
fi
exec "$PYTHON" "$ROOT/scripts/download_shards.py" --dataset "$DATASET" --workers "$WORKERS" \
    ${OPTIONS[@]+"${OPTIONS[@]}"}
