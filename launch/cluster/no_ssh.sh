#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# This host's part of the main job, where ssh is not allowed: start it once on every host of the hostfile.
#   NODE_RANK=0 HOSTFILE=hostfile launch/cluster/no_ssh.sh RUN_FILE [more arguments of launch/pretrain_llama.py]
# NODE_RANK counts the lines of the hostfile from 0. Every host restarts its own part and waits for the others.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/cluster/env.sh
source "$here/env.sh"
# shellcheck source=launch/cluster/common.sh
source "$here/common.sh"

HOSTFILE=${HOSTFILE:-hostfile}
read_hostfile "$HOSTFILE"
[[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || die "NODE_RANK=${NODE_RANK:-}: set it to this host's place in $HOSTFILE, from 0"
first=${LAUNCH_HOSTS%%:*}
BELOW=1   # see pass_on
with_restarts deepspeed --log_level "$LOG_LEVEL" --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" "${JOB[@]}"
