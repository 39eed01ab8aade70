#!/usr/bin/env bash
# Train a CLIP model with reinforcement on DFNDR-2B.
#
#     bash configs/run_dfndr2b.sh [TRAINER ARGUMENT …]
#
# Published recipe: MobileCLIP-B, 16 nodes of 8 GPUs, 200,000 optimizer steps of 65,536 samples.
# The settings are environment variables. Examples, to be run from the repository's root:
#
#     # one node of 8 GPUs (512 images per GPU and micro-batch, as published), with zero-shot
#     # evaluation on ImageNet, without Weights & Biases
#     DATA='datasets/DFNDR-2B/{00000000..00000099}.tar' NUM_NODES=1 ACCUM_FREQ=16 \
#         IMAGENET_VAL=/path/to/imagenet/val REPORT_TO= bash configs/run_dfndr2b.sh
#     # one GPU, the global batch in 256 micro-batches, without evaluation
#     DATA='datasets/DFNDR-2B/{00000000..00000099}.tar' NUM_NODES=1 NUM_GPUS=1 ACCUM_FREQ=256 \
#         IMAGENET_VAL= REPORT_TO= bash configs/run_dfndr2b.sh
#     # a CPU, with two processes, on one shard
#     NUM_NODES=1 NUM_GPUS=0 NUM_PROCESSES=2 GLOBAL_BATCH=64 ITERATIONS=100 WARMUP=10 \
#         CHECKPOINTS=2 IMAGENET_VAL= REPORT_TO= DATA=datasets/DFNDR-2B/00000000.tar \
#         bash configs/run_dfndr2b.sh
#     # print the torchrun command, and do not run it; this needs no DATA
#     DRY_RUN=1 bash configs/run_dfndr2b.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and joined shards
# (python scripts/join_shards.py --dataset dfndr2b). The names of the shards are not published: DATA
# must be set. Run again, it resumes from the latest checkpoint.
# Writes: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
MODEL=${MODEL:-MobileCLIP-B}            # an OpenCLIP model name, or a model config FILE.json
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" # settings common to all recipes

# --- settings -------------------------------------------------------------------------------------
NAME=${NAME:-run_dfndr2b}               # name of the run, and of its folder in LOGS
NUM_NODES=${NUM_NODES:-16}              # number of nodes
NUM_GPUS=${NUM_GPUS:-8}                 # GPUs on each node; 0: use the CPU
GLOBAL_BATCH=${GLOBAL_BATCH:-65536}     # samples in an optimizer step, over all processes
ITERATIONS=${ITERATIONS:-200000}        # optimizer steps of the run
CHECKPOINTS=${CHECKPOINTS:-100}         # checkpoints of the run; the interval is an "epoch"
REINFORCEMENT_CONFIG=${REINFORCEMENT_CONFIG:-} # config of the data set; empty: dfndr2b.json
DISTILL_LOGIT_SCALE=${DISTILL_LOGIT_SCALE:-70 60} # logit scales of the teachers
DISTILL_TEACHER_DIMENSION=${DISTILL_TEACHER_DIMENSION:-768 768} # widths of the teachers' embeddings
DISTILL_LOSS_WEIGHTS=${DISTILL_LOSS_WEIGHTS:-0.0 1.0} # weights: contrastive, distillation
SYN_TEXT_KEY_REGEX=${SYN_TEXT_KEY_REGEX:-^syn_text_dfn_mscoco38k$} # synthetic captions to use
DATA=${DATA:-}                          # training shards; must be set

[ -n "$REINFORCEMENT_CONFIG" ] ||
    REINFORCEMENT_CONFIG=$(dirname "${BASH_SOURCE[0]}")/dfndr2b.json
# --- steps ----------------------------------------------------------------------------------------
if [ -n "$DATA" ]; then
    require_shards "python scripts/join_shards.py --dataset dfndr2b"
else
    obstacle "DATA is not set, and the names of DFNDR-2B's shards are not published: set DATA to" \
        "your joined shards, for example DATA='$DATASETS/DFNDR-2B/{00000000..00000099}.tar'"
    DATA=DATA # in a dry run
fi
# shellcheck disable=SC2086  # settings with several numbers are split on purpose
launch \
    --dataset-reinforcement --dataset-reinforcement-config "$REINFORCEMENT_CONFIG" \
    --dataset-reinforcement-syn-text-key-regex "$SYN_TEXT_KEY_REGEX" \
    --distill-teacher-dimension $DISTILL_TEACHER_DIMENSION \
    --distill-logit-scale $DISTILL_LOGIT_SCALE --distill-average-after-softmax \
    --distill-loss-weights $DISTILL_LOSS_WEIGHTS --resume latest "$@"
