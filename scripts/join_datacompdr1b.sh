#!/usr/bin/env bash
# Joins captions, images and reinforcements of DataCompDR-1B, shard by shard, into the shards that training reads.
#
#     bash scripts/join_datacompdr1b.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Needs three folders in the layout of DataCompDR-1B, 65 folders of 1,000 shards and one of 536: captions
# (DATACOMP1B_PATH; empty: they are those that came with the images), images as img2dataset writes them
# (DATACOMP1B_IMAGES_PATH) and reinforcements (DATACOMPDR1B_NOIMG_PATH).
# Image shards with other names or boundaries do with IMAGES_UNALIGNED=1. SHARDS='00/{00000000..00000007}.tar' joins
# some, WORKERS=4 sets the number of processes.
# Leaves the same folders of joined tars in DATACOMPDR1B_PATH, sizes.json in each of them, and join_report.json. Samples
# that lack one of the three are left out and counted. Run it again at any time: finished shards are skipped, what was
# interrupted is made anew. scripts/join_slurm.sh spreads it over machines.
#
# Defaults are relative to the repository's root; paths that you set, to the folder you are in.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DATACOMP1B_PATH=${DATACOMP1B_PATH-$ROOT/datasets/DataComp-1B}
DATACOMP1B_IMAGES_PATH=${DATACOMP1B_IMAGES_PATH:-$ROOT/datasets/DataComp-1B-images}
DATACOMPDR1B_NOIMG_PATH=${DATACOMPDR1B_NOIMG_PATH:-$ROOT/datasets/DataCompDR-1B-noimage}
DATACOMPDR1B_PATH=${DATACOMPDR1B_PATH:-$ROOT/datasets/DataCompDR-1B}     # made here

CAPTIONS=DATACOMP1B_PATH CAPTIONS_FROM=scripts/caption_shards.py
IMAGES=DATACOMP1B_IMAGES_PATH
REINFORCEMENTS=DATACOMPDR1B_NOIMG_PATH REINFORCEMENTS_FROM="scripts/download_datacompdr12m.sh --1b"
OUTPUT=DATACOMPDR1B_PATH

# shellcheck source-path=SCRIPTDIR source=join_datacompdr.sh
source "$ROOT/scripts/join_datacompdr.sh"
join "$@"
