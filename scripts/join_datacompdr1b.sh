#!/usr/bin/env bash
# Join captions, images and reinforcements of DataCompDR-1B, shard by shard, into the shards that
# training reads.
#
#     bash scripts/join_datacompdr1b.sh [--verify-hash] [further options of scripts/join_shards.py]
#
# Input: three folders, each with the subfolders of DataCompDR-1B, 65 of 1,000 shards and one of
# 536. Output: the same subfolders of joined shards, with a sizes.json in each, and
# join_report.json. Samples that lack an image, a caption or reinforcements are skipped; the report
# counts them. Run the script again at any time: finished shards are skipped, interrupted ones are
# made again.
# scripts/join_slurm.sh runs it on several machines.
#
# Settings (environment variables) and their defaults:
#     DATACOMP1B_PATH            caption shards; datasets/DataComp-1B; empty: the image shards
#                                contain the captions
#     DATACOMP1B_IMAGES_PATH     image shards, as img2dataset writes them;
#                                datasets/DataComp-1B-images
#     DATACOMPDR1B_NOIMG_PATH    reinforcement shards; datasets/DataCompDR-1B-noimage
#     DATACOMPDR1B_PATH          output; datasets/DataCompDR-1B
#     IMAGES_UNALIGNED           1: the image shards have other file names than the reinforcement
#                                shards, or are split at other samples; default: they are the same
#     SHARDS                     names of the shards to join, such as '00/{00000000..00000007}.tar';
#                                default: all
#     WORKERS                    number of processes; default: one for each core, up to 8
#     PYTHON                     Python to use; default: that of the active environment or of .venv
# The default folders are at the repository's root. Relative paths that you set are relative to the
# current folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source-path=SCRIPTDIR source=join_datacompdr.sh
source "$ROOT/scripts/join_datacompdr.sh"
join datacompdr1b "$@"
