# shellcheck shell=bash
# What a training job does, on its first node: check, launch, pass on requests to save, and queue again or end.
# Read by slurm/train_*.sh, in the root of the repository; "$@" are the arguments of trainer/run.py.
set -euo pipefail

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
end() { # end CODE WORDS...: the job's last line
    say "$2 (exit code $1)"
    if [ -n "$chain" ]; then scancel --state=PENDING "$job" || true; fi
    exit "$1"
}

# ---- settings; slurm/site.env may set all of them, and NCCL's
# shellcheck source=slurm/lib/site.sh
. slurm/lib/site.sh
scratch=${NODE_SCRATCH:-/tmp}                      # a disk of the node's own, for what ranks compile
idle_starts=${MAX_IDLE_STARTS:-3}                  # starts in a row that may add no checkpoint
retry=${RETRY_FAILURES:-no}                        # yes: queue the job again after an error that a restart may cure
preflight=${PREFLIGHT:-full}                       # full, or nodes: without the ranks' devices and collectives
probe_seconds=${PREFLIGHT_SECONDS:-60}             # longest that a probe waits for another node or rank

# ---- names
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
chain=${SLURM_ARRAY_TASK_ID:-}
attempt=${chain:+link-$chain-}restart-${SLURM_RESTART_COUNT:-0}
run_dir=runs/$SLURM_JOB_NAME-$job
arguments=(--ds_config ds_configs/zero2.json "$@")
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --run_dir=*) run_dir=${!i#--run_dir=} ;;
        --run_dir) j=$((i + 1)) && run_dir=${!j:-} ;;
    esac
done
run_dir=$(realpath -m "$run_dir")
arguments+=(--run_dir "$run_dir")
logs=$run_dir/logs/$job/$attempt
ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
plan=$logs/preflight/plan.json
export NODE_CACHES=$scratch/caches-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The first node leads. Where node names are none for the network, SLURM knows the address.
MASTER_ADDR=${nodes[0]}
getent ahosts "$MASTER_ADDR" >/dev/null ||
    MASTER_ADDR=$(scontrol -o show node "$MASTER_ADDR" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Ports below 32768 are not handed out by the system; the job's number keeps jobs apart.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
probe_port=$((10000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# ---- requests to save: USR1 to this shell, from SLURM before the limit and on preemption
asked='' # how many seconds after the start
interrupted=''
step=''
repeater=''
ask_ranks() {
    asked=${asked:-$SECONDS}
    interrupted=yes
    [ -n "$step" ] && [ -z "$repeater" ] || return 0
    say "USR1: the ranks are asked to save"
    # Again and again, because a rank that is still starting ignores it.
    (while kill -USR1 "$step" 2>/dev/null; do sleep 10; done) &
    repeater=$!
}
trap ask_ranks USR1

wait_for() { # wait_for PID: its exit code; a trapped signal only interrupts the waiting
    local code
    while :; do
        interrupted=''
        wait "$1" && code=0 || code=$?
        [ -n "$interrupted" ] || return "$code"
    done
}

# ---- queue again
excluded_with() { # excluded_with NODE,...: these nodes, and those that the job excludes already
    local now
    now=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    printf '%s\n' "${now#(null)}" "$1" | sed '/^$/d' | paste -sd,
}
requeue() { # requeue CODE [BAD,...]: without these nodes. CODE is that of a link of a chain, which ends instead
    local excluded=''
    [ -z "${2:-}" ] || excluded=ExcNodeList=$(excluded_with "$2")
    if [ -n "$chain" ]; then
        [ -z "$excluded" ] || scontrol update "JobId=$job" "$excluded" || true
        say "the next link of the chain continues"
        exit "$1"
    fi
    trap '' TERM # of the requeue, until the nodes are excluded
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        end 75 "this cluster forbids to queue the job again: submit it again, or as a chain (docs/cluster.md)"
    fi
    [ -z "$excluded" ] || scontrol update "JobId=$SLURM_JOB_ID" "$excluded"
    trap - TERM
    sleep 600 # SLURM ends this script
    exit 75
}
requeue_saved() { # what was asked to save is queued again, unless the next attempt would be asked as early
    local shown limit
    shown=$(scontrol -o show job "$SLURM_JOB_ID" || true)
    limit=$(sed -n 's/.* TimeLimit=\([^ ]*\).*/\1/p;q' <<<"$shown")
    # SLURM sends USR1 at once where the limit is no longer than --signal's time, of which it tells the job nothing.
    if [ "${asked:-180}" -lt 180 ] && [[ $limit =~ ^00:(0.|10): && $shown == *" PreemptTime=None "* ]]; then
        end 80 "USR1 came $asked s after the start of a limit of $limit: give sbatch a longer --time, or --signal=B:USR1@60"
    fi
    requeue 0
}
other_nodes() { # other_nodes BAD,...: whether the partition has enough nodes without them
    local usable excluded
    excluded=$(scontrol show hostnames "$(excluded_with "$1")")
    usable=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,alloc,mix,comp --format=%N | sort -u |
        grep -c -v -x -F "$excluded" || true)
    [ "$usable" -ge "$SLURM_JOB_NUM_NODES" ]
}

# ---- checks
check_settings() {
    case $preflight in full | nodes) ;; *) end 80 "PREFLIGHT is '$preflight', must be full or nodes" ;; esac
    case $retry in yes | no) ;; *) end 80 "RETRY_FAILURES is '$retry', must be yes or no" ;; esac
    [[ $idle_starts =~ ^[1-9][0-9]*$ ]] || end 80 "MAX_IDLE_STARTS is '$idle_starts', must be a number from 1 on"
    [[ $probe_seconds =~ ^[1-9][0-9]*$ ]] || end 80 "PREFLIGHT_SECONDS is '$probe_seconds', must be whole seconds"
    if [ -n "$chain" ] && ! scontrol show job "$SLURM_JOB_ID" | grep -q -w 'ArrayTaskThrottle=1'; then
        end 80 "a chain is an array of which one job runs at a time: sbatch --array=1-10%1 ..."
    fi
}
check_progress() { # not for ever the same steps
    local now
    now=$("$python" tools/cluster/progress.py checkpoint "$run_dir")
    echo "$now" >>"$run_dir/logs/$job/starts"
    if [ "$(tail -n $((idle_starts + 1)) "$run_dir/logs/$job/starts" | grep -c -x "$now")" -gt "$idle_starts" ]; then
        end 1 "$idle_starts starts in a row have added no checkpoint to step $now: see $run_dir/logs/$job"
    fi
}
check_configuration() {
    local code=0 names
    names=$(IFS=, && echo "${nodes[*]}")
    "$python" tools/cluster/plan.py "$plan" --ranks "$ranks" --gpus "${SLURM_GPUS_ON_NODE:-0}" --nodes "$names" \
        --port "$probe_port" --seconds "$probe_seconds" -- "${arguments[@]}" >"$logs/dry_run.txt" 2>&1 || code=$?
    [ "$code" = 0 ] || end "$code" "$(tail -n 1 "$logs/dry_run.txt")"
}
probe() { # probe NAME SECONDS SRUN-ARGUMENTS...: every node, then who is bad
    local name=$1 seconds=$2 code=0 bad
    shift 2
    timeout --kill-after=10 "$seconds" srun --output="$logs/preflight/$name-%3t.log" --wait=0 "$@" "$plan" \
        2>"$logs/preflight/$name.srun" || true # the judge knows who did not answer
    : >"$logs/preflight/bad_nodes"
    shopt -s nullglob
    "$python" tools/cluster/judge.py --bad "$logs/preflight/bad_nodes" "$name" "$plan" \
        "$logs/preflight/$name"-*.log >"$logs/preflight/$name.verdict" || code=$?
    shopt -u nullglob
    [ "$code" != 0 ] || return 0
    while read -r line; do say "bad node $line"; done <"$logs/preflight/$name.verdict"
    bad=$(cat "$logs/preflight/bad_nodes")
    [ -n "$bad" ] || end "$code" "the checks before training failed, and no node alone is to blame: see $logs/preflight"
    other_nodes "$bad" || end "$code" "partition $SLURM_JOB_PARTITION has no $SLURM_JOB_NUM_NODES nodes without $bad"
    say "without $bad the job is queued again"
    requeue "$code" "$bad"
}

