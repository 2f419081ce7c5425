#!/usr/bin/env bash
# Runs a command as a Slurm job, and puts the job back in the queue when it was stopped before its end.
#
#   sbatch launch/slurm.sh -m gpt.main --config=configs/char.py --workdir=/shared/runs/char
#
# Submit from the repository's folder; it and the workdir have to be on storage that all nodes share. Lines below can
# be overridden by flags: sbatch --nodes=4 --partition=gpu launch/slurm.sh … PYTHON is the interpreter; python3, which
# is the one of a virtual environment that was active at sbatch.

#SBATCH --job-name=gpt
#SBATCH --nodes=2
# One task per GPU: JAX gives a task the GPU of its local rank, so each must see all GPUs of its node. Hence
# --gpus-per-node, not --gpus-per-task. For CPUs: --ntasks-per-node=1, no --gpus-per-node, and export JAX_PLATFORMS=cpu.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM reaches the tasks two to three minutes before the time is up: enough to finish a step and save it.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

stopped_by_signal=143 # 128 + SIGTERM: the state is saved, and the same command goes on from there

if (($# == 0)); then
  echo "error: say what follows python, like: sbatch launch/slurm.sh -m gpt.main --config=configs/char.py" >&2
  exit 2
fi
# Slurm's own end of a job (scancel, a preemption) signals this script too; its word then decides what comes next.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over by itself
fi
# Processes of this job know one another by it; other programs do not.
export GPT_CLUSTER_SECRET=${GPT_CLUSTER_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
code=0
# A task that ends leaves the others time to finish their saving; after that they are ended, whatever hangs.
srun --kill-on-bad-exit=0 --wait=120 "${PYTHON:-python3}" "$@" || code=$?
if ((code == stopped_by_signal)) && [[ -z $ended_by_slurm ]]; then
  echo "Saved before the end; job $SLURM_JOB_ID goes back in the queue."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
