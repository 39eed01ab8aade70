#!/usr/bin/env bash
# Join captions, images and reinforcements of DataCompDR-1B, shard by shard, into the shards that
# training reads.
#
#     bash scripts/join_datacompdr1b.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Needs three folders in the layout of DataCompDR-1B, 65 folders of 1,000 shards and one of 536:
# captions (DATACOMP1B_PATH; empty: the image shards hold them), images as img2dataset writes them
# (DATACOMP1B_IMAGES_PATH) and reinforcements (DATACOMPDR1B_NOIMG_PATH).
# With IMAGES_UNALIGNED=1 the image shards may have other names or boundaries.
# SHARDS='00/{00000000..00000007}.tar' joins only these, WORKERS=4 sets the number of processes.
# Writes the same folders of joined tars to DATACOMPDR1B_PATH, with a sizes.json in each, and
# join_report.json. Samples that lack one of the three are skipped; the report counts them. Run it
# again at any time: finished shards are skipped, interrupted ones are made again.
# scripts/join_slurm.sh runs it on several machines.
#
# Default folders are relative to the repository's root; folders that you set, to the current
# folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DATACOMP1B_PATH=${DATACOMP1B_PATH-$ROOT/datasets/DataComp-1B}
DATACOMP1B_IMAGES_PATH=${DATACOMP1B_IMAGES_PATH:-$ROOT/datasets/DataComp-1B-images}
DATACOMPDR1B_NOIMG_PATH=${DATACOMPDR1B_NOIMG_PATH:-$ROOT/datasets/DataCompDR-1B-noimage}
DATACOMPDR1B_PATH=${DATACOMPDR1B_PATH:-$ROOT/datasets/DataCompDR-1B} # output

CAPTIONS=DATACOMP1B_PATH CAPTIONS_FROM=scripts/caption_shards.py
IMAGES=DATACOMP1B_IMAGES_PATH
REINFORCEMENTS=DATACOMPDR1B_NOIMG_PATH REINFORCEMENTS_FROM="scripts/download_datacompdr12m.sh --1b"
OUTPUT=DATACOMPDR1B_PATH

# shellcheck source-path=SCRIPTDIR source=join_datacompdr.sh
source "$ROOT/scripts/join_datacompdr.sh"
join "$@"
