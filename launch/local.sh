#!/usr/bin/env bash
# Runs one command as N processes on this machine, joined as they would be on a cluster: to try it, and for tests.
#
#   launch/local.sh 2 -m gpt.main --config=configs/char_tiny.py
#
# What may be set:
#   PYTHON               the interpreter; python3
#   DEVICES_PER_PROCESS  virtual CPU devices in each process; 1
#   GRACE                seconds that the others have to end once one has failed or a signal came; 60
#   PLATFORM             cpu, or cuda: process 0 gets the first GPU, process 1 the second, …
#
# Ctrl-C and SIGTERM go to all processes. The exit code is that of the first process that failed, 0 if none did.
# (To stop a script that a shell runs in the background use SIGTERM: shells let such scripts ignore SIGINT.)
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

free_port() { # below the ports that systems hand out by themselves
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

use_platform() { # sets what process $1 sees
  export JAX_PLATFORMS=$platform
  if [[ $platform == cuda ]]; then
    local gpus
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    export CUDA_VISIBLE_DEVICES=${gpus[$1]:-$1}
  else # of a flag that is given twice XLA takes the last
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  fi
}

start() { # process $1 with the command $2 …
  local id=$1 address
  shift
  address=(--coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$id")
  # Under -m a job has a process group of its own, to signal and to clear away as a whole, and SIGINT is not ignored.
  set -m
  (use_platform "$id" && exec "$python" "$@" "${address[@]}" </dev/null) &
  set +m
  running[id]=$!
  all+=($!)
}

send() { # signal $1 to every process and its children
  local group
  for group in ${all[@]+"${all[@]}"}; do
    kill -s "$1" -- "-$group" 2>/dev/null || true
  done
}

reap() { # notes the codes of processes that have ended, and starts the clock at the first failure
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

pass_on() { # a signal that came, and starts the clock
  send "$signal"
  signal=
  deadline=${deadline:-$((SECONDS + grace))}
}

end_late() { # kills what is still there when the time is over
  echo "error: killed process ${!running[*]}, which did not end in $grace s" >&2
  send KILL
  exec 2>/dev/null # bash would tell it again
  deadline=$((SECONDS + 3600))
}

count=${1-}
python=${PYTHON:-python3}
devices=${DEVICES_PER_PROCESS:-1}
grace=${GRACE:-60}
platform=${PLATFORM:-cpu}
[[ $count =~ ^[1-9][0-9]*$ && $# -ge 2 ]] ||
  fail "say how many processes, then what follows python, like: launch/local.sh 2 -m gpt.main --config=configs/char_tiny.py"
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "DEVICES_PER_PROCESS=$devices has to be a number greater than 0"
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE=$grace has to be a number of seconds"
[[ $platform == cpu || $platform == cuda ]] || fail "PLATFORM=$platform is not known; choose cpu or cuda"
shift

all=() running=() # process groups; processes by id
exit_code=0 signal='' deadline=''
trap 'send KILL' EXIT
trap 'signal=INT' INT
trap 'signal=TERM' TERM HUP

# Processes of this job know one another by it; other programs do not.
export GPT_CLUSTER_SECRET=${GPT_CLUSTER_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
port=$(free_port)
for ((id = 0; id < count; id++)); do
  start "$id" "$@"
done
while reap && ((${#running[@]} > 0)); do
  [[ -z $signal ]] || pass_on
  [[ -z $deadline ]] || ((SECONDS < deadline)) || end_late
  sleep 0.1 || true # Ctrl-C ends the sleep too
done
exit "$exit_code"
