#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# This host's part of the main job under torchrun, which restarts all hosts together: start it once on every host.
#   NODES=2 MASTER_ADDR=host0 launch/cluster/torchrun.sh RUN_FILE [more arguments of launch/pretrain_llama.py]
# The number of hosts is fixed: a run's batch is divided among a stated number of ranks.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/cluster/env.sh
source "$here/env.sh"
# shellcheck source=launch/cluster/common.sh
source "$here/common.sh"

NODES=${NODES:-1}
(( NODES == 1 )) || [[ -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR: set it to the first host's name or address"
exec torchrun --nnodes "$NODES" --nproc-per-node "$(gpus_here)" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:$MASTER_PORT" --rdzv-id "${JOB_ID:-ds_blockwise}" \
    "${JOB[@]}"
