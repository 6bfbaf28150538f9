#!/usr/bin/env bash
# launch/local.sh -n 4 --config=...   a job of 4 processes on this machine, as a cluster would start it.
#
# Everything except -n goes to `trainit train`, or to the command that TRAINIT_COMMAND names, e.g. doctor. The exit
# code is 0 when all processes end with 0, 75 when all stopped on request, else that of the first process
# that failed; the others are then ended. With --config.restart.limit=N, all are then started again, up to N times,
# from the newest checkpoint: unless the code is 2, or the fault has come again at the same step.
set -uo pipefail
[ "${1:-}" = -n ] && [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] ||
  { echo "usage: $0 -n PROCESSES --config=FILE ..." >&2; exit 2; }
count=$2
shift 2
pids=() asked=
# Signals to this script are passed to its processes, which agree on a step, save and exit.
for name in TERM INT HUP USR1 USR2; do
  # shellcheck disable=SC2064
  trap "asked=yes; kill -$name \${pids[*]} 2>/dev/null" "$name"
done
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
unset TRAINIT_TOKEN_FILE
# Process 0 writes there that a fault may start the run again.
export TRAINIT_RUN_FILE=$folder/run
export TRAINIT_NUM_PROCESSES=$count TRAINIT_LOCAL_PROCESSES=$count TRAINIT_COORDINATOR TRAINIT_TOKEN
# The processes look whether this script lives: when it is killed by SIGKILL, they save and exit, too.
export TRAINIT_LAUNCHER=$$

# Starts all processes, waits until they have ended, and leaves in `result` how.
attempt() {
  rm -f "$TRAINIT_RUN_FILE" "$TRAINIT_RUN_FILE.fault"
  # A free port; the child that needs it listens within seconds. Those from 32768 on are given to connections
  # meanwhile.
  TRAINIT_COORDINATOR=localhost:$(python3 -c '
import contextlib, random, socket
while True:
    with contextlib.suppress(OSError), socket.socket() as s:
        s.bind(("localhost", random.randrange(20_000, 32_000)))
        print(s.getsockname()[1])
        break')
  # What lets a process into this job; its environment is readable by its user alone. See docs/explanation/faults.md.
  TRAINIT_TOKEN=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n') || exit 1
  pids=() result=0 reaper=
  [ -z "$asked" ] || { result=75; return; } # a signal has come before anybody could hear it
  for ((rank = 0; rank < count; rank++)); do
    TRAINIT_PROCESS_ID=$rank TRAINIT_LOCAL_ID=$rank python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@" &
    pids+=($!)
  done
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
  [ -z "$reaper" ] || pkill -P "$reaper"
}

attempt "$@"
# As long as process 0 has said that a fault may start the run again, and trainit/cluster/restart.py says so, too.
while [ -z "$asked" ] && [ -e "$TRAINIT_RUN_FILE" ] && python3 -m trainit.cluster.restart "$result" >/dev/null; do
  attempt "$@"
done
exit "$result"
