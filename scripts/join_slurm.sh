#!/usr/bin/env bash
#SBATCH --job-name=join
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --requeue
# Run the join on 16 machines of a Slurm cluster. From the repository's root:
#
#     job=$(sbatch --parsable scripts/join_slurm.sh scripts/join_datacompdr1b.sh --verify-hash)
#     sbatch --dependency=afterany:$job --wrap 'bash scripts/join_datacompdr1b.sh --report'
#
# Each task joins its share of the shards: join_shards.py reads SLURM_ARRAY_TASK_ID and _COUNT. The
# tasks write to one folder and need no contact. A task that was killed or pre-empted can be run
# again; finished shards are skipped. To run single tasks again, submit the whole array again. The
# second job merges the tasks' reports and lists what is missing. With IMAGES_UNALIGNED=1 build the
# index first; otherwise every task builds it for itself:
#
#     bash scripts/join_datacompdr1b.sh --index-only
#
# Without Slurm, give each machine its share:
#     bash scripts/join_datacompdr1b.sh --task-index I --task-count N
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export WORKERS=${SLURM_CPUS_PER_TASK:-8}
exec bash "${1:?expected the script to run, for example scripts/join_datacompdr12m.sh}" "${@:2}"
