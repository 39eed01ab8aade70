#!/usr/bin/env bash
# Compare training with and without dataset reinforcement on a small real data set: about 3,700
# OpenMoji images. Uses GPUs if there are any, otherwise two processes on the CPU.
#
#     bash scripts/quickstart.sh [--caption-noise P] [--fast]
#
# The script sets up the environment and OpenCLIP, makes data in the format of DataComp-12M, trains
# two teachers, reinforces the data with them, and joins it. Then it trains students of one model,
# with and without reinforcement, for the same number of samples, and compares all models on
# held-out images. Finally it evaluates the reinforced student with clip-benchmark, and exports it.
# It takes up to 20 minutes on 2 cores after the installation.
#
# --caption-noise P  Replace each of the students' captions with probability P by simulated web
#                    noise: other languages, file names, generic phrases, captions of other images.
#                    Default: 0.6; 0 leaves all captions clean.
# --fast             Run the same steps in about two minutes; the models learn nothing.
#
# The script writes to quickstart/ (with --fast: quickstart/fast/): results.json,
# learning_curves.png, augmentations.png, a log file for each step, logs/, datasets/ and model/. Run
# the script again to continue after an interruption; `rm -r quickstart` removes what it wrote.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"

# --- settings -------------------------------------------------------------------------------------
WORK=${WORK:-$ROOT/quickstart}           # folder for all data and results
OPEN_CLIP=${OPEN_CLIP:-$ROOT/open_clip}  # patched OpenCLIP; made if it does not exist
CAPTION_NOISE=${CAPTION_NOISE:-0.6}      # fraction of the students' captions to replace by noise
fast=
while [ $# -gt 0 ]; do
    case $1 in
        --fast) fast=1 ;;
        --caption-noise) CAPTION_NOISE=${2:-nothing}; shift $(($# > 1)) ;;
        --caption-noise=*) CAPTION_NOISE=${1#*=} ;;
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            printf '\nSettings (environment variables) and their defaults:\n\n'
            sed -n 's/^\([A-Z_]*\)=${\1:-\(.*\)} *# *\(.*\)$/\1=\2|\3/p' "${BASH_SOURCE[0]}" |
                while IFS='|' read -r setting text; do
                    printf '  %-28s %s\n' "$setting" "$text"
                done
            exit ;;
        *) echo "error: found '$1', expected --caption-noise P, --fast or --help" >&2; exit 1 ;;
    esac
    shift
done
[[ $CAPTION_NOISE =~ ^(0|0?\.[0-9]+|1|1\.0+)$ ]] || {
    echo "error: found --caption-noise $CAPTION_NOISE, expected a probability from 0 to 1" >&2
    exit 1
}
if [ -n "$fast" ]; then
    WORK=$WORK/fast
    : "${TRAINING_IMAGES:=96}" "${DATA_SHARDS:=4}" "${HELD_OUT:=20}" "${AUGMENTATIONS:=2}"
    : "${BATCH:=16}" "${TEACHER_ITERATIONS:=2}" "${STUDENT_ITERATIONS:=4}"
    : "${STUDENT_CHECKPOINTS:=2}"
fi
TRAINING_IMAGES=${TRAINING_IMAGES:-}     # number of training images; empty: all, about 3,300
DATA_SHARDS=${DATA_SHARDS:-8}            # number of training shards
HELD_OUT=${HELD_OUT:-400}                # number of images for the evaluation
AUGMENTATIONS=${AUGMENTATIONS:-10}       # stored augmentations of each image
BATCH=${BATCH:-128}                      # global batch, in samples
TEACHER_ITERATIONS=${TEACHER_ITERATIONS:-400} # optimizer steps of each teacher
STUDENT_ITERATIONS=${STUDENT_ITERATIONS:-210} # optimizer steps of each student
STUDENT_CHECKPOINTS=${STUDENT_CHECKPOINTS:-14} # checkpoints of each student; each is evaluated
STUDENT_SEED=${STUDENT_SEED:-2}          # random seed of the students

# Teachers: name and seed. They are trained without reinforcement, on clean captions: they stand for
# models that were trained on far more and better data than the students'.
TEACHERS=(
    "teacher-0  0"
    "teacher-1  1"
)
# Students: name, recipe, and the weights of its contrastive and its distillation loss. All else is
# the same; scripts/quickstart/report.py compares them.
STUDENTS=(
    "student-baseline    run_datacomp12m.sh"
    "student-synthetic   run_datacompdr12m.sh  1.0 0.0"
    "student-teachers    run_datacompdr12m.sh  0.0 1.0"
    "student-reinforced  run_datacompdr12m.sh  1.0 1.0"
)

# How all models are trained; configs/run_*.sh read these from the environment.
export MODEL=$ROOT/configs/quickstart_vit.json
export GLOBAL_BATCH=$BATCH LR=2e-3 WARMUP=20 WORKERS=1 LOG_EVERY=5 GRAD_CHECKPOINTING=0
export LOGS=$WORK/logs REPORT_TO='' IMAGENET_VAL='' NUM_NODES=1

# --- environment ----------------------------------------------------------------------------------
# shellcheck source-path=SCRIPTDIR source=environment.sh
source scripts/environment.sh
use_environment quickstart,evaluate,export
mkdir -p "$WORK"
SECONDS=0 # the installation does not count

# Finished steps are skipped, so all of $WORK must come from the same settings.
settings="caption noise $CAPTION_NOISE, training images ${TRAINING_IMAGES:-all} in $DATA_SHARDS \
shards, held out $HELD_OUT, augmentations $AUGMENTATIONS, batch $BATCH, iterations of teachers \
$TEACHER_ITERATIONS and of students $STUDENT_ITERATIONS, checkpoints $STUDENT_CHECKPOINTS, seed \
$STUDENT_SEED"
[ -e "$WORK/datasets" ] || echo "$settings" >"$WORK/settings.txt"
found=$(cat "$WORK/settings.txt" 2>/dev/null) || found="an earlier version's"
[ "$found" = "$settings" ] || {
    printf 'error: %s was made with other settings:\n  found     %s\n  expected  %s\n%s\n' \
        "$WORK" "$found" "$settings" "Remove the folder, or set WORK to another one." >&2
    exit 1
}

number=0
steps=$((8 + ${#TEACHERS[@]} + ${#STUDENTS[@]}))

# next_label NAME: count a step, and set the label of its progress line.
next_label() {
    number=$((number + 1))
    label=$(printf '[%*d/%d] %-20s' ${#steps} "$number" "$steps" "$1")
}

# step NAME COMMAND …: run a step, its output in $WORK/NAME.log, and record how long it took.
# SAMPLES is the number of samples that a training run sees.
step() {
    local name=$1 start=$SECONDS
    shift
    next_label "$name"
    "$PYTHON" scripts/quickstart/progress.py ${SAMPLES:+--samples "$SAMPLES"} \
        "$label" "$WORK/${name// /-}.log" "$@"
    printf '%s\t%d\n' "$name" $((SECONDS - start)) >>"$WORK/timings.txt"
}

# All GPUs that divide the batch evenly, or two processes on the CPU that share the cores.
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
while [ "$gpus" -gt 1 ] && [ $((BATCH % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done
export NUM_GPUS=$gpus NUM_PROCESSES=${NUM_PROCESSES:-2}
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

# --- 2. data: captions, clean captions, images, synthetic captions, held-out images ---------------
data=$WORK/datasets
step "data" "$PYTHON" scripts/quickstart/data.py --output "$data" --shards "$DATA_SHARDS" \
    --held-out "$HELD_OUT" --caption-noise "$CAPTION_NOISE" \
    ${TRAINING_IMAGES:+--limit "$TRAINING_IMAGES"}
pattern="{00000000..$(printf %08d $((DATA_SHARDS - 1)))}.tar"
# Images with clean captions for the teachers, and with the captions that are to be reinforced.
join_captions() {
    step "$1" "$PYTHON" scripts/join_shards.py --require image,caption \
        --source "$2/$pattern" --source "$data/DataComp-12M-images" --output "$2/shards"
}
join_captions "join clean captions" "$data/DataComp-12M-clean"
join_captions "join captions" "$data/DataComp-12M"

# train NAME SCRIPT SHARDS: run a recipe to its end, from its latest checkpoint on.
train() {
    local name=$1 script=$2 shards=$3 checkpoints=$LOGS/$1/checkpoints
    local last=$checkpoints/epoch_$CHECKPOINTS.pt # epoch_latest.pt is written after it
    if [ -f "$last" ] && [ "$checkpoints/epoch_latest.pt" -nt "$last" ]; then
        next_label "$name"
        echo "$label is trained"
        return
    fi
    SAMPLES=$((ITERATIONS * BATCH)) step "$name" \
        env NAME="$name" DATA="$shards" SAVE_FREQUENCY="$CHECKPOINTS" \
        bash "$OPEN_CLIP/configs/$script" --resume latest \
        --val-data "$data/held_out/00000000.tar" --val-num-samples "$HELD_OUT"
}

# --- 3. teachers ----------------------------------------------------------------------------------
export ITERATIONS=$TEACHER_ITERATIONS CHECKPOINTS=2
models='' weights=''
for teacher in "${TEACHERS[@]}"; do
    read -r name seed <<<"$teacher"
    SEED=$seed train "$name" run_datacomp12m.sh "$data/DataComp-12M-clean/shards/$pattern"
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
step "join reinforcements" bash scripts/join_datacompdr12m.sh --verify-hash

# --- 6. students ----------------------------------------------------------------------------------
export ITERATIONS=$STUDENT_ITERATIONS CHECKPOINTS=$STUDENT_CHECKPOINTS SEED=$STUDENT_SEED
# Only the reinforced recipe reads these. The logit scale lies between the one that these teachers
# learn in their short training, 18, and their best one, about 37 (docs/your-data.md); that of the
# published teachers is 100.
export REINFORCEMENT_CONFIG=$WORK/reinforce.json DISTILL_TEACHER_DIMENSION="128 128"
export DISTILL_LOGIT_SCALE=25
for student in "${STUDENTS[@]}"; do
    read -r name script loss_weights <<<"$student"
    DISTILL_LOSS_WEIGHTS=$loss_weights train "$name" "$script" "$DATACOMPDR12M_PATH/$pattern"
done

# --- 7. evaluation and export ---------------------------------------------------------------------
# The held-out images, in the form of clip-benchmark's retrieval data sets.
held_out=$data/evaluation/wds_held_out
mkdir -p "$held_out/test"
ln -sf ../../../held_out/00000000.tar "$held_out/test/0.tar"
echo 1 >"$held_out/test/nshards.txt"
echo retrieval >"$held_out/dataset_type.txt"
trained=$LOGS/student-reinforced/checkpoints/epoch_$STUDENT_CHECKPOINTS.pt
step "evaluation" "$PYTHON" scripts/evaluate.py "$trained" --model "$MODEL" \
    --data "$data/evaluation" --suite held_out
step "export" "$PYTHON" scripts/export.py "$trained" --model "$MODEL" --output "$WORK/model" --onnx
picture=$(tar -tf "$data/held_out/00000000.tar" | awk '/\.jpg$/ && !found++')
tar -xOf "$data/held_out/00000000.tar" "$picture" >"$WORK/picture.jpg"

# --- 8. comparison --------------------------------------------------------------------------------
echo
"$PYTHON" scripts/quickstart/report.py "$WORK" --config "$WORK/reinforce.json"
printf '\nThe reinforced student as exported, on one held-out image and one caption:\n\n'
sed -n '/^format /,/^$/p' "$WORK/export.log"
cat <<TEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at, in $WORK:
  learning_curves.png  recall against samples seen, of all students
  augmentations.png    two reinforced samples: captions, augmentations, the teachers' view of them
  results.json         every number and setting
  model/               the reinforced student, exported: OpenCLIP's format, ONNX, a model card

In Python, this ranks captions for one of the held-out images:

$(sed -n "/^import open_clip/,/^print/{s#picture.jpg#$WORK/picture.jpg#;s/^/  /;p}" "$WORK/export.log")

Next, the real data. Download one of the 1,024 shards of DataCompDR-12M (about 8 GB of disk):

  source "$VIRTUAL_ENV/bin/activate"
  bash scripts/download_datacompdr12m.sh --shards 0

and continue with README.md, section "Train on DataCompDR-12M". One shard, about 12,500 images,
is enough to try each step; its model stays near chance on ImageNet. All shards and the published
settings gave 61.7 % zero-shot top-1 (ViT-B/16), in about a day on 8 A100.
TEXT
