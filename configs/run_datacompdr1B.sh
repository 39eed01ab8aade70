#!/usr/bin/env bash
# Train a CLIP model on DataComp-1B with reinforcement (DataCompDR-1B).
#
#     bash configs/run_datacompdr1B.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 16 nodes of 8 GPUs, 200,000 iterations of 65,536. Every setting here and in
# launch.sh can be overridden from the environment:
#
#     NUM_NODES=1 NUM_GPUS=1 GLOBAL_BATCH=1024 bash configs/run_datacompdr1B.sh      # one GPU
#     NUM_GPUS=0 NUM_PROCESSES=2 … bash configs/run_datacompdr1B.sh                  # a CPU, two processes over gloo
#     SAMPLING=without-replacement SAVE_EVERY_N_STEPS=500 bash configs/run_datacompdr1B.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and joined shards. Run again, it goes on from the latest
# checkpoint.
# Leaves: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit ;; esac

# --- settings -------------------------------------------------------------------------------------------------------
DEFAULT_NODES=16                             # NUM_NODES
DEFAULT_GPUS=8                               # NUM_GPUS, on each node
GLOBAL_BATCH=${GLOBAL_BATCH:-65536}            # over all processes and ACCUM_FREQ micro-batches
ITERATIONS=${ITERATIONS:-200000}              # optimiser steps; samples seen = ITERATIONS x GLOBAL_BATCH
CHECKPOINTS=${CHECKPOINTS:-100}               # an "epoch" is samples seen / CHECKPOINTS
NAME=${NAME:-run_datacompdr1B}
REINFORCEMENT_CONFIG=${REINFORCEMENT_CONFIG:-$(dirname "${BASH_SOURCE[0]}")/datacompdr1b.json}
DISTILL_LOGIT_SCALE=${DISTILL_LOGIT_SCALE:-100}
DISTILL_TEACHER_DIMENSION=${DISTILL_TEACHER_DIMENSION:-768 768}
case ${MODEL:-} in
    *MobileCLIP-S* | *mobileclip_s*) DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.0 1.0} ;; # contrastive, distillation
    *) DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.25 0.75} ;;
esac
# DATA: training shards, braces as in WebDataset; default below

# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

[ -n "${DATA:-}" ] || DATA="$DATASETS/DataCompDR-1B/{{00..64}/{00000000..00000999},65/{00000000..00000535}}.tar"
require_shards "$DATA" DATA "bash scripts/join_datacompdr1b.sh brings them: it joins captions, images and reinforcements."
# shellcheck disable=SC2206  # the settings with several numbers are split on purpose
RECIPE=(
    --dataset-reinforcement --dataset-reinforcement-config "$REINFORCEMENT_CONFIG"
    --distill-logit-scale $DISTILL_LOGIT_SCALE --distill-teacher-dimension $DISTILL_TEACHER_DIMENSION
    --distill-average-after-softmax --distill-loss-weights $DISTILL_LOSS_WEIGHTS
    --resume latest
)
launch "$@"
