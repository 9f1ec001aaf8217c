#!/usr/bin/env bash
# A SLURM cluster of this one machine, for the tests: `.ci/slurm.sh install` (Debian, as root), then `.ci/slurm.sh start DIR` and `stop DIR`.
# All of it is in DIR: keys, state, logs, pids. Commands find it by SLURM_CONF=DIR/slurm.conf.
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 slurm-wlm munge
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

start() {
    local dir user host
    mkdir -p "$1"; chmod 755 "$1"; dir=$(cd "$1" && pwd); user=$(id -un); host=$(hostname -s)
    mkdir -p "$dir/state" "$dir/spool"
    (umask 077; head -c 1024 /dev/urandom > "$dir/munge.key")
    cat > "$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until the credentials of its last run have expired
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
# more CPUs than there may be, so that all jobs of a test run side by side
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    export SLURM_CONF=$dir/slurm.conf
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munge.seed"
    slurmctld -c
    slurmd -c
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ] && echo "SLURM_CONF=$SLURM_CONF" && return
        sleep .2
    done
    echo "the cluster did not come up: see $dir/*.log" >&2
    return 1
}

stop() {
    for daemon in slurmd slurmctld munged; do
        if [ -f "$1/$daemon.pid" ]; then
            kill "$(cat "$1/$daemon.pid")" || true
        fi
    done
}

"$@"
