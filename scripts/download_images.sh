#!/usr/bin/env bash
# Download the images of DataComp-12M, or with --1b those of DataCompDR-1B, or with --dataset those
# of another data set, into image shards for the join.
#
#     bash scripts/download_images.sh [--1b | --dataset NAME] [--shards A-B] [further options]
#
#     --dataset NAME           default: datacompdr12m; --1b is short for --dataset datacompdr1b;
#                              python scripts/download_images.py --help lists names and folders
#     --shards A-B             download only these shards, counted from 0; for DataCompDR-1B, 1003
#                              is 01/00000003.tar. Default: all
#     --processes N            number of processes; default: one for each core, up to 16
#     --threads N              downloads at a time in each process; default 128
#     --timeout SECONDS        how long a server may be silent; default 10
#     --retries N              further tries for a URL that failed; default 1
#     --batch N                shards in one run of img2dataset; default 8 for each process
#     --distributor NAME       how img2dataset runs: multiprocessing (default), pyspark or ray
#                              (install it in img2dataset's environment)
#     --no-verify-hash         keep images that have changed since they were embedded
#
# The script reads the shards that contain the image URLs. For DataComp-12M these are the caption
# shards; the sha256 of the embedded images is in the reinforcement shards. For DataCompDR-1B the
# reinforcement shards contain both. For DFNDR, URLs are taken from caption shards or reinforcement
# shards, whichever have them. img2dataset comes from PyPI. Its requirements conflict with
# training's, so it is installed in an environment of its own, .venv-img2dataset (0.8 GB), unless
# the active environment has it.
#
# The script writes image shards of the same names, and prints a table of the results. A .parquet
# next to each tar lists the outcome of each sample: downloaded, dead, changed, refused or
# undecodable. Run the script again at any time: finished shards are not downloaded again.
#
# Settings (environment variables) and their defaults:
#     DATACOMP12M_PATH            caption shards with the URLs; datasets/DataComp-12M
#     DATACOMPDR12M_NOIMG_PATH    reinforcement shards; datasets/DataCompDR-12M-noimage
#     DATACOMP12M_IMAGES_PATH     output; datasets/DataComp-12M-images
#     DATACOMPDR1B_NOIMG_PATH     with --1b: reinforcement shards; datasets/DataCompDR-1B-noimage
#     DATACOMP1B_IMAGES_PATH      with --1b: output; datasets/DataComp-1B-images
#     IMG2DATASET_PYTHON          a Python that has img2dataset; default: found or installed
#     IMG2DATASET_VENV            environment to install it into; .venv-img2dataset
# The default folders are at the repository's root. Relative paths that you set are relative to the
# current folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
IMG2DATASET_PYTHON=${IMG2DATASET_PYTHON:-} # a Python with img2dataset; empty: found or installed
IMG2DATASET_VENV=${IMG2DATASET_VENV:-$ROOT/.venv-img2dataset}
# img2dataset imports a module that Python 3.13 has removed.
REQUIREMENTS=("img2dataset==1.47.0" "standard-imghdr; python_version >= '3.13'")

fail() { echo "error: $*" >&2; exit 1; }

dataset=datacompdr12m
options=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
        --1b) dataset=datacompdr1b ;;
        --dataset)
            [ $# -gt 1 ] || fail "--dataset: expected the name of a data set"
            dataset=$2
            shift ;;
        --dataset=*) dataset=${1#*=} ;;
        *) options+=("$1") ;;
    esac
    shift
done

# A wrong name or a missing folder is an error before img2dataset is installed.
problem=$(PYTHONPATH="$ROOT/scripts" "${PYTHON:-python3}" - "$dataset" <<'PY' 2>&1
import sys
from lib.datasets import DATASETS

if sys.argv[1] not in DATASETS:
    sys.exit(f"--dataset {sys.argv[1]}: expected one of {', '.join(DATASETS)}")
DATASETS[sys.argv[1]].find_urls()
PY
) || fail "$problem"

# --- img2dataset ----------------------------------------------------------------------------------
has_img2dataset() { # has_img2dataset PYTHON
    "$1" -c 'from importlib.util import find_spec; assert find_spec("img2dataset")' 2>/dev/null
}

if [ -n "$IMG2DATASET_PYTHON" ]; then
    has_img2dataset "$IMG2DATASET_PYTHON" ||
        fail "$IMG2DATASET_PYTHON (IMG2DATASET_PYTHON) cannot import img2dataset: install it there"
elif [ -n "${VIRTUAL_ENV:-}" ] && has_img2dataset "$VIRTUAL_ENV/bin/python"; then
    IMG2DATASET_PYTHON=$VIRTUAL_ENV/bin/python
else
    IMG2DATASET_PYTHON=$IMG2DATASET_VENV/bin/python
    stamp=$IMG2DATASET_VENV/.recipe # written when the installation is complete
    if [ "$(cat "$stamp" 2>/dev/null)" != "${REQUIREMENTS[*]}" ]; then
        echo "installing ${REQUIREMENTS[0]} into $IMG2DATASET_VENV" >&2
        [ -x "$IMG2DATASET_PYTHON" ] || "${PYTHON:-python3}" -m venv "$IMG2DATASET_VENV"
        "$IMG2DATASET_PYTHON" -m pip install --quiet --disable-pip-version-check "${REQUIREMENTS[@]}"
        echo "${REQUIREMENTS[*]}" >"$stamp"
    fi
fi

exec "$IMG2DATASET_PYTHON" "$ROOT/scripts/download_images.py" --dataset "$dataset" \
    ${options[@]+"${options[@]}"}
