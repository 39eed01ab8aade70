# shellcheck shell=bash
# Sourced by the run_*.sh scripts: starts the patched OpenCLIP trainer under torchrun.
#
# Sets the settings common to all recipes and defines two steps: `require_shards` and `launch`. All
# settings can be overridden from the environment.

# Print the description of the script, and its settings with their defaults.
print_help() {
    local name default comment
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    printf '\nSettings and their defaults:\n\n'
    sed -n 's/^\([A-Z][A-Z0-9_]*\)=${\1:\{0,1\}-\(.*\)}\( *# *\(.*\)\)\{0,1\}$/\1|\2|\4/p' \
        "$0" "${BASH_SOURCE[0]}" | awk -F '|' '!listed[$1]++' |
        while IFS='|' read -r name default comment; do
            printf '  %-36s %s\n' "$name=$default" "$comment"
        done
}

case ${1:-} in -h | --help) print_help; exit ;; esac

# --- settings common to all recipes ---------------------------------------------------------------
MODEL=${MODEL:-ViT-B-16}                # an OpenCLIP model name, or a model config FILE.json
PRETRAINED=${PRETRAINED:-}              # weights to start from: a file, or an OpenCLIP tag
PRECISION=${PRECISION:-}                # numerical precision; empty: amp on GPUs, fp32 on the CPU
LR=${LR:-1.e-3}                         # peak learning rate
WD=${WD:-0.2}                           # weight decay
BETA2=${BETA2:-0.95}                    # AdamW's second momentum coefficient
WARMUP=${WARMUP:-1000}                  # optimizer steps in which the learning rate rises
GRAD_CLIP_NORM=${GRAD_CLIP_NORM:-1.0}   # norm to which larger gradients are clipped
ACCUM_FREQ=${ACCUM_FREQ:-1}             # micro-batches in an optimizer step
GRAD_CHECKPOINTING=${GRAD_CHECKPOINTING:-1} # 1: recompute activations, to save memory; 0: faster
SEED=${SEED:-0}                         # random seed
WORKERS=${WORKERS:-4}                   # data loading processes for each GPU
SAMPLING=${SAMPLING:-with-replacement}  # how to draw samples: with- or without-replacement
MAX_SKIPPED_FRACTION=${MAX_SKIPPED_FRACTION:-} # fraction of bad samples at which a run stops
DATASETS=${DATASETS:-}                  # folder of data sets; empty: datasets/ next to open_clip/
IMAGENET_VAL=${IMAGENET_VAL-./imagenet_validation} # ImageNet validation set; empty: no evaluation
EVAL_DATA=${EVAL_DATA:-}                # held-out image-caption shards for retrieval; empty: none
ZEROSHOT_FREQUENCY=${ZEROSHOT_FREQUENCY:-1} # epochs between two evaluations
SAVE_FREQUENCY=${SAVE_FREQUENCY:-1}     # epochs between two checkpoints
SAVE_EVERY_N_STEPS=${SAVE_EVERY_N_STEPS:-0} # also save after this many steps in an epoch; 0: no
KEEP_LAST_K=${KEEP_LAST_K:-2}           # number of checkpoints within epochs to keep
LOG_EVERY=${LOG_EVERY:-20}              # optimizer steps between two log lines
LOGS=${LOGS:-./logs}                    # log folder
REPORT_TO=${REPORT_TO-wandb}            # wandb, tensorboard, wandb,tensorboard, or empty
WANDB_PROJECT=${WANDB_PROJECT:-mobileclip} # project in Weights & Biases
NUM_PROCESSES=${NUM_PROCESSES:-1}       # processes on the CPU, with NUM_GPUS=0
MASTER_ADDR=${MASTER_ADDR:-}            # with several nodes: host name of the first node
MASTER_PORT=${MASTER_PORT:-}            # with several nodes: a free port of the first node
ROLE_RANK=${ROLE_RANK:-}                # with several nodes: number of this node, from 0
RDZV_ID=${RDZV_ID:-}                    # identifier of the rendezvous of the nodes; empty: NAME
DIST_TIMEOUT=${DIST_TIMEOUT:-3600}      # seconds that the nodes wait for each other at the start
PYTHON=${PYTHON:-}                      # empty: that of the active environment, or of .venv
DRY_RUN=${DRY_RUN:-0}                   # 1: print the torchrun command, and do not run it

