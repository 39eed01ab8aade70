#!/usr/bin/env bash
# The whole recipe on a small real data set: about 3,700 OpenMoji pictures with their names, on GPUs where there are
# some, else on the CPU in two processes.
#
#     bash scripts/quickstart.sh [--fast]
#
# Sets up the environment and OpenCLIP, makes the data in the layouts of DataComp-12M, trains two teachers, reinforces the
# data with them, joins it, trains two students of one model for the same number of samples seen, without and with
# reinforcement, and compares them on pictures held out from everything. Takes up to 20 minutes on 2 cores after the
# installation. --fast walks the same path in about a minute: its models have learnt nothing.
#
# Leaves quickstart/ (with --fast: quickstart/fast/): results.json, learning_curves.png, augmentations.png, logs/,
# datasets/. Run again, it goes on where it was interrupted; `rm -r quickstart` starts over.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"

# --- settings -------------------------------------------------------------------------------------------------------
PICTURES=                 # training pictures; empty: all, about 3,300
SHARDS=8
HELD_OUT=400
TEACHER_ITERATIONS=660    # x BATCH = samples seen
STUDENT_ITERATIONS=210
STUDENT_CHECKPOINTS=10
BATCH=128
AUGMENTATIONS=10          # stored for each picture
WORK=${WORK:-$ROOT/quickstart}         # what is made goes here
OPEN_CLIP=${OPEN_CLIP:-$ROOT/open_clip} # the patched tree; made if it is not there
case ${1:-} in
    --fast) PICTURES=96 SHARDS=4 HELD_OUT=20 TEACHER_ITERATIONS=2 STUDENT_ITERATIONS=4 STUDENT_CHECKPOINTS=2 BATCH=16
        AUGMENTATIONS=2 WORK=$WORK/fast ;;
    -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
    '') ;;
    *) echo "error: found '$1', expected --fast, --help or nothing" >&2; exit 1 ;;
esac
export WORK

# How all four models are trained; configs/run_*.sh read these from the environment.
export MODEL=$ROOT/configs/quickstart_vit.json
export GLOBAL_BATCH=$BATCH LR=2e-3 WARMUP=20 WORKERS=1 LOG_EVERY=10 GRAD_CHECKPOINTING=0
export LOGS=$WORK/logs REPORT_TO='' IMAGENET_VAL='' NUM_NODES=1

# --- environment ----------------------------------------------------------------------------------------------------
source scripts/environment.sh
use_environment quickstart
mkdir -p "$WORK"
STARTED=$SECONDS
: >"$WORK/timings.txt"

# step NAME COMMAND …: say what is being done, do it, and note how long it took.
step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s (%d min %02d s so far)\n' "$name" $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60))
    "$@"
    printf '%s\t%d\n' "$name" $((SECONDS - start)) >>"$WORK/timings.txt"
}

