#!/usr/bin/env bash
# Submits a command as a Slurm job, and requeues the job if it was stopped before its end.
#
#   launch/slurm.sh -m gpt.main --config=configs/char.py --workdir=/shared/runs/char
#   launch/slurm.sh --nodes=4 --partition=gpu -m gpt.main …    # flags of sbatch first, as --NAME=VALUE
#   GPUS_PER_NODE=0 launch/slurm.sh --nodes=1 -m gpt.main …    # on CPUs
#
# Run it in the repository's folder. That folder and the workdir have to be on storage that all nodes share. Inside an
# allocation (salloc), the command starts at once instead of being submitted.
#
# Variables:
#   GPUS_PER_NODE  GPUs and tasks of each node; 0: one task per node, on the CPUs. Default: 8
#   PYTHON         the interpreter. Default: python3, which is that of an active virtual environment
#
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM reaches the tasks two to three minutes before the time limit, which is enough to finish a step and save it.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

stopped_by_signal=143 # 128 + SIGTERM: the state is saved, and the same command resumes

fail() {
  echo "error: $1" >&2
  exit 2
}

gpus=${GPUS_PER_NODE:-8}
[[ $gpus =~ ^[0-9]+$ ]] || fail "GPUS_PER_NODE=$gpus has to be a whole number"
options=(--ntasks-per-node=1)
if ((gpus > 0)); then
  # One task per GPU. JAX gives a task the GPU of its local rank, so each task has to see all GPUs of its node, which
  # --gpus-per-task would prevent.
  options=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus")
fi
while [[ ${1-} == --* ]]; do
  options+=("$1")
  shift
done
(($# > 0)) || fail "add the arguments of python, like: launch/slurm.sh -m gpt.main --config=configs/char.py"
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  exec sbatch "${options[@]}" "$0" "$@"
fi

# An error if there is no GPU, instead of a slow run on the CPUs.
export JAX_PLATFORMS=${JAX_PLATFORMS:-$( ((gpus > 0)) && echo cuda || echo cpu)}
# If Slurm itself ends the job (scancel, a preemption), it signals this script too, and decides what happens next.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
fi
# The processes of this job prove to each other that they know this secret; other programs do not.
export GPT_CLUSTER_SECRET=${GPT_CLUSTER_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
code=0
# After a task ends, the others have 120 s to finish saving; then Slurm ends them.
srun --kill-on-bad-exit=0 --wait=120 "${PYTHON:-python3}" "$@" || code=$?
if ((code == stopped_by_signal)) && [[ -z $ended_by_slurm ]]; then
  echo "Saved before the end; job $SLURM_JOB_ID is requeued."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
