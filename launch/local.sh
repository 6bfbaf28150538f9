#!/usr/bin/env bash
# launch/local.sh -n 4 --config=...   a job of 4 processes on this machine, as a cluster would start it.
#
# Everything except -n goes to `trainit train`, or to the command that TRAINIT_COMMAND names, e.g. doctor. The exit
# code is 0 when all processes end with 0, 75 when all stopped on request, else that of the first process
# that failed; the others are then ended.
set -uo pipefail
[ "${1:-}" = -n ] && [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] ||
  { echo "usage: $0 -n PROCESSES --config=FILE ..." >&2; exit 2; }
count=$2
shift 2
# A free port; the child that needs it listens within seconds. Those from 32768 on are given to connections meanwhile.
port=$(python3 -c '
import contextlib, random, socket
while True:
    with contextlib.suppress(OSError), socket.socket() as s:
        s.bind(("localhost", random.randrange(20_000, 32_000)))
        print(s.getsockname()[1])
        break')
# What lets a process into this job; its environment is readable by its user alone. See docs/explanation/faults.md.
TRAINIT_TOKEN=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n') || exit 1
unset TRAINIT_TOKEN_FILE
export TRAINIT_TOKEN
export TRAINIT_NUM_PROCESSES=$count TRAINIT_LOCAL_PROCESSES=$count TRAINIT_COORDINATOR=localhost:$port
pids=()
for ((rank = 0; rank < count; rank++)); do
  TRAINIT_PROCESS_ID=$rank TRAINIT_LOCAL_ID=$rank python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@" &
  pids+=($!)
done
# Signals to this script are passed to its processes, which agree on a step, save and exit.
for name in TERM INT HUP USR1 USR2; do
  # shellcheck disable=SC2064
  trap "kill -$name \${pids[*]} 2>/dev/null" "$name"
done
result=0
while [ ${#pids[@]} -gt 0 ]; do
  wait -n "${pids[@]}" 2>/dev/null
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    code=$?
    unset "pids[i]"
    if [ $code != 0 ] && [ $code != 75 ] && { [ $result = 0 ] || [ $result = 75 ]; }; then
      result=$code
      # The others notice a lost peer by themselves; this is for those that do not.
      { sleep "${TRAINIT_GRACE:-60}" && kill -KILL "${pids[@]}"; } >/dev/null 2>&1 &
      reaper=$!
    elif [ $code = 75 ] && [ $result = 0 ]; then
      result=75
    fi
  done
done
[ -z "${reaper:-}" ] || pkill -P "$reaper"
exit $result
