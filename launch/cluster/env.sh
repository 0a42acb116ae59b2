# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Settings of a cluster, read by every launcher of this folder. The first part is the site's: set these here, or in
# the environment, which wins. Nothing below it, and nothing in the other files, is about a site.

: "${NETWORK_INTERFACE:=}"   # between the hosts, such as ib0 or eth0; empty: the libraries choose
: "${GPUS_PER_NODE:=}"       # ranks on each host, where no hostfile says it; empty: what nvidia-smi lists, else 1
: "${MASTER_PORT:=29500}"    # of the rendezvous, on the first host; free there, below 32768
: "${MAX_RESTARTS:=3}"       # how often a job that ended with an error is started again
: "${RESTART_WAIT:=10}"      # seconds before each
: "${SHARE_ALSO:=}"         # names of more variables that every rank needs, such as "WANDB_API_KEY HF_HOME"
: "${VENV=.venv}"            # virtual environment, the same path on every host; empty: what PATH finds

# ---------------------------------------------------------------------------------------------------------------------

# share NAME VALUE: export NAME, unless the environment has it already; ssh.sh carries what is shared to other hosts.
SHARED=()
share() {
    export "$1=${!1:-$2}"
    SHARED+=("$1")
}

if [[ -n $NETWORK_INTERFACE ]]; then
    # On a host with several interfaces both libraries may pick a container bridge, and then wait for each other.
    share NCCL_SOCKET_IFNAME "$NETWORK_INTERFACE"
    share GLOO_SOCKET_IFNAME "$NETWORK_INTERFACE"
fi
# Silent while all is well; the cause of a failed connection otherwise.
share NCCL_DEBUG WARN
# torch starts a thread for each core in every rank: ranks x cores threads on one host are slower than one each. The
# main job shares the cores of a CPU-only host by itself; this is for a host with GPUs, whose CPU work is small.
if command -v nvidia-smi >/dev/null; then
    share OMP_NUM_THREADS 8
fi
# Minutes that DeepSpeed lets a collective wait: longer than the slowest save, or a slow disk looks like a dead rank.
share DEEPSPEED_TIMEOUT 10
# Seconds until the job ends because a rank has not come up: longer than the slowest import of a full cluster.
share LAUNCH_JOIN_SECONDS 300
# Seconds without a sign of life after which a host counts as lost. Neither NCCL nor gloo notices a cut line before
# the timeout above, and then they do not say whose it is.
share LAUNCH_SILENCE_SECONDS 60
# A job's log is read while it runs; under srun and torchrun Python would keep it back by the block.
share PYTHONUNBUFFERED 1

for name in $SHARE_ALSO; do
    share "$name" ""
done

# ssh itself must notice a dead host, or pdsh waits for it for ever after the job has ended on all others.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
