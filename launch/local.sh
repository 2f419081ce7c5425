#!/usr/bin/env bash
# Runs one command as N processes on this machine, which join as on a cluster. For experiments and tests.
#
#   launch/local.sh 2 -m gpt.main --config=configs/char_tiny.py
#
# Variables:
#   PYTHON               the interpreter. Default: python3
#   DEVICES_PER_PROCESS  number of virtual CPU devices of each process. Default: 1
#   GRACE                seconds for the other processes to end after a failure or a signal. Default: 60
#   PLATFORM             cpu, or cuda for one GPU per process. Default: cpu
#
# Ctrl-C and SIGTERM go to all processes. The exit code is that of the first process that failed, or 0.
# Use SIGTERM to stop a script that a shell runs in the background: such scripts ignore SIGINT.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

free_port() { # prints a free port below the range from which systems assign ports
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

use_platform() { # sets the devices of process $1
  export JAX_PLATFORMS=$platform
  if [[ $platform == cuda ]]; then
    local gpus
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    export CUDA_VISIBLE_DEVICES=${gpus[$1]:-$1}
  else # XLA uses the last value of a repeated flag
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  fi
}

start() { # starts process $1 with the command $2 …
  local id=$1 address
  shift
  address=(--coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$id")
  # With -m, a job gets its own process group, which can be signaled as a whole, and does not ignore SIGINT.
  set -m
  (use_platform "$id" && exec "$python" "$@" "${address[@]}" </dev/null) &
  set +m
  running[id]=$!
  all+=($!)
}

send() { # sends signal $1 to each process and its children
  local group
  for group in ${all[@]+"${all[@]}"}; do
    kill -s "$1" -- "-$group" 2>/dev/null || true
  done
}

reap() { # collects the exit codes of ended processes, and sets the deadline after the first failure
  local id code
  for id in "${!running[@]}"; do
    kill -0 "${running[id]}" 2>/dev/null && continue
    code=0
    wait "${running[id]}" || code=$?
    unset "running[id]"
    if ((code != 0 && exit_code == 0)); then
      exit_code=$code
      deadline=${deadline:-$((SECONDS + grace))}
    fi
  done
}

pass_on() { # sends the received signal to all processes, and sets the deadline
  send "$signal"
  signal=
  deadline=${deadline:-$((SECONDS + grace))}
}

end_late() { # kills the processes that are still running after the deadline
  echo "error: killed process ${!running[*]}, which did not end in $grace s" >&2
  send KILL
  exec 2>/dev/null # bash would report the same
  deadline=$((SECONDS + 3600))
}

count=${1-}
python=${PYTHON:-python3}
devices=${DEVICES_PER_PROCESS:-1}
grace=${GRACE:-60}
platform=${PLATFORM:-cpu}
[[ $count =~ ^[1-9][0-9]*$ && $# -ge 2 ]] ||
  fail "add the number of processes and the arguments of python, like: launch/local.sh 2 -m gpt.main --config=configs/char_tiny.py"
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "DEVICES_PER_PROCESS=$devices has to be a number greater than 0"
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE=$grace has to be a number of seconds"
[[ $platform == cpu || $platform == cuda ]] || fail "PLATFORM=$platform is not known; choose cpu or cuda"
shift

all=() running=() # process groups; running processes by number
exit_code=0 signal='' deadline=''
trap 'send KILL' EXIT
trap 'signal=INT' INT
trap 'signal=TERM' TERM HUP

# The processes of this job prove to each other that they know this secret; other programs do not.
export GPT_CLUSTER_SECRET=${GPT_CLUSTER_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
port=$(free_port)
for ((id = 0; id < count; id++)); do
  start "$id" "$@"
done
while reap && ((${#running[@]} > 0)); do
  [[ -z $signal ]] || pass_on
  [[ -z $deadline ]] || ((SECONDS < deadline)) || end_late
  sleep 0.1 || true # Ctrl-C also ends the sleep
done
exit "$exit_code"
