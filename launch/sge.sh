#!/usr/bin/env bash
#$ -N trainit
#$ -S /bin/bash
#$ -cwd
#$ -j y
#$ -notify
#
# qsub [-pe mpi_4_tasks_per_node 8 -l gpus=1 -l h_rt=12:00:00] launch/sge.sh --config=configs/pile_gpt.py ...
#
# For Grid Engine (SGE, UGE). Everything after the script's name goes to `trainit train`; resources are asked
# for as for any other job, and flags of qsub override the lines above. Submit from the folder that holds
# configs/, which all hosts must see. The job's hosts come from its parallel environment, which must allow
# "qrsh -inherit" (control_slaves TRUE); a job on one host needs none. On each host one process is started
# for each GPU that CUDA_VISIBLE_DEVICES or SGE_HGR_gpus names on the first one; without any, one a host.
#
# Five minutes before the time limit (h_rt), when it is asked to stop, and before it is suspended (-notify),
# the run saves and stops, and the job is put back into the queue until all steps are done: on one host by running
# again (exit code 99), on several by "qresub", under a new number. A job that was deleted, or in which a
# process failed, is not put back.
#
#   TRAINIT_ACTIVATE             what to run first on each host, as in "source ~/venv/bin/activate"
#   TRAINIT_PROCESSES_PER_NODE   processes of a host, as in 1: one for all its GPUs
#   TRAINIT_COMMAND              which command to run instead of train, e.g. doctor
#   TRAINIT_ARRAY                folder in which a file for each task of an array job has its arguments
#   TRAINIT_MARGIN               seconds before the time limit at which the run is to stop; 300
#
# Grid Engine passes variables on with: qsub -v TRAINIT_ACTIVATE="source ~/venv/bin/activate" ...
set -uo pipefail
[ -z "${TRAINIT_ARRAY:-}" ] || eval "set -- $(cat "$TRAINIT_ARRAY/$SGE_TASK_ID")"
task=${SGE_TASK_ID/undefined/}
me=$JOB_ID${task:+.$task}
work=$PWD/.trainit-$me # all hosts see it
rm -rf "$work"
mkdir -m 700 "$work" || exit 1 # the environment and the token are nobody else's
trap 'rm -rf "$work"' EXIT
# USR2 comes before the job is killed: it was deleted, or its time is over. In neither case may it revive
# itself. USR1 comes before it is suspended.
ended=
trap 'ended=yes' USR2
trap : USR1 TERM

