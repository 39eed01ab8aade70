#!/usr/bin/env bash
# Join captions, images and reinforcements of DataCompDR-12M, shard by shard, into the shards that
# training reads.
#
#     bash scripts/join_datacompdr12m.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Needs three folders of shards with the same names: captions (DATACOMP12M_PATH), images as
# img2dataset writes them (DATACOMP12M_IMAGES_PATH) and reinforcements (DATACOMPDR12M_NOIMG_PATH,
# also of DataCompDR-12M-bf16). With IMAGES_UNALIGNED=1 the image shards may have other names or
# boundaries. SHARDS='{00000000..00000007}.tar' joins only these, WORKERS=4 sets the number of
# processes.
# Writes joined tars, sizes.json and join_report.json to DATACOMPDR12M_PATH. Samples that lack one
# of the three are skipped; the report counts them. Run it again at any time: finished shards are
# skipped, interrupted ones are made again.
#
# Default folders are relative to the repository's root; folders that you set, to the current
# folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DATACOMP12M_PATH=${DATACOMP12M_PATH:-$ROOT/datasets/DataComp-12M}
DATACOMP12M_IMAGES_PATH=${DATACOMP12M_IMAGES_PATH:-$ROOT/datasets/DataComp-12M-images}
DATACOMPDR12M_NOIMG_PATH=${DATACOMPDR12M_NOIMG_PATH:-$ROOT/datasets/DataCompDR-12M-noimage}
DATACOMPDR12M_PATH=${DATACOMPDR12M_PATH:-$ROOT/datasets/DataCompDR-12M/shards} # output

CAPTIONS=DATACOMP12M_PATH CAPTIONS_FROM=scripts/download_datacompdr12m.sh
IMAGES=DATACOMP12M_IMAGES_PATH
REINFORCEMENTS=DATACOMPDR12M_NOIMG_PATH REINFORCEMENTS_FROM=scripts/download_datacompdr12m.sh
OUTPUT=DATACOMPDR12M_PATH

# shellcheck source-path=SCRIPTDIR source=join_datacompdr.sh
source "$ROOT/scripts/join_datacompdr.sh"
join "$@"
