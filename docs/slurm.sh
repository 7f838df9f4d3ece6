#!/bin/bash
#SBATCH --job-name=minillm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun a machine; it starts the ranks
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120          # two minutes before the end; torchrun then leaves its ranks half a minute to finish a step and save
#SBATCH --requeue
# Run from the repository's folder, which all machines must see. See cluster.md for what has been tried.
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  -m minillm train --out runs/cluster --parallel.dp 2 --parallel.tp 8 --train.device cuda --train.precision bf16
