#!/usr/bin/env bash
# Run the whole recipe on a small real data set: about 3,700 OpenMoji images with their names, on
# GPUs if there are any, else on the CPU in two processes.
#
#     bash scripts/quickstart.sh [--fast]
#
# Sets up the environment and OpenCLIP, makes the data in the layouts of DataComp-12M, trains two
# teachers, reinforces the data with them, joins it, and trains students of one model for the same
# number of samples seen, without and with reinforcement. All are compared on held-out images. Takes
# up to 20 minutes on 2 cores after the installation. --fast runs the same steps in about a minute;
# its models have learnt nothing.
#
# Writes to quickstart/ (with --fast: quickstart/fast/): results.json, learning_curves.png,
# augmentations.png, logs/, datasets/. Run again, it continues where it was interrupted;
# `rm -r quickstart` starts over.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"

# --- settings -------------------------------------------------------------------------------------
WORK=${WORK:-$ROOT/quickstart}           # where everything is written
OPEN_CLIP=${OPEN_CLIP:-$ROOT/open_clip}  # the patched tree; made if it does not exist
case ${1:-} in
    --fast)
        WORK=$WORK/fast
        : "${TRAINING_IMAGES:=96}" "${DATA_SHARDS:=4}" "${HELD_OUT:=20}" "${AUGMENTATIONS:=2}"
        : "${BATCH:=16}" "${TEACHER_ITERATIONS:=2}" "${STUDENT_ITERATIONS:=4}"
        : "${STUDENT_CHECKPOINTS:=2}" ;;
    -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
    '') ;;
    *) echo "error: found '$1', expected --fast, --help or nothing" >&2; exit 1 ;;
esac
TRAINING_IMAGES=${TRAINING_IMAGES:-}     # empty: all, about 3,300
DATA_SHARDS=${DATA_SHARDS:-8}
HELD_OUT=${HELD_OUT:-400}                # images for the evaluation
AUGMENTATIONS=${AUGMENTATIONS:-10}       # stored for each image
BATCH=${BATCH:-128}
TEACHER_ITERATIONS=${TEACHER_ITERATIONS:-660} # x BATCH = samples seen
STUDENT_ITERATIONS=${STUDENT_ITERATIONS:-210}
STUDENT_CHECKPOINTS=${STUDENT_CHECKPOINTS:-10}

# Teachers: name and seed. They are trained without reinforcement.
TEACHERS=(
    "teacher-0  0"
    "teacher-1  1"
)
# Students: name and recipe. All else is the same; scripts/quickstart/report.py compares them.
STUDENTS=(
    "student-plain       run_datacomp12m.sh"
    "student-reinforced  run_datacompdr12m.sh"
)

# How all models are trained; configs/run_*.sh read these from the environment.
export MODEL=$ROOT/configs/quickstart_vit.json
export GLOBAL_BATCH=$BATCH LR=2e-3 WARMUP=20 WORKERS=1 LOG_EVERY=10 GRAD_CHECKPOINTING=0
export LOGS=$WORK/logs REPORT_TO='' IMAGENET_VAL='' NUM_NODES=1

# --- environment ----------------------------------------------------------------------------------
# shellcheck source-path=SCRIPTDIR source=environment.sh
source scripts/environment.sh
use_environment quickstart
mkdir -p "$WORK"
SECONDS=0 # the installation does not count

# step NAME COMMAND …: announce a step, run it, and record how long it took.
step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s (%d min %02d s so far)\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
    "$@"
    printf '%s\t%d\n' "$name" $((SECONDS - start)) >>"$WORK/timings.txt"
}

