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
# With --config.restart.limit=N, the job keeps its hosts when a process fails, hangs or is lost, and starts the run
# again up to N times: see trainit/cluster/restart.py.
#
#   TRAINIT_ACTIVATE             what to run first on each host, as in "source ~/venv/bin/activate"
#   TRAINIT_CONTAINER            Apptainer's image in which Python runs, see launch/apptainer.def
#   TRAINIT_PROCESSES_PER_NODE   processes of a host, as in 1: one for all its GPUs
#   TRAINIT_NODES                hosts that the run uses; the others of the job are spare
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
export TRAINIT_NODES=${TRAINIT_NODES:-${#hosts[@]}}
[ "$TRAINIT_NODES" -le ${#hosts[@]} ] ||
  { echo "TRAINIT_NODES=$TRAINIT_NODES, but the job has ${#hosts[@]} hosts: ask for more with -pe" >&2; exit 2; }
use=("${hosts[@]:0:TRAINIT_NODES}")
export TRAINIT_JOB="Grid Engine job $me" TRAINIT_LOCAL_PROCESSES=$here TRAINIT_NUM_PROCESSES TRAINIT_COORDINATOR
# Schedulers lose exit codes; what counts is what the processes leave here: see trainit/main.py.
export TRAINIT_MARKER=$work/marker TRAINIT_RUN_FILE=$work/run
# The job that has submitted this one to continue leaves there what was before.
history=$PWD/.trainit-history
mv "$history-$me" "$TRAINIT_RUN_FILE.history" 2>/dev/null
unset TRAINIT_TOKEN
export TRAINIT_TOKEN_FILE=$work/token
# What is asked of Grid Engine too late is ignored: the run is to stop by itself, in good time.
limit=$(qstat -j "$JOB_ID" 2>/dev/null | sed -n 's/^hard resource_list:.*h_rt=\([0-9]*\).*/\1/p')
export TRAINIT_STOP_AT=${limit:+$(($(date +%s) + limit - ${TRAINIT_MARGIN:-300}))}

printf '%q ' "$@" >"$work/arguments"
# The part of one host: starts its processes, and writes down in the folder of this start how each has ended.
cat >"$work/host.sh" <<'HOST'
folder=$1 first=$2
. "$folder/environment"
cd "$3" || exit 1
eval "set -- $(cat "$folder/../arguments")"
eval "${TRAINIT_ACTIVATE:-}"
# These are for the processes, which have them from Grid Engine; and ignored until Trainit listens to them:
# by default they would end a process that is still starting.
trap '' USR1 USR2
trap : TERM INT
pids=()
for ((i = 0; i < TRAINIT_LOCAL_PROCESSES; i++)); do
  TRAINIT_PROCESS_ID=$((first + i)) TRAINIT_LOCAL_ID=$i \
    ${TRAINIT_CONTAINER:+apptainer exec --nv "$TRAINIT_CONTAINER"} python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@" &
  pids+=($!)
done
while sleep 1; do
  [ ! -e "$folder/end" ] || kill -KILL "${pids[@]}"
  [ -n "$TRAINIT_STOP_AT" ] && [ "$(date +%s)" -ge "$TRAINIT_STOP_AT" ] && kill -USR1 "${pids[@]}" && TRAINIT_STOP_AT=
done 2>/dev/null &
watch=$!
while [ ${#pids[@]} -gt 0 ]; do
  wait -n "${pids[@]}"
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    echo $? >"$folder/code.tmp.$((first + i))"
    mv "$folder/code.tmp.$((first + i))" "$folder/code.$((first + i))"
    unset "pids[i]"
  done
done
kill "$watch"
HOST

# on HOST COMMAND... &   on one host, by this shell, which needs no right to run anything elsewhere.
on() {
  local host=$1
  shift
  [ ${#hosts[@]} != 1 ] || exec "$@"
  exec ${patience:+timeout --signal=KILL $patience} qrsh -inherit -nostdin "$host" "$@" </dev/null
}

# qrsh hands over neither variables nor quoting, and runs a login shell: what each host needs stands in files.
# Each keeps what is its own.
environment() {
  local name
  for name in $(compgen -e); do
    case $name in
      TMP | TMPDIR | TEMP | HOSTNAME | PE_HOSTFILE | CUDA_VISIBLE_DEVICES | SGE_HGR_* | SGE_JOB_SPOOL_DIR) ;;
      SGE_STD*_PATH | NSLOTS | NHOSTS | NQUEUES | PWD | OLDPWD | SHLVL | _) ;;
      *) declare -p "$name" ;;
    esac
  done
}

# Starts all processes, waits until they have ended, and leaves in `worst` how.
attempt() {
  local start=$((++starts)) calls=() give_up='' running alive code i n
  local folder=$work/$start
  mkdir "$folder" || exit 1
  rm -f "$TRAINIT_MARKER" "$TRAINIT_MARKER.failed" "$TRAINIT_RUN_FILE" "$TRAINIT_RUN_FILE.fault"
  # What lets a process into this job, in a file of its own: qrsh hands over no variables.
  (umask 077 && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$TRAINIT_TOKEN_FILE") || exit 1
  # Each start has a port of its own: what is left of the one before may still listen.
  TRAINIT_COORDINATOR=${use[0]}:$((61440 + (JOB_ID + ${task:-0} + start) % 4096))
  TRAINIT_NUM_PROCESSES=$((${#use[@]} * here))
  environment >"$folder/environment"
  for i in "${!use[@]}"; do
    on "${use[i]}" /bin/bash "$work/host.sh" "$folder" $((i * here)) "$PWD" &
    calls[i]=$!
  done

  # qrsh returns 0 even when its host has died: only what the processes have written down is believed.
  worst=0
  while :; do
    running=
    for i in "${!use[@]}"; do
      alive=
      kill -0 "${calls[i]}" 2>/dev/null && alive=yes running=yes
      for ((n = i * here; n < (i + 1) * here; n++)); do
        code=$(cat "$folder/code.$n" 2>/dev/null) || code=${alive:-gone}
        [ "$code" != gone ] || sleep 1 # a file may come later than the end that it tells of
        [ "$code" != gone ] || code=$(cat "$folder/code.$n" 2>/dev/null) || code=255
        case $code in
          yes | 0) ;;
          75) [ "$worst" != 0 ] || worst=75 ;;
          *) [ "$worst" != 0 ] && [ "$worst" != 75 ] || worst=$code ;;
        esac
      done
    done
    [ -n "$running" ] || break
    # The others notice a lost peer by themselves; this is for those that do not. After a fault that they have
    # noticed, they need some ten seconds to leave.
    if [ -e "$TRAINIT_RUN_FILE.fault" ]; then
      give_up=${give_up:-$(($(date +%s) + 15))}
    elif [ "$worst" != 0 ] && [ "$worst" != 75 ]; then
      give_up=${give_up:-$(($(date +%s) + ${TRAINIT_GRACE:-60}))}
    fi
    [ "$(date +%s)" -lt "${give_up:-9999999999}" ] || break
    sleep 1
  done
  [ -n "$running" ] || return
  [ "$worst" != 0 ] || worst=255
  touch "$folder/end"
  sleep 3
  kill -KILL "${calls[@]}" 2>/dev/null
}

# Prints the hosts on which a command runs now.
answering() {
  local host patience=15
  for host in "${hosts[@]}"; do
    on "$host" /bin/echo "$host" 2>/dev/null &
  done
  wait
}

# decide start|CODE   asks which hosts the run uses next. 0: these; 1: none; 3: the job is to be put back, without `use`.
decide() {
  local answer result
  answer=$(set +u; eval "${TRAINIT_ACTIVATE:-}" >&2; exec ${TRAINIT_CONTAINER:+apptainer exec --nv "$TRAINIT_CONTAINER"} python3 -m trainit.cluster.restart "$1" "${hosts[*]}" "$(answering)")
  result=$?
  read -ra use <<<"$answer"
  return $result
}

# Submits the job again, under a new number, which learns what was before.
resubmit() {
  local answer
  answer=$(qresub "$me") && echo "$answer" || return
  [[ ! "$answer" =~ [0-9]+(\.[0-9]+)? ]] || cp "$TRAINIT_RUN_FILE.history" "$history-${BASH_REMATCH[0]}" 2>/dev/null
  return 0
}

starts=0 next=0 worst=1
echo "$(date '+%F %T') job $me, start ${RESTARTED:-0}, $here processes on each of ${use[*]}"
[ ! -e "$TRAINIT_RUN_FILE.history" ] || { decide start; next=$?; }
while [ $next = 0 ]; do
  attempt "$@"
  echo "$(date '+%F %T') ended with $worst${ended:+ after it was asked to end}"
  next=1
  # A fault after which the run may start again: process 0 has said so.
  [ ! -e "$TRAINIT_RUN_FILE" ] || [ "$worst" = 0 ] || [ -n "$ended" ] || { decide "$worst"; next=$?; }
done
if [ $next = 3 ]; then
  without="hostname=!($(IFS='|' && echo "${use[*]}"))"
  resources=$(qstat -j "$JOB_ID" 2>/dev/null | sed -n 's/^hard resource_list: *//p' |
    sed 's/,*hostname=![^,]*//')
  qalter -l "${resources:+$resources,}$without" "$me" && resubmit ||
    echo "restart    not done: Grid Engine does not put the job back; submit it again with -l '$without'" >&2
elif [ "$worst" = 75 ] && [ -e "$TRAINIT_MARKER" ] && [ ! -e "$TRAINIT_MARKER.failed" ] && [ -z "$ended" ]; then
  # After exit code 99, a job of several hosts may be kept off those that it had before.
  [ ${#hosts[@]} -gt 1 ] && resubmit || { worst=99 && cp "$TRAINIT_RUN_FILE.history" "$history-$me" 2>/dev/null; }
fi
exit "$worst"
