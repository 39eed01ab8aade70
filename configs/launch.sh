# Start the patched OpenCLIP's trainer under torchrun. Sourced by the run_*.sh scripts, after their settings.
#
# Reads the settings below and those of the run script; everything can be overridden from the environment, and the
# arguments of the run script are passed on to the trainer. NUM_GPUS=0 runs NUM_PROCESSES processes on the CPU.

# --- settings common to all recipes ---------------------------------------------------------------------------------
MODEL=${MODEL:-ViT-B-16}               # an OpenCLIP model name, or the path of a model config FILE.json
LR=${LR:-1.e-3}
WD=${WD:-0.2}
BETA2=${BETA2:-0.95}
WARMUP=${WARMUP:-1000}                 # iterations
GRAD_CLIP_NORM=${GRAD_CLIP_NORM:-1.0}
ACCUM_FREQ=${ACCUM_FREQ:-1}            # GLOBAL_BATCH is what one optimiser step sees, accumulation included
SEED=${SEED:-0}
WORKERS=${WORKERS:-4}                  # data loading processes for each GPU
GRAD_CHECKPOINTING=${GRAD_CHECKPOINTING:-1}         # 0: faster, where memory allows
IMAGENET_VAL=${IMAGENET_VAL-./imagenet_validation}  # folder of class folders; empty: no zero-shot evaluation
ZEROSHOT_FREQUENCY=${ZEROSHOT_FREQUENCY:-1}         # epochs
SAVE_FREQUENCY=${SAVE_FREQUENCY:-1}                 # epochs
LOG_EVERY=${LOG_EVERY:-20}                          # iterations
LOGS=${LOGS:-./logs}
REPORT_TO=${REPORT_TO-wandb}           # wandb, tensorboard, both with a comma, or empty
WANDB_PROJECT=${WANDB_PROJECT:-mobileclip}
DIST_TIMEOUT=${DIST_TIMEOUT:-3600}     # seconds that the nodes wait for each other at the start
SAMPLING=${SAMPLING:-with-replacement} # or without-replacement: passes in which each sample comes once
SAVE_EVERY_N_STEPS=${SAVE_EVERY_N_STEPS:-0}         # also within epochs, to be resumed there; 0: no
KEEP_LAST_K=${KEEP_LAST_K:-2}                       # of these
MAX_SKIPPED_FRACTION=${MAX_SKIPPED_FRACTION:-}      # of unusable samples, more stop the run; default: the trainer's
DATASETS=${DATASETS:-}                 # folder of the data sets; default: datasets/ at the recipe's root

# --- where things are -----------------------------------------------------------------------------------------------
fail() { echo "error: $*" >&2; exit 1; }

launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The scripts run from the patched tree (open_clip/configs) and from the recipe's root (configs, open_clip/ beside it).
if [ -f "$launch_dir/../src/training/main.py" ]; then
    tree=$(cd "$launch_dir/.." && pwd)
else
    tree=$launch_dir/../open_clip
fi
[ -f "$tree/src/training/dr/loss.py" ] ||
    fail "no patched OpenCLIP in $tree: run 'bash scripts/setup_open_clip.sh' at the recipe's root first"
tree=$(cd "$tree" && pwd)
DATASETS=${DATASETS:-$(dirname "$tree")/datasets}
export PYTHONPATH="$tree/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import braceexpand, sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null ||
    fail "'$PYTHON' has no torch or no braceexpand: activate the environment in which the recipe is installed (README," \
        "Installing by hand), or set PYTHON to its python"

# require_shards PATTERN VARIABLE HINT: the first and the last shard of a brace pattern must be there.
require_shards() {
    case $1 in *://* | pipe:*) return ;; esac
    "$PYTHON" - "$@" <<'PY' || exit 1
import os, sys
from braceexpand import braceexpand

pattern, variable, hint = sys.argv[1:]
shards = [shard for part in pattern.split("::") for shard in braceexpand(part)]
absent = [shard for shard in (shards[0], shards[-1]) if not os.path.isfile(shard)]
if absent:
    sys.exit(
        f"error: no training shard {absent[0]} (the first and the last of {len(shards)} shards were looked for)\n"
        f"{hint}\nOr set {variable} to where your shards are."
    )
PY
}

