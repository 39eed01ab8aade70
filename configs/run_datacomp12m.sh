#!/usr/bin/env bash
# Train a CLIP model on DataComp-12M without reinforcement: the baseline.
#
#     bash configs/run_datacomp12m.sh [TRAINER ARGUMENT …]
#
# Published recipe: ViT-B/16, 1 node of 8 GPUs, 30,000 optimizer steps of 8,192 samples.
# The settings are environment variables. Examples, to be run from the repository's root:
#
#     # one node of 8 GPUs, with zero-shot evaluation on ImageNet, without Weights & Biases
#     NUM_NODES=1 IMAGENET_VAL=/path/to/imagenet/val REPORT_TO= bash configs/run_datacomp12m.sh
#     # one GPU, the global batch in 32 micro-batches, without evaluation
#     NUM_NODES=1 NUM_GPUS=1 ACCUM_FREQ=32 IMAGENET_VAL= REPORT_TO= \
#         bash configs/run_datacomp12m.sh
#     # a CPU, with two processes, on one shard
#     NUM_NODES=1 NUM_GPUS=0 NUM_PROCESSES=2 GLOBAL_BATCH=64 ITERATIONS=100 WARMUP=10 \
#         CHECKPOINTS=2 IMAGENET_VAL= REPORT_TO= DATA=datasets/DataCompDR-12M/shards/00000000.tar \
#         bash configs/run_datacomp12m.sh
#     # print the torchrun command, and do not run it
#     DRY_RUN=1 bash configs/run_datacomp12m.sh
#
# Needs: the patched OpenCLIP (scripts/setup_open_clip.sh) and shards with images and captions. The
# joined shards of DataCompDR-12M will do; their reinforcements are not read.
# Writes: $LOGS/$NAME/ with out.log, params.txt, checkpoints/.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" # settings common to all recipes

# --- settings -------------------------------------------------------------------------------------
NAME=${NAME:-run_datacomp12m}           # name of the run, and of its folder in LOGS
NUM_NODES=${NUM_NODES:-1}               # number of nodes
NUM_GPUS=${NUM_GPUS:-8}                 # GPUs on each node; 0: use the CPU
GLOBAL_BATCH=${GLOBAL_BATCH:-8192}      # samples in an optimizer step, over all processes
ITERATIONS=${ITERATIONS:-30000}         # optimizer steps of the run
CHECKPOINTS=${CHECKPOINTS:-20}          # checkpoints of the run; the interval is an "epoch"
DATA=${DATA:-}                          # training shards; empty: all of DataComp-12M

if [ -z "$DATA" ]; then
    DATA="$DATASETS/DataComp-12M/shards/{00000000..00001023}.tar"
    [ -d "$DATASETS/DataComp-12M/shards" ] || # the joined shards have the same images and captions
        DATA="$DATASETS/DataCompDR-12M/shards/{00000000..00001023}.tar"
fi

# --- steps ----------------------------------------------------------------------------------------
require_shards "bash scripts/join_datacompdr12m.sh"
launch --save-most-recent "$@"
