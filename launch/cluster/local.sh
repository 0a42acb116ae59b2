#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on this host.
#   launch/cluster/local.sh RUN_FILE [more arguments of launch/pretrain_llama.py]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/cluster/env.sh
source "$here/env.sh"
# shellcheck source=launch/cluster/common.sh
source "$here/common.sh"

# DeepSpeed reads /job/hostfile when none is named, and would go over the network if there is one
BELOW=1   # see pass_on
with_restarts deepspeed --log_level "$LOG_LEVEL" --hostfile /dev/null --num_gpus "$(gpus_here)" \
    --master_port "$MASTER_PORT" "${JOB[@]}"
