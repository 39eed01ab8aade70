#!/usr/bin/env bash
# Train a CLIP model on DataComp-12M without reinforcement: the baseline.
#
#     bash configs/run_datacomp12m.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 1 node of 8 GPUs, 30,000 iterations of 8,192. Every setting here and in
# launch.sh can be overridden from the environment:
#
#     NUM_NODES=1 NUM_GPUS=1 GLOBAL_BATCH=1024 bash configs/run_datacomp12m.sh      # one GPU
#     NUM_GPUS=0 NUM_PROCESSES=2 … bash configs/run_datacomp12m.sh                  # a CPU, two processes over gloo
#     SAMPLING=without-replacement SAVE_EVERY_N_STEPS=500 bash configs/run_datacomp12m.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and shards with images and captions; the joined shards of
# DataCompDR-12M will do, their reinforcements are not read.
# Leaves: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit ;; esac

# --- settings -------------------------------------------------------------------------------------------------------
DEFAULT_NODES=1                              # NUM_NODES
DEFAULT_GPUS=8                               # NUM_GPUS, on each node
GLOBAL_BATCH=${GLOBAL_BATCH:-8192}             # over all processes and ACCUM_FREQ micro-batches
ITERATIONS=${ITERATIONS:-30000}                # optimiser steps; samples seen = ITERATIONS x GLOBAL_BATCH
CHECKPOINTS=${CHECKPOINTS:-20}                 # an "epoch" is samples seen / CHECKPOINTS
NAME=${NAME:-run_datacomp12m}
# DATA: training shards, braces as in WebDataset; default below

# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# Plain shards where there are some, else the joined ones, which hold the same images and captions.
plain="$DATASETS/DataComp-12M/shards/{00000000..00001023}.tar"
joined="$DATASETS/DataCompDR-12M/shards/{00000000..00001023}.tar"
if [ -z "${DATA:-}" ]; then
    if [ -d "$DATASETS/DataComp-12M/shards" ]; then DATA=$plain; else DATA=$joined; fi
fi
require_shards "$DATA" DATA "bash scripts/join_datacompdr12m.sh brings them: it joins captions, images and reinforcements."
RECIPE=(--save-most-recent)
launch "$@"
