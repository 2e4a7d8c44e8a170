#!/bin/bash
# What Slurm runs: the command that follows this file's name and one word more on sbatch's command line, word for word.
# This file is the same for every job. Slurm's notice before the time limit (SIGUSR1) is passed on to the command; where
# a command that got it then ends with 4 (saved, to be continued) or by a signal (a node was lost, or saving took too
# long), the job is queued again. Exit codes 0 to 3 mean that going on would not help: done, a fault that stays, refused,
# a verdict. The word before the command begins the names of files in which launches say how they ended; - where none do.
ended=$1
shift
notice=
child=
trap 'notice=1; [[ -n $child ]] && kill -s USR1 "$child" 2>/dev/null' USR1
# A job that is cancelled or preempted: Slurm itself tells the command. Told twice, it would end without saving.
trap : TERM

"$@" &
child=$!
[[ -n $notice ]] && kill -s USR1 "$child" 2>/dev/null
while :; do
    wait "$child"
    # A signal ends wait early; the command itself is then still there.
    kill -0 "$child" 2>/dev/null || break
done
wait "$child" # which says its code again, where a signal's stood
code=$?

# Of a launch whose nodes agreed on its end that counts: srun's code is that of a lost node too, which a spare replaced.
ended=$ended$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.ended
# A network file system may hide for a minute what another node has written (man nfs, acdirmax). After the notice there
# is no time to wait, and a job of one node writes none.
if [[ $ended == /* && $code -ne 0 && ${SLURM_JOB_NUM_NODES:-1} -gt 1 && -d ${ended%/*} ]]; then
    for ((left = 60; left > 0; left--)); do
        ls -A "${ended%/*}" >/dev/null 2>&1 # which asks the server anew
        [[ -e $ended || -n $notice ]] && break
        sleep 1
    done
fi
if [[ $ended == /* && -r $ended ]]; then
    read -r recorded <"$ended"
    [[ $recorded == [0-4] ]] && code=$recorded
fi

if [[ -n $notice && $code -ge 4 ]]; then
    echo "ended with $code after the scheduler's notice: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "job $SLURM_JOB_ID could not be queued again; submit it anew, the run goes on from its newest checkpoint" >&2
fi
exit "$code"
