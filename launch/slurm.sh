#!/usr/bin/env bash
#SBATCH --job-name=trainit
#SBATCH --nodes=1
#SBATCH --requeue
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
#   TRAINIT_ACTIVATE             what to run first on each node, as in "source ~/venv/bin/activate"
#   TRAINIT_PROCESSES_PER_NODE   processes of a node, as in 1: one for all its GPUs
#   TRAINIT_COMMAND              which command to run instead of train, e.g. doctor
#   TRAINIT_ARRAY                folder in which a file for each task of an array job has its arguments
set -uo pipefail
[ -z "${TRAINIT_ARRAY:-}" ] || eval "set -- $(cat "$TRAINIT_ARRAY/$SLURM_ARRAY_TASK_ID")"
processes=${TRAINIT_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# Schedulers merge exit codes; what counts is what the processes leave here: see trainit/main.py.
export TRAINIT_MARKER=$PWD/.trainit-$SLURM_JOB_ID
rm -f "$TRAINIT_MARKER" "$TRAINIT_MARKER.failed"
# What lets a process into this job; srun hands it over in the environment, which other users cannot read.
TRAINIT_TOKEN=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n') || exit 1
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
# USR1 is ignored until Trainit listens to it: by default it would end a process that is still starting.
# In the background, since bash sits on a trap while it waits for a child in the foreground.
# --export=ALL: after "sbatch --export=...", srun would hand over only what was named there.
# shellcheck disable=SC2016,SC2086
srun --export=ALL --kill-on-bad-exit=1 --overcommit --ntasks-per-node="$processes" $cpus \
  bash -c 'trap "" USR1; eval "${TRAINIT_ACTIVATE:-}"; exec python3 -m trainit "${TRAINIT_COMMAND:-train}" "$@"' trainit "$@" &
pid=$!
while :; do
  wait $pid
  code=$?
  kill -0 $pid 2>/dev/null || break
done
echo "$(date '+%F %T') srun ended with $code${ended:+ after a TERM}"
if [ -e "$TRAINIT_MARKER" ] && [ ! -e "$TRAINIT_MARKER.failed" ] && [ -z "$ended" ]; then
  rm -f "$TRAINIT_MARKER"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # the requeue ends this script
fi
rm -f "$TRAINIT_MARKER" "$TRAINIT_MARKER.failed"
exit $code
