#!/usr/bin/env bash
# Runs a command on one host with NVIDIA GPUs. One process drives all of them.
#
#   launch/gpu_host.sh -m gpt.main --config=configs/char.py --config.mesh.rules=fsdp
#
# Variables:
#   PYTHON                the interpreter. Default: python3
#   CUDA_VISIBLE_DEVICES  the GPUs to use, like 0,1. Default: all
#   PROCESSES             number of processes with one GPU each, if a single process cannot load data fast enough
#
# Several hosts without a scheduler: run the same command on each host, with the three flags below, a workdir on shared
# storage, and the same secret, which keeps other programs out. `openssl rand -hex 16` generates a secret.
#
#   export GPT_CLUSTER_SECRET=…
#   launch/gpu_host.sh -m gpt.main --config=configs/char.py --workdir=/shared/runs/char \
#     --coordinator=FIRST-HOST:1234 --num_processes=2 --process_id=0    # on the second host: --process_id=1
set -euo pipefail

if (($# == 0)); then
  echo "error: add the arguments of python, like: launch/gpu_host.sh -m gpt.main --config=configs/char.py" >&2
  exit 2
fi
if [[ -n ${PROCESSES:-} ]]; then
  PLATFORM=cuda exec "$(dirname "$0")/local.sh" "$PROCESSES" "$@"
fi
export JAX_PLATFORMS=cuda # an error if there is no GPU, instead of a slow run on the CPU
exec "${PYTHON:-python3}" "$@"
