#!/usr/bin/env bash
# Joins captions, images and reinforcements of DataCompDR-12M, shard by shard, into the shards that training reads.
#
#     bash scripts/join_datacompdr12m.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Needs three folders of shards with the same names: captions (DATACOMP12M_PATH), images as img2dataset writes them
# (DATACOMP12M_IMAGES_PATH) and reinforcements (DATACOMPDR12M_NOIMG_PATH; those of DataCompDR-12M-bf16 do as well).
# Leaves joined tars, sizes.json and join_report.json in DATACOMPDR12M_PATH. Samples that lack one of the three are left
# out and counted. Run it again at any time: finished shards are skipped, what was interrupted is made anew.
#
# Defaults are relative to the repository's root; paths that you set, to the folder you are in.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DATACOMP12M_PATH=${DATACOMP12M_PATH:-$ROOT/datasets/DataComp-12M}
DATACOMP12M_IMAGES_PATH=${DATACOMP12M_IMAGES_PATH:-$ROOT/datasets/DataComp-12M-images}
DATACOMPDR12M_NOIMG_PATH=${DATACOMPDR12M_NOIMG_PATH:-$ROOT/datasets/DataCompDR-12M-noimage}
DATACOMPDR12M_PATH=${DATACOMPDR12M_PATH:-$ROOT/datasets/DataCompDR-12M/shards}     # made here
SHARDS=${SHARDS:-}          # as '{00000000..00001023}.tar'; empty: every shard that DATACOMPDR12M_NOIMG_PATH holds
WORKERS=${WORKERS:-}        # processes; empty: one for each core, up to 8
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
PYTHON=${PYTHON:-python3}

case ${1:-} in
    -h | --help)
        sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        printf '\nOptions, beside --source, --output, --shards and --workers, which are set above:\n\n'
        exec "$PYTHON" "$ROOT/scripts/join_shards.py" --help ;;
esac

need() { # need VARIABLE SCRIPT: the folder that VARIABLE names must be there, or SCRIPT brings it
    [ -d "${!1}" ] || { echo "join_datacompdr12m: error: no folder ${!1} ($1): $2 brings it, or set $1" >&2; exit 1; }
}
need DATACOMP12M_PATH scripts/download_datacompdr12m.sh
need DATACOMP12M_IMAGES_PATH scripts/download_images.sh
need DATACOMPDR12M_NOIMG_PATH scripts/download_datacompdr12m.sh

# of a member that two sources hold the first one's is taken: captions stay those that were embedded
exec "$PYTHON" "$ROOT/scripts/join_shards.py" \
    --source "$DATACOMP12M_PATH" --source "$DATACOMP12M_IMAGES_PATH" --source "$DATACOMPDR12M_NOIMG_PATH" \
    --output "$DATACOMPDR12M_PATH" ${SHARDS:+--shards "$SHARDS"} ${WORKERS:+--workers "$WORKERS"} "$@"