launch() { # launch [TRAINER ARGUMENT …]
    NUM_NODES=${NUM_NODES:-$DEFAULT_NODES}
    NUM_GPUS=${NUM_GPUS:-$DEFAULT_GPUS} # on each node
    local processes=$NUM_GPUS device=() found
    if [ "$NUM_GPUS" -eq 0 ]; then
        processes=${NUM_PROCESSES:-1}
        device=(--dist-backend gloo)
        export CUDA_VISIBLE_DEVICES= # a CPU run leaves the GPUs alone
        PRECISION=${PRECISION:-fp32}
    else
        found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
        [ "$found" -ge "$NUM_GPUS" ] ||
            fail "this recipe wants $NUM_GPUS GPUs a node, and this machine has $found: set NUM_NODES and NUM_GPUS" \
                "(NUM_GPUS=0 runs on the CPU)"
    fi
    PRECISION=${PRECISION:-amp}

    # One node needs nothing; several meet at MASTER_ADDR:MASTER_PORT.
    local rendezvous=(--standalone)
    if [ "$NUM_NODES" -gt 1 ]; then
        local variable
        for variable in MASTER_ADDR MASTER_PORT ROLE_RANK; do
            [ -n "${!variable:-}" ] || fail "NUM_NODES=$NUM_NODES, but $variable is not set: MASTER_ADDR and" \
                "MASTER_PORT say where the nodes meet, ROLE_RANK which node this is (0 to $((NUM_NODES - 1))); for" \
                "one node set NUM_NODES=1"
        done
        rendezvous=(
            --node-rank "$ROLE_RANK" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
            --rdzv-id "${RDZV_ID:-$NAME}"
            --rdzv-conf "timeout=$DIST_TIMEOUT,join_timeout=$DIST_TIMEOUT,read_timeout=$DIST_TIMEOUT,close_timeout=$DIST_TIMEOUT"
        )
    fi

    case " $* ${RECIPE[*]} " in
        *" --resume "*) ;;
        *) [ ! -e "$LOGS/$NAME/out.log" ] || fail "there is a run $LOGS/$NAME already: go on with it (--resume latest)," \
            "or give this one another NAME" ;;
    esac

    local world=$((NUM_NODES * processes))
    [ $((GLOBAL_BATCH % (world * ACCUM_FREQ))) -eq 0 ] ||
        fail "GLOBAL_BATCH=$GLOBAL_BATCH can't be shared out over $NUM_NODES nodes x $processes processes" \
            "x ACCUM_FREQ=$ACCUM_FREQ: choose a multiple of $((world * ACCUM_FREQ))"
    local samples=$((ITERATIONS * GLOBAL_BATCH))
    # An "epoch" is what lies between two checkpoints, whatever the size of the data set.
    local epoch_samples=$((samples / CHECKPOINTS))

    local sampling
    case $SAMPLING in
        with-replacement) sampling=--dataset-resampled ;;
        without-replacement) sampling=--dataset-without-replacement ;;
        *) fail "SAMPLING=$SAMPLING: expected with-replacement or without-replacement" ;;
    esac

    local args=(
        --train-data "$DATA" --train-num-samples "$epoch_samples" --epochs "$CHECKPOINTS"
        --dataset-type webdataset "$sampling" --workers "$WORKERS"
        --model "$MODEL" --precision "$PRECISION" --batch-size $((GLOBAL_BATCH / world / ACCUM_FREQ))
        --accum-freq "$ACCUM_FREQ" --lr "$LR" --wd "$WD" --beta2 "$BETA2" --warmup "$WARMUP"
        --grad-clip-norm "$GRAD_CLIP_NORM" --seed "$SEED"
        --local-loss --gather-with-grad --ddp-static-graph
        --save-frequency "$SAVE_FREQUENCY" --zeroshot-frequency "$ZEROSHOT_FREQUENCY"
        --log-every-n-steps "$LOG_EVERY" --logs "$LOGS" --name "$NAME"
    )
    [ "$SAVE_EVERY_N_STEPS" = 0 ] || args+=(--save-every-n-steps "$SAVE_EVERY_N_STEPS")
    [ "$KEEP_LAST_K" = 2 ] || args+=(--keep-last-k "$KEEP_LAST_K")
    [ -z "$MAX_SKIPPED_FRACTION" ] || args+=(--max-skipped-fraction "$MAX_SKIPPED_FRACTION")
    [ "$GRAD_CHECKPOINTING" = 0 ] || args+=(--grad-checkpointing)
    if [ -n "$IMAGENET_VAL" ]; then
        [ -d "$IMAGENET_VAL" ] || fail "no folder IMAGENET_VAL=$IMAGENET_VAL: set it to ImageNet's validation pictures" \
            "(a folder for each class), or to nothing (IMAGENET_VAL=) to train without zero-shot evaluation"
        args+=(--imagenet-val "$IMAGENET_VAL")
    fi
    if [ -n "$REPORT_TO" ]; then
        case $REPORT_TO in *wandb*) "$PYTHON" -c 'import wandb' 2>/dev/null ||
            fail "REPORT_TO=$REPORT_TO, but wandb is not installed: 'pip install wandb', or set REPORT_TO=tensorboard" \
                "or to nothing (REPORT_TO=)" ;;
        esac
        args+=(--report-to "$REPORT_TO" --wandb-project-name "$WANDB_PROJECT")
    fi

    # '--' keeps today's torchrun from taking the trainer's --logs for its own --logs-specs.
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NUM_NODES" --nproc-per-node "$processes" --max-restarts 0 \
        "${rendezvous[@]}" -m -- training.main "${device[@]}" "${args[@]}" "${RECIPE[@]}" "$@"
}
