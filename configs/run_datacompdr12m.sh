#!/usr/bin/env bash
# Train a CLIP model on DataComp-12M with reinforcement (DataCompDR-12M).
#
#     bash configs/run_datacompdr12m.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 4 nodes of 8 GPUs, 30,000 optimizer steps of 8,192 samples.
# The settings are environment variables. Examples, to be run from the repository's root:
#
#     # one node of 8 GPUs, with zero-shot evaluation on ImageNet, without Weights & Biases
#     NUM_NODES=1 IMAGENET_VAL=/path/to/imagenet/val REPORT_TO= bash configs/run_datacompdr12m.sh
#     # one GPU, the global batch in 32 micro-batches, without evaluation
#     NUM_NODES=1 NUM_GPUS=1 ACCUM_FREQ=32 IMAGENET_VAL= REPORT_TO= \
#         bash configs/run_datacompdr12m.sh
#     # a CPU, with two processes, on one shard
#     NUM_NODES=1 NUM_GPUS=0 NUM_PROCESSES=2 GLOBAL_BATCH=64 ITERATIONS=100 WARMUP=10 \
#         CHECKPOINTS=2 IMAGENET_VAL= REPORT_TO= DATA=datasets/DataCompDR-12M/shards/00000000.tar \
#         bash configs/run_datacompdr12m.sh
#     # print the torchrun command, and do not run it
#     DRY_RUN=1 bash configs/run_datacompdr12m.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and joined shards
# (scripts/join_datacompdr12m.sh).
# Writes: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" # settings common to all recipes

# --- settings -------------------------------------------------------------------------------------
NAME=${NAME:-run_datacompdr12m}         # name of the run, and of its folder in LOGS
NUM_NODES=${NUM_NODES:-4}               # number of nodes
NUM_GPUS=${NUM_GPUS:-8}                 # GPUs on each node; 0: use the CPU
GLOBAL_BATCH=${GLOBAL_BATCH:-8192}      # samples in an optimizer step, over all processes
ITERATIONS=${ITERATIONS:-30000}         # optimizer steps of the run
CHECKPOINTS=${CHECKPOINTS:-20}          # checkpoints of the run; the interval is an "epoch"
REINFORCEMENT_CONFIG=${REINFORCEMENT_CONFIG:-} # config of the data set; empty: datacompdr12m.json
DISTILL_LOGIT_SCALE=${DISTILL_LOGIT_SCALE:-100} # logit scale of the teachers
DISTILL_TEACHER_DIMENSION=${DISTILL_TEACHER_DIMENSION:-768 768} # widths of the teachers' embeddings
DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.0 1.0} # weights: contrastive, distillation
DATA=${DATA:-}                          # training shards; empty: all of DataCompDR-12M

[ -n "$REINFORCEMENT_CONFIG" ] ||
    REINFORCEMENT_CONFIG=$(dirname "${BASH_SOURCE[0]}")/datacompdr12m.json
[ -n "$DATA" ] ||
    DATA="$DATASETS/DataCompDR-12M/shards/{00000000..00001023}.tar"

# --- steps ----------------------------------------------------------------------------------------
require_shards "bash scripts/join_datacompdr12m.sh"
# shellcheck disable=SC2086  # settings with several numbers are split on purpose
launch \
    --dataset-reinforcement --dataset-reinforcement-config "$REINFORCEMENT_CONFIG" \
    --distill-teacher-dimension $DISTILL_TEACHER_DIMENSION \
    --distill-logit-scale $DISTILL_LOGIT_SCALE --distill-average-after-softmax \
    --distill-loss-weights $DISTILL_LOSS_WEIGHTS --save-most-recent "$@"
