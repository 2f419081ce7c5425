#!/usr/bin/env bash
# Runs a command on one host with NVIDIA GPUs. One process drives all of them.
#
#   launch/gpu_host.sh -m gpt.main --config=configs/char.py --config.mesh.rules=fsdp
#
# What may be set:
#   PYTHON                the interpreter; python3
#   CUDA_VISIBLE_DEVICES  the GPUs to use, like 0,1; all
#   PROCESSES             a process for each of so many GPUs instead, where a single one cannot feed them
#
# Several hosts without a scheduler: the same command on each, all three flags added, a workdir that all share, and the
# same secret, which keeps other programs out: on the first host `openssl rand -hex 16` makes one.
#
#   export GPT_CLUSTER_SECRET=…
#   launch/gpu_host.sh -m gpt.main --config=configs/char.py --workdir=/shared/runs/char \
#     --coordinator=FIRST-HOST:1234 --num_processes=2 --process_id=0    # on the second host: --process_id=1
set -euo pipefail

if (($# == 0)); then
  echo "error: say what follows python, like: launch/gpu_host.sh -m gpt.main --config=configs/char.py" >&2
  exit 2
fi
if [[ -n ${PROCESSES:-} ]]; then
  PLATFORM=cuda exec "$(dirname "$0")/local.sh" "$PROCESSES" "$@"
fi
export JAX_PLATFORMS=cuda # an error where no GPU is found, not a slow run on the CPU
exec "${PYTHON:-python3}" "$@"
