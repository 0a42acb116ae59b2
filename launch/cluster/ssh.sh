#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on all hosts of a hostfile, started from one of them over pdsh and ssh. Needs pdsh here, ssh without a
# password to every host, and this checkout at the same path on each.
#   HOSTFILE=hostfile launch/cluster/ssh.sh RUN_FILE [more arguments of launch/pretrain_llama.py]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/cluster/env.sh
source "$here/env.sh"
# shellcheck source=launch/cluster/common.sh
source "$here/common.sh"

HOSTFILE=${HOSTFILE:-hostfile}
read_hostfile "$HOSTFILE"
command -v pdsh >/dev/null || die "pdsh is not installed here (Debian: apt-get install pdsh); or start no_ssh.sh on each host"

# DeepSpeed puts values and arguments into one command for the other hosts, and knows " alone of what a shell reads in
# them. pdsh replaces %h, %n, %u and %% in it.
# passable NAME TEXT: ends with a message if TEXT cannot be passed on.
passable() {
    [[ $2 != *$'\n'* && ! $2 =~ %[hnu%] ]] ||
        die "$1: %h, %n, %u, %% and several lines cannot be passed on to other hosts; write the value another way"
}
# in_quotes TEXT: what stands for TEXT between double quotes, but for " itself.
in_quotes() {
    local text=${1//\\/\\\\}
    text=${text//\$/\\\$}
    printf '%s' "${text//\`/\\\`}"
}

# DeepSpeed carries over what this file holds, and of the environment little more than NCCL_* and PYTHON*
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
mapfile -t carried < <(compgen -e | grep -E '^(NCCL|PYTHON|MLFLOW|MV2|UCX)')   # here escaped
# ssh brings a bare PATH: the kernels of a rank are compiled with the ninja of the virtual environment
for name in "${SHARED[@]}" "${carried[@]}" PATH ${LD_LIBRARY_PATH:+LD_LIBRARY_PATH}; do
    passable "$name" "${!name}"
    value=$(in_quotes "${!name}")
    echo "$name=${value//\"/\\\"}"
done > "$DS_ENV_FILE"
for at in "${!JOB[@]}"; do
    passable "${JOB[at]}" "${JOB[at]}"
    if [[ ${JOB[at]} == *" "* ]]; then
        JOB[at]=$(in_quotes "${JOB[at]}")   # DeepSpeed writes the quotes
    else
        JOB[at]=$(printf '%q' "${JOB[at]}")
    fi
done

first=${LAUNCH_HOSTS%%:*}
# --force_multi: a hostfile with one line names that host, not this one
with_restarts deepspeed --log_level "$LOG_LEVEL" --hostfile "$HOSTFILE" --force_multi --launcher pdsh \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" "${JOB[@]}"