gpus=${CUDA_VISIBLE_DEVICES:-${SGE_HGR_gpus:-}}
gpus=$(wc -w <<<"${gpus//,/ }")
here=${TRAINIT_PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}
hosts=("$HOSTNAME")
# A host may stand there in several lines, one for each queue.
[ -z "${PE_HOSTFILE:-}" ] || mapfile -t hosts < <(awk 'NF && !seen[$1]++ { print $1 }' "$PE_HOSTFILE")
export TRAINIT_JOB="Grid Engine job $me" TRAINIT_NUM_PROCESSES=$((${#hosts[@]} * here))
export TRAINIT_LOCAL_PROCESSES=$here TRAINIT_COORDINATOR=${hosts[0]}:$((61440 + (JOB_ID + ${task:-0}) % 4096))
# Schedulers lose exit codes; what counts is what the processes leave here: see trainit/main.py.
export TRAINIT_MARKER=$work/marker
# What lets a process into this job, in a file of its own: qrsh hands over no variables.
(umask 077 && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$work/token") || exit 1
unset TRAINIT_TOKEN
export TRAINIT_TOKEN_FILE=$work/token
# What is asked of Grid Engine too late is ignored: the run is to stop by itself, in good time.
limit=$(qstat -j "$JOB_ID" 2>/dev/null | sed -n 's/^hard resource_list:.*h_rt=\([0-9]*\).*/\1/p')
export TRAINIT_STOP_AT=${limit:+$(($(date +%s) + limit - ${TRAINIT_MARGIN:-300}))}

# qrsh hands over neither variables nor quoting, and runs a login shell: what each host needs stands in files.
# Each keeps what is its own.
for name in $(compgen -e); do
  case $name in
    TMP | TMPDIR | TEMP | HOSTNAME | PE_HOSTFILE | CUDA_VISIBLE_DEVICES | SGE_HGR_* | SGE_JOB_SPOOL_DIR) ;;
    SGE_STD*_PATH | NSLOTS | NHOSTS | NQUEUES | PWD | OLDPWD | SHLVL | _) ;;
    *) declare -p "$name" ;;
  esac
done >"$work/environment"
printf '%q ' "$@" >"$work/arguments"
# The part of one host: starts its processes, and writes down how each has ended.
cat >"$work/host.sh" <<'HOST'
work=$1 first=$2
. "$work/environment"
cd "$3" || exit 1
eval "set -- $(cat "$work/arguments")"
eval "${TRAINIT_ACTIVATE:-}"
# These are for the processes, which have them from Grid Engine; and ignored until Trainit listens to them:
# by default they would end a process that is still starting.
trap '' USR1 USR2
trap : TERM INT
pids=()
for ((i = 0; i < TRAINIT_LOCAL_PROCESSES; i++)); do
  TRAINIT_PROCESS_ID=$((first + i)) TRAINIT_LOCAL_ID=$i python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@" &
  pids+=($!)
done
if [ -n "$TRAINIT_STOP_AT" ]; then
  { while [ "$(date +%s)" -lt "$TRAINIT_STOP_AT" ]; do sleep 1; done; kill -USR1 "${pids[@]}"; } 2>/dev/null &
  watch=$!
fi
while [ ${#pids[@]} -gt 0 ]; do
  wait -n "${pids[@]}"
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    echo $? >"$work/code.tmp.$((first + i))"
    mv "$work/code.tmp.$((first + i))" "$work/code.$((first + i))"
    unset "pids[i]"
  done
done
[ -z "${watch:-}" ] || kill "$watch" 2>/dev/null
HOST

echo "$(date '+%F %T') job $me, start ${RESTARTED:-0}, $here processes on each of ${hosts[*]}"
calls=()
for i in "${!hosts[@]}"; do
  part=(/bin/bash "$work/host.sh" "$work" $((i * here)) "$PWD")
  if [ ${#hosts[@]} = 1 ]; then
    "${part[@]}" &
  else
    qrsh -inherit -nostdin "${hosts[i]}" "${part[@]}" </dev/null &
  fi
  calls[i]=$!
done

# qrsh returns 0 even when its host has died: only what the processes have written down is believed.
worst=0 give_up=
while :; do
  running=
  for i in "${!hosts[@]}"; do
    alive=
    kill -0 "${calls[i]}" 2>/dev/null && alive=yes running=yes
    for ((n = i * here; n < (i + 1) * here; n++)); do
      code=$(cat "$work/code.$n" 2>/dev/null) || code=${alive:-gone}
      [ "$code" != gone ] || sleep 1 # a file may come later than the end that it tells of
      [ "$code" != gone ] || code=$(cat "$work/code.$n" 2>/dev/null) || code=255
      case $code in
        yes | 0) ;;
        75) [ "$worst" != 0 ] || worst=75 ;;
        *) [ "$worst" != 0 ] && [ "$worst" != 75 ] || worst=$code ;;
      esac
    done
  done
  [ -n "$running" ] || break
  if [ "$worst" != 0 ] && [ "$worst" != 75 ]; then
    # The others notice a lost peer by themselves; this is for those that do not.
    give_up=${give_up:-$(($(date +%s) + ${TRAINIT_GRACE:-60}))}
    [ "$(date +%s)" -lt "$give_up" ] || break # with this script, Grid Engine ends all that is left
  fi
  sleep 1
done
echo "$(date '+%F %T') ended with $worst${ended:+ after it was asked to end}"
if [ "$worst" = 75 ] && [ -e "$TRAINIT_MARKER" ] && [ ! -e "$TRAINIT_MARKER.failed" ] && [ -z "$ended" ]; then
  # After exit code 99, a job of several hosts may be kept off those that it had before.
  [ ${#hosts[@]} -gt 1 ] && qresub "$me" || worst=99
fi
exit "$worst"
