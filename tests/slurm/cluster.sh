#!/usr/bin/env bash
# A real SLURM on one machine, for tests: slurmctld, munge and nine nodes of eight fake GPUs, up in about a second.
#
#   cluster.sh DIR up             stays in the foreground and prints "ready"; whatever ends it ends all of the cluster
#   cluster.sh DIR exec CMD ...   runs CMD on the login node:  cluster.sh DIR exec sbatch slurm/train_8node.sh
#   cluster.sh DIR node N CMD ... runs CMD on node N, outside of any job
#   cluster.sh DIR off N          power off: everything on node N is killed at once, its network goes
#   cluster.sh DIR on N           boots it again
#   cluster.sh DIR gpus N COUNT   how many GPUs node N's nvidia-smi still finds
#
# Needs root with the right to make namespaces, and Debian's slurmctld, slurmd, slurm-client, munge and iproute2. Each
# node has its own host name, address, processes, mounts and /dev/shm; outside of DIR nothing of the machine changes.
set -euo pipefail

self=$(readlink -f "${BASH_SOURCE[0]}")
dir=$(readlink -m "${1:?folder of the cluster}")
action=${2:?what to do}
shift 2
nodes=9 gpus=8 net=10.213.77
export SLURM_CONF=$dir/etc/slurm.conf PATH=$dir/bin:$PATH:/usr/sbin:/sbin

write_configuration() {
    local i
    mkdir -p "$dir"/{etc,state,log,run,bin,dev}
    chmod 755 "$dir" "$dir"/{etc,run,bin,dev}
    (umask 077 && head -c 128 /dev/urandom >"$dir/etc/munge.key")
    {
        echo "127.0.0.1 localhost"
        echo "$net.254 login"
        for ((i = 1; i <= nodes; i++)); do
            echo "$net.$i node$i"
            # PyTorch's sockets are IPv6; without these lines its reverse look-ups go to DNS, and warn.
            echo "::ffff:$net.$i node$i"
        done
    } >"$dir/etc/hosts"
    # slurmd sets CUDA_VISIBLE_DEVICES for device files only; links to /dev/null pass for them.
    for ((i = 0; i < gpus; i++)); do ln -sfn /dev/null "$dir/dev/nvidia$i"; done
    echo "NodeName=node[1-$nodes] Name=gpu Type=h100 File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
    cat >"$dir/bin/nvidia-smi" <<STUB
#!/bin/sh
# As for: nvidia-smi --query-gpu=index,name,driver_version,ecc...,memory.used --format=csv,noheader,nounits
count=\$(cat "$dir/gpus.\$(hostname)" 2>/dev/null || echo $gpus)
i=0
while [ "\$i" -lt "\$count" ]; do echo "\$i, Fake H100, 570.00, 0, 4"; i=\$((i + 1)); done
STUB
    chmod +x "$dir/bin/nvidia-smi"
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=login($net.254)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default, 5 at least).
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
# Neither control groups nor pinning: this works in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
# Believe the CPUs and the memory written below, not the hardware.
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
# Short times, so that tests of failures take seconds.
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
# When a node dies, the step's daemons on the others need 60 s to end: that is no "Kill task failed".
UnkillableStepTimeout=150
CompleteWait=0
MinJobAge=600
InactiveLimit=0
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
NodeName=node[1-$nodes] Port=6818 CPUs=64 RealMemory=512000 Gres=gpu:h100:$gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

up() {
    write_configuration
    exec 9>&- # no daemon may keep a caller's lock
    # The controller and all nodes are children of one process-number namespace: killing its first process is enough.
    setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$self" "$dir" _login \
        </dev/null >"$dir/log/login.out" 2>&1 &
    echo $! >"$dir/run/login"
    trap 'kill -KILL $! 2>/dev/null; wait; exit 0' INT TERM HUP EXIT
    for _ in $(seq 150); do
        if [ "$(on_login sinfo -h -N -p main -t idle 2>/dev/null | wc -l)" = "$nodes" ]; then
            echo ready
            wait $!
            exit
        fi
        sleep 0.1
    done
    tail -n 5 "$dir"/log/* >&2
    exit 1
}

_login() { # first process of the login node, with the controller
    mount --make-rprivate /
    mount --bind "$dir/etc/hosts" /etc/hosts
    hostname login
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$net.254/24" dev br0
    ip link set br0 up
    munged --foreground --force --num-threads=2 --socket="$dir/run/munge.sock" --key-file="$dir/etc/munge.key" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/state/munge.seed" &
    until [ -S "$dir/run/munge.sock" ]; do sleep 0.05; done
    slurmctld -D &
    for ((i = 1; i <= nodes; i++)); do _boot "$i"; done
    while :; do wait || true; sleep 0.5; done # reaps what is left to it
}

_boot() { # from the login node
    mkdir -p "$dir/spool.node$1"
    rm -f "$dir/run/node$1.mounted"
    setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$self" "$dir" _node "$1" \
        </dev/null >>"$dir/log/node$1.out" 2>&1 &
    echo $! >"$dir/run/node$1"
    until [ -e "$dir/run/node$1.mounted" ]; do sleep 0.02; done
    ip link del "eth$1" 2>/dev/null || true # of the same node before it was switched off
    ip link add "eth$1" type veth peer name eth0 netns $!
    ip link set "eth$1" master br0 up
}

_node() { # first process of a node
    hostname "node$1"
    mount -t tmpfs -o size=4g shm /dev/shm
    ip link set lo up
    touch "$dir/run/node$1.mounted"
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip addr add "$net.$1/24" dev eth0
    ip link set eth0 up
    slurmd -D &
    while :; do wait || true; sleep 0.5; done
}

inside() { # the namespaces of process $1, as this process sees it
    local pid=$1
    shift
    nsenter --target "$pid" --net --mount --uts "--pid=/proc/$pid/ns/pid_for_children" --wd="$PWD" -- "$@"
}
on_login() { inside "$(cat "$dir/run/login")" "$@"; }
_inside() { inside "$(cat "$dir/run/node$1")" "${@:2}"; }
_kill() { kill -KILL "$(cat "$dir/run/node$1")"; }

case $action in
    up | _login | _boot | _node | _inside | _kill) "$action" "$@" ;;
    exec) on_login "$@" ;;
    node) on_login "$self" "$dir" _inside "$@" ;;
    off) on_login "$self" "$dir" _kill "$1" ;;
    on) on_login "$self" "$dir" _boot "$1" ;;
    gpus) echo "$2" >"$dir/gpus.node$1" ;;
    *) sed -n '2,/^set/p' "$self" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
