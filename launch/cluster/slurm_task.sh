#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One task of slurm.sbatch: a node's launcher, or a rank. Not for use by hand.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/cluster/env.sh
source "$here/env.sh"

if [[ $TASKS == node ]]; then
    HOSTFILE=$(mktemp)
    export HOSTFILE
    trap 'rm -f "$HOSTFILE"' EXIT
    tr , '\n' <<< "$LAUNCH_HOSTS" | sed 's/:/ slots=/' > "$HOSTFILE"
    # the batch script restarts all nodes together
    NODE_RANK=$SLURM_NODEID MAX_RESTARTS=0 bash "$here/no_ssh.sh" "$@"
else
    # shellcheck source=launch/cluster/common.sh
    source "$here/common.sh"
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$(( SLURM_NTASKS / SLURM_NNODES ))
    exec python "${JOB[@]}"
fi
