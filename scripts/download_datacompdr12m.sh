#!/usr/bin/env bash
# Brings DataComp-12M (captions, image addresses) and DataCompDR-12M (reinforcements) from the Hugging Face Hub.
#
#     bash scripts/download_datacompdr12m.sh --shards 0-3     # a trial: four shards of each
#     bash scripts/download_datacompdr12m.sh                  # all 1,024 of each
#
#     --bf16    apple/DataCompDR-12M-bf16 in the place of apple/DataCompDR-12M, into the same folder
#     --1b      only apple/DataCompDR-1B, 65,536 shards; its captions come by scripts/caption_shards.py
#
# Needs no account; a token, where one is wanted, in HF_TOKEN or by `hf auth login`. HF_ENDPOINT and HF_HOME hold as
# everywhere. Says first under which licences the data sets are, and how many files and bytes will come (--dry-run: only
# that), and doesn't begin where the disk can't hold them.
# Leaves the shards and the data sets' cards in DATACOMP12M_PATH and DATACOMPDR12M_NOIMG_PATH, or DATACOMPDR1B_NOIMG_PATH.
# Run it again after an interruption: it brings what is missing, and no byte twice.
#
# Defaults are relative to the repository's root; paths that you set, to the folder you are in.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DATACOMP12M_PATH=${DATACOMP12M_PATH:-$ROOT/datasets/DataComp-12M}
DATACOMPDR12M_NOIMG_PATH=${DATACOMPDR12M_NOIMG_PATH:-$ROOT/datasets/DataCompDR-12M-noimage}
DATACOMPDR1B_NOIMG_PATH=${DATACOMPDR1B_NOIMG_PATH:-$ROOT/datasets/DataCompDR-1B-noimage}
WORKERS=${WORKERS:-8}       # files that are brought at once
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
[ -n "$PYTHON" ] || [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python     # made by quickstart.sh or test.sh
PYTHON=${PYTHON:-python3}

BF16='' ONE_B='' OPTIONS=()
for option in "$@"; do
    case $option in
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            printf '\nFurther options, beside --repo, --per-folder and --workers, which are set above:\n\n'
            exec "$PYTHON" "$ROOT/scripts/download_shards.py" --help ;;
        --bf16) BF16=-bf16 ;;
        --1b) ONE_B=1 ;;
        *) OPTIONS+=("$option") ;;
    esac
done

if [ -n "$ONE_B" ]; then
    [ -z "$BF16" ] || { echo "error: --bf16 is of DataCompDR-12M; there is no bf16 DataCompDR-1B: leave out one" >&2; exit 1; }
    REPOS=(--repo apple/DataCompDR-1B "$DATACOMPDR1B_NOIMG_PATH" --per-folder 1000)
else
    REPOS=(--repo mlfoundations/DataComp-12M "$DATACOMP12M_PATH"
        --repo "apple/DataCompDR-12M$BF16" "$DATACOMPDR12M_NOIMG_PATH")
fi
exec "$PYTHON" "$ROOT/scripts/download_shards.py" "${REPOS[@]}" --workers "$WORKERS" ${OPTIONS[@]+"${OPTIONS[@]}"}