# All GPUs that divide the batch evenly, or two processes on the CPU, each with its share of the cores.
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
while [ "$gpus" -gt 1 ] && [ $((BATCH % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done
export NUM_GPUS=$gpus NUM_PROCESSES=2
processes=$((gpus > 0 ? gpus : NUM_PROCESSES))
cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
echo "training on $([ "$gpus" -gt 0 ] && echo "$gpus GPUs" || echo "the CPU, $processes processes x $OMP_NUM_THREADS threads")"

# --- 1. OpenCLIP ----------------------------------------------------------------------------------------------------
step "OpenCLIP" bash scripts/setup_open_clip.sh --dest "$OPEN_CLIP"

# --- 2. the data: caption shards, image shards, captions by other words, held-out pictures --------------------------
data=$WORK/datasets
step "data" "$PYTHON" scripts/quickstart_data.py --output "$data" --shards "$SHARDS" --held-out "$HELD_OUT" \
    ${PICTURES:+--limit "$PICTURES"}
pattern="{00000000..$(printf %08d $((SHARDS - 1)))}.tar"
# Teachers need images with captions; the join makes these too.
step "join captions and images" "$PYTHON" scripts/join_shards.py --source "$data/DataComp-12M/$pattern" \
    --source "$data/DataComp-12M-images" --require image,caption --output "$data/DataComp-12M/shards"

# train NAME SCRIPT SHARDS: run a recipe to its end, from its latest checkpoint on; nothing if it has ended already.
train() {
    local name=$1 script=$2 shards=$3
    shift 3
    local last=$LOGS/$name/checkpoints/epoch_$CHECKPOINTS.pt # epoch_latest.pt is written after it
    [ ! "${last%/*}/epoch_latest.pt" -nt "$last" ] || [ ! -f "$last" ] || { echo "$name is trained"; return; }
    local status
    {
        (cd "$OPEN_CLIP" && NAME=$name DATA=$shards bash "configs/$script" --resume latest \
            --val-data "$data/held_out/00000000.tar" --val-num-samples "$HELD_OUT" "$@") 2>&1 |
            tee "$WORK/$name.log" | grep --line-buffered -oE 'Train Epoch.{,150}|Eval Epoch: [0-9]+ image.{,100}'
        status=${PIPESTATUS[0]}
    } || true
    [ "$status" -eq 0 ] || { tail -n 40 "$WORK/$name.log" >&2; echo "error: $name failed, see $WORK/$name.log" >&2; exit 1; }
}

# --- 3. two teachers, with different seeds --------------------------------------------------------------------------
export ITERATIONS=$TEACHER_ITERATIONS CHECKPOINTS=2
for seed in 0 1; do
    SEED=$seed step "teacher $seed" train "teacher-$seed" run_datacomp12m.sh "$data/DataComp-12M/shards/$pattern"
done

# --- 4. reinforcements ----------------------------------------------------------------------------------------------
cat >"$WORK/reinforce.json" <<JSON
{
  "model_name": "$MODEL,$MODEL",
  "pretrained": "$LOGS/teacher-0/checkpoints/epoch_2.pt,$LOGS/teacher-1/checkpoints/epoch_2.pt",
  "num_samples": $AUGMENTATIONS,
  "reinforce": {
    "image_augmentation": {
      "to_rgb": {"enable": true},
      "random_resized_crop": {"size": 64, "scale": [0.9, 1.0], "interpolation": "bicubic"},
      "rand_augment": {"enable": false},
      "to_tensor": {"enable": true},
      "normalize": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    }
  }
}
JSON
reinforce() {
    PYTHONPATH=$OPEN_CLIP/src "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        scripts/reinforce.py --input "$data/DataComp-12M/shards/$pattern" --output "$data/DataCompDR-12M-noimage" \
        --config "$WORK/reinforce.json" --synthetic-captions "$data/synthetic_captions.jsonl"
}
step "reinforcements" reinforce

# --- 5. the join ----------------------------------------------------------------------------------------------------
export DATACOMP12M_PATH=$data/DataComp-12M DATACOMP12M_IMAGES_PATH=$data/DataComp-12M-images
export DATACOMPDR12M_NOIMG_PATH=$data/DataCompDR-12M-noimage DATACOMPDR12M_PATH=$data/DataCompDR-12M/shards
step "join with reinforcements" bash scripts/join_datacompdr12m.sh --verify-hash

# --- 6. two students, the same but for the reinforcements -----------------------------------------------------------
export ITERATIONS=$STUDENT_ITERATIONS CHECKPOINTS=$STUDENT_CHECKPOINTS SEED=2
joined="$DATACOMPDR12M_PATH/$pattern"
step "student, plain" train student-plain run_datacomp12m.sh "$joined"
# Not 100 and 0 1 as with the published teachers: 25 is what these teachers' own logit scale has become, and pictures of
# so few kinds want the contrastive loss beside the distillation.
export REINFORCEMENT_CONFIG=$WORK/reinforce.json DISTILL_TEACHER_DIMENSION="128 128"
export DISTILL_LOGIT_SCALE=25 DISTILL_LOSS_WEIGHTS="1.0 1.0"
step "student, reinforced" train student-reinforced run_datacompdr12m.sh "$joined"

# --- 7. the comparison ----------------------------------------------------------------------------------------------
"$PYTHON" - "$WORK" <<'PY'
import json, sys
from pathlib import Path

work = Path(sys.argv[1])
lines = (line.split("\t") for line in (work / "timings.txt").read_text().splitlines())
before = json.loads((work / "timings.json").read_text()) if (work / "timings.json").exists() else {}
# what an earlier, interrupted run did stays counted
seconds = {name: max(int(seconds), before.get(name, 0)) for name, seconds in lines}
(work / "timings.json").write_text(json.dumps(seconds))
PY
step "report" "$PYTHON" scripts/quickstart_report.py "$WORK" --config "$WORK/reinforce.json"
echo "done in $(((SECONDS - STARTED) / 60)) min $(((SECONDS - STARTED) % 60)) s: see $WORK"
