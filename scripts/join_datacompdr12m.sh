#!/usr/bin/env bash
# Join captions, images and reinforcements of DataCompDR-12M, shard by shard, into the shards that
# training reads.
#
#     bash scripts/join_datacompdr12m.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Input: three folders of shards with the same names. Output: joined shards, sizes.json and
# join_report.json. Samples that lack an image, a caption or reinforcements are skipped; the report
# counts them. Run the script again at any time: finished shards are skipped, interrupted ones are
# made again.
#
# Settings (environment variables) and their defaults:
#     DATACOMP12M_PATH           caption shards; datasets/DataComp-12M
#     DATACOMP12M_IMAGES_PATH    image shards, as img2dataset writes them;
#                                datasets/DataComp-12M-images
#     DATACOMPDR12M_NOIMG_PATH   reinforcement shards of DataCompDR-12M or DataCompDR-12M-bf16;
#                                datasets/DataCompDR-12M-noimage
#     DATACOMPDR12M_PATH         output; datasets/DataCompDR-12M/shards
#     IMAGES_UNALIGNED           1: the image shards have other file names than the reinforcement
#                                shards, or are split at other samples; default: they are the same
#     SHARDS                     names of the shards to join, such as '{00000000..00000007}.tar';
#                                default: all
#     WORKERS                    number of processes; default: one for each core, up to 8
#     PYTHON                     Python to use; default: that of the active environment or of .venv
# The default folders are at the repository's root. Relative paths that you set are relative to the
# current folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source-path=SCRIPTDIR source=join_datacompdr.sh
source "$ROOT/scripts/join_datacompdr.sh"
join datacompdr12m "$@"