# ---- the job
main() {
    check_settings
    mkdir -p "$logs/flight" "$logs/preflight" .cache/jobs || end 84 "$run_dir cannot be written: give another --run_dir"
    ln -sfn "$logs" ".cache/jobs/$job" # for slurm/status.sh
    export TORCH_FR_DUMP_TEMP_FILE=$logs/flight/rank_
    . slurm/lib/env.sh
    say "job $SLURM_JOB_ID ($attempt): $ranks ranks on $SLURM_JOB_NODELIST, run $run_dir, logs $logs"
    check_configuration
    check_progress
    probe nodes $((probe_seconds + 60)) --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" "$python" tools/cluster/node_probe.py
    if [ "$preflight" = full ]; then
        MASTER_PORT=$probe_port probe ranks $((6 * probe_seconds + 60)) --task-epilog="$PWD/slurm/lib/clean.sh" \
            slurm/lib/rank.sh "$python" tools/cluster/rank_probe.py
    fi
    [ -z "$asked" ] || requeue_saved
    say "all nodes passed; training: tail -f $logs/rank-000.log"
    train
}

train() {
    local code=0 ending final
    rm -f "$run_dir/status.json"
    # One task a GPU, neither ssh nor a hostfile. The first rank that fails ends the others, which would wait for it.
    srun --kill-on-bad-exit=1 --wait=60 --output="$logs/rank-%3t.log" --task-epilog="$PWD/slurm/lib/clean.sh" \
        slurm/lib/rank.sh "$python" trainer/run.py "${arguments[@]}" 2>"$logs/srun.log" &
    step=$!
    [ -z "$asked" ] || ask_ranks
    wait_for "$step" || code=$?
    [ -z "$repeater" ] || kill "$repeater" 2>/dev/null || true
    read -r ending final < <("$python" tools/cluster/progress.py ending "$run_dir" "$logs" --srun "$code" ${asked:+--asked})
    status=$("$python" tools/cluster/progress.py status "$run_dir" "$logs")
    if grep -q "Node failure" "$logs/srun.log"; then
        say "a node was lost: $(grep -m 1 "Node failure" "$logs/srun.log"); $status"
        sleep 600 # SLURM queues the job again and ends this script
    fi
    case $ending in
        finished) end 0 "finished: $status" ;;
        stopped) end 0 "saved and stopped as asked: $status" ;;
        requeue)
            say "saved: $status"
            requeue_saved
            ;;
        failed)
            # 1: unforeseen; 90 and above: hang, communication, nodes. 80 to 84 are for the user to mend.
            if [ "$retry" = yes ] && { [ "$final" -lt 80 ] || [ "$final" -ge 90 ]; }; then
                say "failed (exit code $final), queued again: $status"
                requeue "$final"
            fi
            end "$final" "FAILED: $status"
            ;;
    esac
}

main