fail() { echo "error: $*" >&2; exit 1; }

# An obstacle to training on this machine: an error, but only a warning in a dry run.
obstacle() {
    [ "$DRY_RUN" != 0 ] || fail "$*"
    echo "warning: $*" >&2
}

# --- the tree and the environment -----------------------------------------------------------------
# The scripts run from the patched tree (open_clip/configs) and from this repository (configs/).
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$tree/src" ] || tree=$tree/open_clip
trainer=training
[ ! -d "$tree/src/open_clip_train" ] || trainer=open_clip_train # of OpenCLIP 3.3
[ -f "$tree/src/$trainer/dr/loss.py" ] || obstacle "no patched OpenCLIP in $tree: run" \
    "'bash scripts/setup_open_clip.sh' at the repository's root first"
root=$(dirname "$tree") # of this repository
[ -n "$DATASETS" ] || DATASETS=$root/datasets
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
[ -n "$PYTHON" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import braceexpand, importlib.util; assert importlib.util.find_spec("torch")' \
    2>/dev/null || obstacle "'$PYTHON' has no torch or no braceexpand: activate the environment" \
    "in which this package is installed, or set PYTHON to its python"

# --- steps ----------------------------------------------------------------------------------------
# require_shards COMMAND: check that the first and last shard of DATA exist; COMMAND makes them.
require_shards() {
    local absent
    absent=$(find_absent DATA)
    [ -z "$absent" ] || obstacle "no training shard $absent (only the first and the last were" \
        "checked): '$1' joins captions, images and reinforcements, or set DATA to your shards"
}

# find_absent SETTING: print the first or the last shard of a setting if it does not exist.
find_absent() {
    local shards=${!1}
    case $shards in *://* | pipe:*) return ;; esac
    "$PYTHON" - "$shards" <<'PY' || obstacle "cannot expand $1=$shards (Python's message is above)"
import os, sys
from braceexpand import braceexpand

shards = [shard for part in sys.argv[1].split("::") for shard in braceexpand(part)]
print(next((shard for shard in (shards[0], shards[-1]) if not os.path.isfile(shard)), ""))
PY
}

# launch [TRAINER ARGUMENT …]: run the trainer; or print its command in a dry run.
launch() {
    local processes=$NUM_GPUS device=() found
    local variables=("PYTHONPATH=$tree/src${PYTHONPATH:+:$PYTHONPATH}")
    if [ "$NUM_GPUS" -eq 0 ]; then
        processes=$NUM_PROCESSES
        variables+=("CUDA_VISIBLE_DEVICES=") # a CPU run leaves the GPUs alone
        device=(--dist-backend gloo)
        PRECISION=${PRECISION:-fp32}
    else
        found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || found=0
        [ "$found" -ge "$NUM_GPUS" ] || obstacle "this recipe needs $NUM_GPUS GPUs a node, and" \
            "this machine has $found: set NUM_NODES and NUM_GPUS (NUM_GPUS=0 runs on the CPU)"
    fi

    local rendezvous=(--standalone)
    if [ "$NUM_NODES" -gt 1 ]; then
        local variable t=$DIST_TIMEOUT
        for variable in MASTER_ADDR MASTER_PORT ROLE_RANK; do
            [ -n "${!variable}" ] || obstacle "NUM_NODES=$NUM_NODES, but $variable is not set:" \
                "for one node set NUM_NODES=1; for several set MASTER_ADDR and MASTER_PORT to the" \
                "first node's host name and a free port, and ROLE_RANK to the number of this node" \
                "(0 to $((NUM_NODES - 1)))"
        done
        rendezvous=(
            --node-rank "${ROLE_RANK:-ROLE_RANK}" --rdzv-backend c10d
            --rdzv-endpoint "${MASTER_ADDR:-MASTER_ADDR}:${MASTER_PORT:-MASTER_PORT}"
            --rdzv-id "${RDZV_ID:-$NAME}"
            --rdzv-conf "timeout=$t,join_timeout=$t,read_timeout=$t,close_timeout=$t"
        )
    fi

    local parts=$((NUM_NODES * processes * ACCUM_FREQ))
    [ $((GLOBAL_BATCH % parts)) -eq 0 ] || fail "GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of" \
        "$parts ($NUM_NODES nodes x $processes processes x ACCUM_FREQ=$ACCUM_FREQ)"
    # An "epoch" of the trainer is the interval between two checkpoints, whatever the data size. The
    # last one is shorter where CHECKPOINTS does not divide ITERATIONS.
    local steps=$(((ITERATIONS + CHECKPOINTS - 1) / CHECKPOINTS))
    local epochs=$(((ITERATIONS + steps - 1) / steps))

    local sampling
    case $SAMPLING in
        with-replacement) sampling=--dataset-resampled ;;
        without-replacement) sampling=--dataset-without-replacement ;;
        *) fail "SAMPLING=$SAMPLING: expected with-replacement or without-replacement" ;;
    esac

    local args=(
        --train-data "$DATA" --train-num-samples $((steps * GLOBAL_BATCH))
        --epochs "$epochs" --total-steps "$ITERATIONS"
        --dataset-type webdataset "$sampling" --workers "$WORKERS"
        --model "$MODEL" --precision "${PRECISION:-amp}" --batch-size $((GLOBAL_BATCH / parts))
        --accum-freq "$ACCUM_FREQ" --lr "$LR" --wd "$WD" --beta2 "$BETA2" --warmup "$WARMUP"
        --grad-clip-norm "$GRAD_CLIP_NORM" --seed "$SEED"
        --local-loss --gather-with-grad --ddp-static-graph
        --save-frequency "$SAVE_FREQUENCY" --zeroshot-frequency "$ZEROSHOT_FREQUENCY"
        --log-every-n-steps "$LOG_EVERY" --logs "$LOGS" --name "$NAME"
    )
    [ -z "$PRETRAINED" ] || args+=(--pretrained "$PRETRAINED")
    [ "$SAVE_EVERY_N_STEPS" = 0 ] || args+=(--save-every-n-steps "$SAVE_EVERY_N_STEPS")
    [ "$KEEP_LAST_K" = 2 ] || args+=(--keep-last-k "$KEEP_LAST_K")
    [ -z "$MAX_SKIPPED_FRACTION" ] || args+=(--max-skipped-fraction "$MAX_SKIPPED_FRACTION")
    [ "$GRAD_CHECKPOINTING" = 0 ] || args+=(--grad-checkpointing)
    if [ -n "$IMAGENET_VAL" ]; then
        [ -d "$IMAGENET_VAL" ] || obstacle "no folder IMAGENET_VAL=$IMAGENET_VAL: set it to the" \
            "validation images of ImageNet (a folder for each class), or to nothing" \
            "(IMAGENET_VAL=) to train without zero-shot evaluation"
        args+=(--imagenet-val "$IMAGENET_VAL")
    fi
    if [ -n "$EVAL_DATA" ]; then
        local absent
        absent=$(find_absent EVAL_DATA)
        [ -z "$absent" ] || obstacle "no shard $absent of EVAL_DATA=$EVAL_DATA: set it to held-out" \
            "image-caption shards, or to nothing (EVAL_DATA=)"
        args+=(--val-data "$EVAL_DATA")
    fi
    if [ -n "$REPORT_TO" ]; then
        [[ $REPORT_TO != *wandb* ]] || "$PYTHON" -c 'import wandb' 2>/dev/null ||
            obstacle "REPORT_TO=$REPORT_TO, but wandb is not installed: 'pip install wandb', or" \
                "set REPORT_TO=tensorboard or REPORT_TO= (nothing)"
        args+=(--report-to "$REPORT_TO" --wandb-project-name "$WANDB_PROJECT")
    fi
    [[ " $* " == *" --resume "* || ! -e $LOGS/$NAME/out.log ]] || obstacle "there is a run" \
        "$LOGS/$NAME already: resume it with --resume latest, or give the new run another NAME"

    # '--' keeps torchrun from taking the trainer's --logs for its own --logs-specs.
    local command=(
        env "${variables[@]}" "$PYTHON" -m torch.distributed.run --nnodes "$NUM_NODES"
        --nproc-per-node "$processes" --max-restarts 0 "${rendezvous[@]}"
        -m -- "$trainer.main" "${device[@]}" "${args[@]}" "$@"
    )
    [ "$DRY_RUN" != 0 ] || exec "${command[@]}"
    printf '%q \\\n' "${command[@]:0:${#command[@]}-1}"
    printf '%q\n' "${command[@]: -1}"
}
