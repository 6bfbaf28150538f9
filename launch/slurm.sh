#!/usr/bin/env bash
#SBATCH --job-name=trainit
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=USR1@300
#
# sbatch [--nodes=4 --gpus-per-node=8 --time=...] launch/slurm.sh --config=configs/pile_gpt.py ...
#
# Everything after the script's name goes to `trainit train`; resources are asked for as for any other
# job and override the lines above. Submit from the folder that holds configs/. One process is started
# for each GPU of a node, or one where there is none.
#
# Five minutes before the time limit (--signal), and when the job is preempted, the run saves and
# stops, and the job puts itself back into the queue until all steps are done. A job that was
# cancelled, or in which a process failed, is not put back.
#
# With --config.restart.limit=N, the job keeps its nodes when a process fails, hangs or is lost, and starts the run
# again up to N times: see trainit/cluster/restart.py.
#
#   TRAINIT_ACTIVATE             what to run first on each node, as in "source ~/venv/bin/activate"
#   TRAINIT_CONTAINER            Apptainer's image in which Python runs, see launch/apptainer.def
#   TRAINIT_PROCESSES_PER_NODE   processes of a node, as in 1: one for all its GPUs
#   TRAINIT_NODES                nodes that the run uses; the others of the job are spare
#   TRAINIT_COMMAND              which command to run instead of train, e.g. doctor
#   TRAINIT_ARRAY                folder in which a file for each task of an array job has its arguments
set -uo pipefail
[ -z "${TRAINIT_ARRAY:-}" ] || eval "set -- $(cat "$TRAINIT_ARRAY/$SLURM_ARRAY_TASK_ID")"
processes=${TRAINIT_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export TRAINIT_NODES=${TRAINIT_NODES:-${#hosts[@]}}
[ "$TRAINIT_NODES" -le ${#hosts[@]} ] ||
  { echo "TRAINIT_NODES=$TRAINIT_NODES, but the job has ${#hosts[@]}: ask for more with --nodes=" >&2; exit 2; }
use=("${hosts[@]:0:TRAINIT_NODES}")
# Schedulers merge exit codes; what counts is what the processes leave here: see trainit/main.py.
export TRAINIT_MARKER=$PWD/.trainit-$SLURM_JOB_ID TRAINIT_RUN_FILE=$PWD/.trainit-$SLURM_JOB_ID.run
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$TRAINIT_RUN_FILE.history"
unset TRAINIT_TOKEN_FILE
export TRAINIT_TOKEN
# TERM to this script is a cancellation, the time limit or a requeue by Slurm itself: in none of these
# may the job revive itself.
ended=
trap 'ended=yes' TERM
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
[ "$processes" -le "${SLURM_CPUS_ON_NODE:-$processes}" ] ||
  echo "note: $SLURM_CPUS_ON_NODE CPUs for $processes processes on a node; ask for more with --cpus-per-gpu="
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} # srun does not inherit it

# on "HOST HOST" TASKS OPTIONS COMMAND... &   a step of TASKS processes on each of these nodes, next to others.
# --export=ALL: after "sbatch --export=...", srun would hand over only what was named there.
on() {
  local names tasks=$2
  read -ra names <<<"$1"
  shift 2
  # shellcheck disable=SC2086
  exec ${patience:+timeout --signal=KILL $patience} srun --export=ALL --no-kill --kill-on-bad-exit=0 --overlap \
    --overcommit --nodes=${#names[@]} --ntasks=$((${#names[@]} * tasks)) --ntasks-per-node="$tasks" \
    --nodelist="$(IFS=, && echo "${names[*]}")" "$@"
}

# This node may be lost as well. With --no-kill, Slurm then leaves the others to the job until its time is over, and
# nobody to use them. So two of these look, and put the job back into the queue, or end it.
# shellcheck disable=SC2016
[ ${#hosts[@]} = 1 ] || on "${hosts[*]:1:2}" 1 --job-name=guard bash -c '
  trap "" USR1
  while sleep 20; do
    case $(sinfo --noheader --nodes="$1" --format=%T) in
      down*) scontrol requeue "$SLURM_JOB_ID" || scancel "$SLURM_JOB_ID" ;;
    esac
  done' guard "${hosts[0]}" >/dev/null 2>&1 &

# Starts all processes, waits until they have ended, and leaves in `code` how.
attempt() {
  rm -f "$TRAINIT_MARKER" "$TRAINIT_MARKER.failed" "$TRAINIT_RUN_FILE" "$TRAINIT_RUN_FILE.fault"
  # What lets a process into this job; srun hands it over in the environment, which other users cannot read.
  TRAINIT_TOKEN=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n') || exit 1
  # USR1 is ignored until Trainit listens to it: by default it would end a process that is still starting.
  # The others notice a lost peer by themselves; --wait is for those that do not.
  # shellcheck disable=SC2016,SC2086
  on "${use[*]}" "$processes" --job-name=trainit --wait="${TRAINIT_GRACE:-60}" $cpus bash -c '
    trap "" USR1; eval "${TRAINIT_ACTIVATE:-}"; exec \
      ${TRAINIT_CONTAINER:+apptainer exec --nv "$TRAINIT_CONTAINER"} python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@"' trainit "$@" &
  local pid=$! seconds=0 step
  while kill -0 $pid 2>/dev/null; do
    sleep 1
    # Slurm knows of a lost node minutes later. After a fault, processes need some ten seconds to leave.
    [ ! -e "$TRAINIT_RUN_FILE.fault" ] || seconds=$((seconds + 1))
    [ $seconds != 15 ] || for step in $(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' |
      sed -n 's/ trainit$//p'); do scancel --signal=KILL "$step" 2>/dev/null & done
    [ $seconds -lt 17 ] || kill -KILL $pid 2>/dev/null
  done
  wait $pid
  code=$?
  echo "$(date '+%F %T') srun ended with $code${ended:+ after a TERM}"
}

# Prints the nodes on which a command runs now.
answering() {
  local host patience=15
  for host in "${hosts[@]}"; do
    on "$host" 1 --job-name=answer echo "$host" 2>/dev/null &
  done
  wait
}

# decide start|CODE   asks which nodes the run uses next. 0: these; 1: none; 3: the job is to be put back, without `use`.
decide() {
  local answer result
  answer=$(set +u; eval "${TRAINIT_ACTIVATE:-}" >&2; exec ${TRAINIT_CONTAINER:+apptainer exec --nv "$TRAINIT_CONTAINER"} python3 -m trainit.cluster.restart "$1" "${hosts[*]}" "$(answering)")
  result=$?
  read -ra use <<<"$answer"
  return $result
}

# Puts the job back into the queue, where it does not get these nodes. Returns only if Slurm refuses.
requeue() {
  rm -f "$TRAINIT_MARKER" "$TRAINIT_RUN_FILE" "$TRAINIT_RUN_FILE.fault"
  [ $# = 0 ] || trap '' TERM # by which Slurm is going to end this script
  scontrol requeue "$SLURM_JOB_ID" || return
  # Nodes can be excluded only from a job that waits, and at times Slurm asks to try again.
  for ((i = 0; i < 25 && $# > 0; i++)); do
    scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="$(IFS=, && echo "$*")" 2>/dev/null && break
    sleep 1
  done
  [ $# != 0 ] || sleep 60
  exit $code
}

next=0
[ ! -e "$TRAINIT_RUN_FILE.history" ] || { decide start; next=$?; }
code=1
while [ $next = 0 ]; do
  attempt "$@"
  next=1
  # A fault after which the run may start again: process 0 has said so.
  [ ! -e "$TRAINIT_RUN_FILE" ] || [ $code = 0 ] || [ -n "$ended" ] || { decide $code; next=$?; }
done
if [ $next = 3 ]; then
  requeue "${use[@]}"
  echo "restart    not done: Slurm does not put the job back; submit it again with --exclude=$(IFS=, && echo "${use[*]}")" >&2
elif [ -e "$TRAINIT_MARKER" ] && [ ! -e "$TRAINIT_MARKER.failed" ] && [ -z "$ended" ]; then
  requeue
fi
rm -f "$TRAINIT_MARKER" "$TRAINIT_MARKER".*
exit $code