# All GPUs that divide the batch evenly, or two processes on the CPU that share the cores.
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
while [ "$gpus" -gt 1 ] && [ $((BATCH % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done
export NUM_GPUS=$gpus NUM_PROCESSES=2
processes=$((gpus > 0 ? gpus : NUM_PROCESSES))
cores=$(env -u OMP_NUM_THREADS nproc)
export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
if [ "$gpus" -gt 0 ]; then
    echo "training on $gpus GPUs"
else
    echo "training on the CPU, $processes processes x $OMP_NUM_THREADS threads"
fi

# --- 1. OpenCLIP ----------------------------------------------------------------------------------
step "OpenCLIP" bash scripts/setup_open_clip.sh --dest "$OPEN_CLIP"

# --- 2. data: caption shards, image shards, synthetic captions, held-out images -------------------
data=$WORK/datasets
step "data" "$PYTHON" scripts/quickstart/data.py --output "$data" --shards "$DATA_SHARDS" \
    --held-out "$HELD_OUT" ${TRAINING_IMAGES:+--limit "$TRAINING_IMAGES"}
pattern="{00000000..$(printf %08d $((DATA_SHARDS - 1)))}.tar"
# The teachers' shards: images with captions.
step "join captions and images" "$PYTHON" scripts/join_shards.py \
    --source "$data/DataComp-12M/$pattern" --source "$data/DataComp-12M-images" \
    --require image,caption --output "$data/DataComp-12M/shards"

# train NAME SCRIPT SHARDS: run a recipe to its end, from its latest checkpoint on.
train() {
    local name=$1 script=$2 shards=$3 status
    local checkpoints=$LOGS/$1/checkpoints
    local last=$checkpoints/epoch_$CHECKPOINTS.pt # epoch_latest.pt is written after it
    if [ -f "$last" ] && [ "$checkpoints/epoch_latest.pt" -nt "$last" ]; then
        echo "$name is trained"
        return
    fi
    {
        (cd "$OPEN_CLIP" && NAME=$name DATA=$shards bash "configs/$script" --resume latest \
            --val-data "$data/held_out/00000000.tar" --val-num-samples "$HELD_OUT") 2>&1 |
            tee "$WORK/$name.log" |
            grep --line-buffered -oE 'Train Epoch.{,150}|Eval Epoch: [0-9]+ image.{,100}'
        status=${PIPESTATUS[0]}
    } || true
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$WORK/$name.log" >&2
        echo "error: $name failed, see $WORK/$name.log" >&2
        exit 1
    fi
}

# --- 3. teachers ----------------------------------------------------------------------------------
export ITERATIONS=$TEACHER_ITERATIONS CHECKPOINTS=2
models='' weights=''
for teacher in "${TEACHERS[@]}"; do
    read -r name seed <<<"$teacher"
    SEED=$seed step "$name" train "$name" run_datacomp12m.sh "$data/DataComp-12M/shards/$pattern"
    models+=${models:+,}$MODEL
    weights+=${weights:+,}$LOGS/$name/checkpoints/epoch_$CHECKPOINTS.pt
done

# --- 4. reinforcements ----------------------------------------------------------------------------
cat >"$WORK/reinforce.json" <<JSON
{
  "model_name": "$models",
  "pretrained": "$weights",
  "num_samples": $AUGMENTATIONS,
  "reinforce": {
    "image_augmentation": {
      "to_rgb": {"enable": true},
      "random_resized_crop": {"size": 64, "scale": [0.9, 1.0], "interpolation": "bicubic"},
      "rand_augment": {"enable": false},
      "to_tensor": {"enable": true},
      "normalize": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711]
      }
    }
  }
}
JSON
step "reinforcements" env PYTHONPATH="$OPEN_CLIP/src" "$PYTHON" -m torch.distributed.run \
    --standalone --nproc-per-node "$processes" scripts/reinforce.py \
    --input "$data/DataComp-12M/shards/$pattern" --output "$data/DataCompDR-12M-noimage" \
    --config "$WORK/reinforce.json" --synthetic-captions "$data/synthetic_captions.jsonl"

# --- 5. join --------------------------------------------------------------------------------------
export DATACOMP12M_PATH=$data/DataComp-12M DATACOMP12M_IMAGES_PATH=$data/DataComp-12M-images
export DATACOMPDR12M_NOIMG_PATH=$data/DataCompDR-12M-noimage
export DATACOMPDR12M_PATH=$data/DataCompDR-12M/shards
step "join with reinforcements" bash scripts/join_datacompdr12m.sh --verify-hash

# --- 6. students ----------------------------------------------------------------------------------
export ITERATIONS=$STUDENT_ITERATIONS CHECKPOINTS=$STUDENT_CHECKPOINTS SEED=2
# Only the reinforced recipe reads these; with the published teachers they are 100 and 0 1. The
# logit scale of these teachers is 25, and so few kinds of images need the contrastive loss too.
export REINFORCEMENT_CONFIG=$WORK/reinforce.json DISTILL_TEACHER_DIMENSION="128 128"
export DISTILL_LOGIT_SCALE=25 DISTILL_LOSS_WEIGHTS="1.0 1.0"
for student in "${STUDENTS[@]}"; do
    read -r name script <<<"$student"
    step "$name" train "$name" "$script" "$DATACOMPDR12M_PATH/$pattern"
done

# --- 7. comparison --------------------------------------------------------------------------------
step "report" "$PYTHON" scripts/quickstart/report.py "$WORK" --config "$WORK/reinforce.json"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: see $WORK"
