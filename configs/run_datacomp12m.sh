#!/usr/bin/env bash
# Train a CLIP model on DataComp-12M without reinforcement: the baseline.
#
#     bash configs/run_datacomp12m.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 1 node of 8 GPUs, 30,000 iterations of 8,192.
# Every setting below and in launch.sh can be overridden from the environment:
#
#     NUM_NODES=1 NUM_GPUS=1 GLOBAL_BATCH=1024 bash configs/run_datacomp12m.sh
#     NUM_GPUS=0 NUM_PROCESSES=2 … bash configs/run_datacomp12m.sh     # on a CPU
#     SAMPLING=without-replacement SAVE_EVERY_N_STEPS=500 bash configs/run_datacomp12m.sh
#     DRY_RUN=1 bash configs/run_datacomp12m.sh    # print the torchrun command
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and shards with images and captions. The
# joined shards of DataCompDR-12M will do; their reinforcements are not read.
# Writes: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" # settings common to all recipes

# --- settings -------------------------------------------------------------------------------------
NAME=${NAME:-run_datacomp12m}
NUM_NODES=${NUM_NODES:-1}
NUM_GPUS=${NUM_GPUS:-8}              # on each node
GLOBAL_BATCH=${GLOBAL_BATCH:-8192}   # samples in an optimiser step, over all processes
ITERATIONS=${ITERATIONS:-30000}      # optimiser steps; samples seen = ITERATIONS x GLOBAL_BATCH
CHECKPOINTS=${CHECKPOINTS:-20}       # an "epoch" is samples seen / CHECKPOINTS
# Training shards, braces as in WebDataset.
if [ -z "${DATA:-}" ]; then
    DATA="$DATASETS/DataComp-12M/shards/{00000000..00001023}.tar"
    [ -d "$DATASETS/DataComp-12M/shards" ] || # the joined shards have the same images and captions
        DATA="$DATASETS/DataCompDR-12M/shards/{00000000..00001023}.tar"
fi

# --- steps ----------------------------------------------------------------------------------------
require_shards scripts/join_datacompdr12m.sh
launch --save-most-recent "$@"
