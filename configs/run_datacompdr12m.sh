#!/usr/bin/env bash
# Train a CLIP model on DataComp-12M with reinforcement (DataCompDR-12M).
#
#     bash configs/run_datacompdr12m.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 4 nodes of 8 GPUs, 30,000 iterations of 8,192. Every setting here and in
# launch.sh can be overridden from the environment:
#
#     NUM_NODES=1 NUM_GPUS=1 GLOBAL_BATCH=1024 bash configs/run_datacompdr12m.sh      # one GPU
#     NUM_GPUS=0 NUM_PROCESSES=2 … bash configs/run_datacompdr12m.sh                  # a CPU, two processes over gloo
#     SAMPLING=without-replacement SAVE_EVERY_N_STEPS=500 bash configs/run_datacompdr12m.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and joined shards (scripts/join_datacompdr12m.sh).
# Leaves: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit ;; esac

# --- settings -------------------------------------------------------------------------------------------------------
DEFAULT_NODES=4                              # NUM_NODES
DEFAULT_GPUS=8                               # NUM_GPUS, on each node
GLOBAL_BATCH=${GLOBAL_BATCH:-8192}             # over all processes and ACCUM_FREQ micro-batches
ITERATIONS=${ITERATIONS:-30000}                # optimiser steps; samples seen = ITERATIONS x GLOBAL_BATCH
CHECKPOINTS=${CHECKPOINTS:-20}                 # an "epoch" is samples seen / CHECKPOINTS
NAME=${NAME:-run_datacompdr12m}
REINFORCEMENT_CONFIG=${REINFORCEMENT_CONFIG:-$(dirname "${BASH_SOURCE[0]}")/datacompdr12m.json}
DISTILL_LOGIT_SCALE=${DISTILL_LOGIT_SCALE:-100}
DISTILL_TEACHER_DIMENSION=${DISTILL_TEACHER_DIMENSION:-768 768}
DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.0 1.0}  # contrastive, distillation
# DATA: training shards, braces as in WebDataset; default below

# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

[ -n "${DATA:-}" ] || DATA="$DATASETS/DataCompDR-12M/shards/{00000000..00001023}.tar"
require_shards "$DATA" DATA "bash scripts/join_datacompdr12m.sh brings them: it joins captions, images and reinforcements."
# shellcheck disable=SC2206  # the settings with several numbers are split on purpose
RECIPE=(
    --dataset-reinforcement --dataset-reinforcement-config "$REINFORCEMENT_CONFIG"
    --distill-logit-scale $DISTILL_LOGIT_SCALE --distill-teacher-dimension $DISTILL_TEACHER_DIMENSION
    --distill-average-after-softmax --distill-loss-weights $DISTILL_LOSS_WEIGHTS
    --save-most-recent
)
launch "$@"
