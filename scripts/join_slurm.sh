#!/usr/bin/env bash
#SBATCH --job-name=join
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --requeue
# Run the join on 16 machines of a Slurm cluster.
#
#     sbatch scripts/join_slurm.sh JOIN_SCRIPT [OPTION OF JOIN_SCRIPT …]
#
# JOIN_SCRIPT is scripts/join_datacompdr12m.sh or scripts/join_datacompdr1b.sh; they have their own
# --help. For example, from the repository's root:
#
#     job=$(sbatch --parsable scripts/join_slurm.sh scripts/join_datacompdr1b.sh --verify-hash)
#     sbatch --dependency=afterany:$job --wrap 'bash scripts/join_datacompdr1b.sh --report'
#
# Each task joins its share of the shards: join_shards.py reads SLURM_ARRAY_TASK_ID and
# SLURM_ARRAY_TASK_COUNT. The tasks write to one folder and do not communicate. A task that was
# killed or pre-empted can be run again; finished shards are skipped. To run single tasks again,
# submit the whole array again. The second job merges the tasks' reports and lists missing shards.
# With IMAGES_UNALIGNED=1 build the index first; otherwise every task builds it for itself:
#
#     IMAGES_UNALIGNED=1 bash scripts/join_datacompdr1b.sh --index-only
#
# Without Slurm, give each machine its share:
#
#     bash scripts/join_datacompdr1b.sh --task-index I --task-count N
set -euo pipefail
case ${1:-} in -h | --help) sed -n '8,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;; esac
cd "${SLURM_SUBMIT_DIR:-.}"
export WORKERS=${SLURM_CPUS_PER_TASK:-8}
exec bash "${1:?expected the script to run, for example scripts/join_datacompdr12m.sh}" "${@:2}"
