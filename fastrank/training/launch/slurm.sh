#!/usr/bin/env bash
#SBATCH --job-name=fastrank
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# One launcher on each machine of a SLURM job; options of sbatch go before the file:
#
#   sbatch --nodes 4 "$(python -m fastrank.training.configs slurm)" train --model MODEL --data FILE \
#     --output_dir SHARED/run --resume_from_checkpoint auto
#
# ENGINE and PROCESSES as for nodes.sh. A requeued job goes on from its latest checkpoint.
set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${hosts%%$'\n'*} NODES=$SLURM_JOB_NUM_NODES RUN=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))
srun --kill-on-bad-exit=1 bash -c 'MACHINE=$SLURM_NODEID exec bash "$0" "$@"' \
  "$(python -m fastrank.training.configs nodes)" "$@"
