#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice, or several over the network. Requires gcloud with a default project.
#
#   export ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e
#   launch/tpu.sh create           # requests the slices; --spot and other flags of gcloud may follow
#   launch/tpu.sh status           # ACTIVE: the slices exist; SUSPENDED: a spot slice was preempted
#   launch/tpu.sh install          # copies this code to all workers and installs it
#   launch/tpu.sh train -m gpt.main --config=configs/char.py --workdir=gs://BUCKET/runs/char
#   launch/tpu.sh logs             # follows the log of process 0; SLICE=1 WORKER=2 selects another process
#   launch/tpu.sh stop             # saves and stops; the same train command resumes
#   launch/tpu.sh delete           # deletes the slices, which ends their costs
#
# Variables:
#   NAME     name of the queued resource and its slices. Default: gpt
#   ZONE     zone of the slices
#   TYPE     accelerator type of a slice, like v5litepod-16, v5p-32, v6e-16
#   VERSION  runtime version for the type, like v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
#   SLICES   number of slices. Default: 1
#
# Training runs as a systemd unit. It continues when the connection closes, and restarts after a failure, except after
# an error in the flags. After a VM was rebooted: stop, train. After a spot slice was preempted: delete, create, install,
# train. With the same workdir, training resumes from the last checkpoint.
set -euo pipefail

name=${NAME:-gpt}
slices=${SLICES:-1}

fail() {
  echo "error: $1" >&2
  exit 2
}

need() { # fails if the variable $1 is not set; $2 is an example of its value
  [[ -n ${!1:-} ]] || fail "set $1, like: export $1=$2"
}

gcloud_tpu() { # runs the gcloud command $1 on queued resources, with further flags
  local command=$1
  shift
  gcloud compute tpus queued-resources "$command" "$@" --zone="$ZONE"
}

on_workers() { # runs the shell command $1 on all workers
  gcloud_tpu ssh "$name" --node=all --worker=all --command="$1"
}

create() {
  need TYPE v6e-16
  need VERSION v2-alpha-tpuv6e
  local nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  gcloud_tpu create "$name" "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" "$@"
}

status() {
  gcloud_tpu describe "$name" --format='value(state.state)'
}

install() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # expands now, because the variable is local
  trap "rm -rf '$folder'" EXIT
  tar -czf "$folder/gpt.tgz" --exclude=__pycache__ -C "$(dirname "$0")/.." gpt configs setup.cfg pyproject.toml README.md LICENSE
  gcloud_tpu scp "$folder/gpt.tgz" "$name:gpt.tgz" --node=all --worker=all
  # uv installs a recent Python; that of the image may be too old.
  on_workers 'set -e; mkdir -p ~/gpt; tar -xzf ~/gpt.tgz -C ~/gpt; cd ~/gpt
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
    ~/.local/bin/uv pip install --quiet --python .venv --editable ".[tpu]"'
}

train() {
  (($# > 0)) || fail "add the arguments of python, like: launch/tpu.sh train -m gpt.main --config=configs/char.py"
  local secret
  secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # processes prove to each other that they know it
  local unit=(
    --unit=gpt --collect
    --property=Restart=on-failure --property=RestartSec=30 --property=RestartPreventExitStatus=2
    --setenv=GPT_CLUSTER_SECRET="$secret"
    --property=KillMode=mixed --property=TimeoutStopSec=180 # SIGTERM goes to the main process, which gets time to save
  )
  # The worker's shell expands the quoted variables.
  # shellcheck disable=SC2016
  on_workers "$(printf '%q ' sudo systemd-run "${unit[@]}")"'--uid="$USER" --working-directory="$HOME/gpt" \
    --property=StandardOutput=append:"$HOME/gpt.log" --property=StandardError=append:"$HOME/gpt.log" \
    "$HOME/gpt/.venv/bin/python" '"$(printf '%q ' "$@")"
}

logs() {
  gcloud_tpu ssh "$name" --node="${SLICE:-0}" --worker="${WORKER:-0}" --command='tail -n 100 -F ~/gpt.log'
}

stop() { # succeeds even if no training is running
  on_workers 'if systemctl cat gpt >/dev/null 2>&1; then sudo systemctl stop gpt; fi'
}

delete() {
  gcloud_tpu delete "$name" --force --quiet "$@"
}

command=${1-}
case $command in
create | status | install | train | logs | stop | delete) ;;
*) fail "launch/tpu.sh needs one of create, status, install, train, logs, stop, delete" ;;
esac
need ZONE us-east5-b
shift
"$command" "$@"
