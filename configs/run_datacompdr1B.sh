#!/usr/bin/env bash
# Train a CLIP model on DataComp-1B with reinforcement (DataCompDR-1B).
#
#     bash configs/run_datacompdr1B.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 16 nodes of 8 GPUs, 200,000 iterations of 65,536.
# Every setting below and in launch.sh can be overridden from the environment:
#
#     NUM_NODES=1 NUM_GPUS=1 GLOBAL_BATCH=1024 bash configs/run_datacompdr1B.sh
#     NUM_GPUS=0 NUM_PROCESSES=2 … bash configs/run_datacompdr1B.sh     # on a CPU
#     SAMPLING=without-replacement SAVE_EVERY_N_STEPS=500 bash configs/run_datacompdr1B.sh
#     DRY_RUN=1 bash configs/run_datacompdr1B.sh    # print the torchrun command
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and joined shards
# (scripts/join_datacompdr1b.sh). Run again, it continues from the latest checkpoint.
# Writes: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" # settings common to all recipes

# --- settings -------------------------------------------------------------------------------------
NAME=${NAME:-run_datacompdr1B}
NUM_NODES=${NUM_NODES:-16}
NUM_GPUS=${NUM_GPUS:-8}              # on each node
GLOBAL_BATCH=${GLOBAL_BATCH:-65536}   # samples in an optimiser step, over all processes
ITERATIONS=${ITERATIONS:-200000}      # optimiser steps; samples seen = ITERATIONS x GLOBAL_BATCH
CHECKPOINTS=${CHECKPOINTS:-100}       # an "epoch" is samples seen / CHECKPOINTS
REINFORCEMENT_CONFIG=${REINFORCEMENT_CONFIG:-$(dirname "${BASH_SOURCE[0]}")/datacompdr1b.json}
DISTILL_LOGIT_SCALE=${DISTILL_LOGIT_SCALE:-100}
DISTILL_TEACHER_DIMENSION=${DISTILL_TEACHER_DIMENSION:-768 768}
case $MODEL in # contrastive, distillation
    *MobileCLIP-S* | *mobileclip_s*) DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.0 1.0} ;;
    *) DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.25 0.75} ;;
esac
# Training shards, braces as in WebDataset.
DATA=${DATA:-"$DATASETS/DataCompDR-1B/{{00..64}/{00000000..00000999},65/{00000000..00000535}}.tar"}

# --- steps ----------------------------------------------------------------------------------------
require_shards scripts/join_datacompdr1b.sh
# shellcheck disable=SC2086  # settings with several numbers are split on purpose
launch \
    --dataset-reinforcement --dataset-reinforcement-config "$REINFORCEMENT_CONFIG" \
    --distill-teacher-dimension $DISTILL_TEACHER_DIMENSION \
    --distill-logit-scale $DISTILL_LOGIT_SCALE --distill-average-after-softmax \
    --distill-loss-weights $DISTILL_LOSS_WEIGHTS --resume latest "$@"
