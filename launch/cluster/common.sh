# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the launchers of this folder share. Sourced after env.sh, with the launcher's arguments.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PROGRAM=${PROGRAM:-$ROOT/launch/pretrain_llama.py}   # or launch/preflight.py
REFUSED=2                                            # exit status of a job whose configuration is wrong

say() { echo "launch: $*" >&2; }
die() { say "$*"; exit "$REFUSED"; }

if (( $# == 0 )) || [[ $1 == -* ]]; then
    die "usage: $0 RUN_FILE [more arguments of launch/pretrain_llama.py]"
fi
[[ -f $1 ]] || die "$1: no such run file"
# torchrun takes a script's --run for an option of its own
RESUME=(--auto-resume)
LOG_LEVEL=warning   # of DeepSpeed's launcher
for argument in "${@:2}"; do
    case $argument in
        --resume) RESUME=() ;;
        --overwrite) RESUME=(); MAX_RESTARTS=0 ;;   # a second start would delete what the first one saved
        --verbose) LOG_LEVEL=info ;;
    esac
done
# shellcheck disable=SC2034 # the sourcing script starts it
JOB=("$PROGRAM" --run-file "$1" "${RESUME[@]}" "${@:2}")

# an installed package has no environment below it: it lies in one, which PATH finds
[[ $VENV != .venv || -f $ROOT/setup.py ]] || VENV=''
if [[ -n $VENV ]]; then
    [[ $VENV == /* ]] || VENV=$ROOT/$VENV
    [[ -d $VENV/bin ]] || die "VENV=$VENV: no such environment; run make setup, or set VENV (empty: what PATH finds)"
    export PATH="$VENV/bin:$PATH"
fi

# gpus_here: number of ranks for this host.
gpus_here() {
    if [[ -n $GPUS_PER_NODE ]]; then
        echo "$GPUS_PER_NODE"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L | wc -l
    else
        echo 1
    fi
}

# read_hostfile FILE: sets LAUNCH_HOSTS to "host:ranks,host:ranks", with which the main job names hosts that are missing.
read_hostfile() {
    [[ -f $1 ]] || die "$1: no such hostfile; its lines read: HOST slots=RANKS"
    LAUNCH_HOSTS=$(awk '!/^#/ && match($0, /slots=[0-9]+/) {
        printf "%s%s:%s", separator, $1, substr($0, RSTART + 6, RLENGTH - 6); separator = "," }' "$1")
    [[ -n $LAUNCH_HOSTS ]] || die "$1: no line of the form: HOST slots=RANKS"
    share LAUNCH_HOSTS "$LAUNCH_HOSTS"
}

# pass_on SIGNAL: to the job. On its own host (BELOW=1) the command `deepspeed` would die of it and leave the process
# below it, which ends the ranks: that one gets SIGTERM. It would make SIGTERM of SIGINT: the ranks get that one.
BELOW=''
pass_on() {
    local to=$child below=''
    [[ -z $BELOW ]] || below=$(pgrep -P "$child" || true)
    if [[ -n $below ]]; then
        to=$below
        [[ $1 != INT ]] || to=$(pgrep -P "$below" || echo "$below")
    fi
    # shellcheck disable=SC2086 # several are several arguments
    kill -"$1" $to 2>/dev/null || true
}

# with_restarts COMMAND...: run it again, at most MAX_RESTARTS times, when it fails; the job goes on from its last
# complete checkpoint. Not after a signal, and not if the configuration is wrong.
RESTARTS=0
with_restarts() {
    local status child='' stopped=''
    # the child runs in the background: bash would answer a signal only after a child in the foreground has ended
    trap 'stopped=1; pass_on INT' INT
    trap 'stopped=1; pass_on TERM' TERM
    while true; do
        "$@" &
        child=$!
        status=0
        wait "$child" || status=$?
        while kill -0 "$child" 2>/dev/null; do
            status=0
            wait "$child" || status=$?
        done
        if [[ -n $stopped ]]; then
            say "stopped by a signal"
            return $(( status == 0 ? 1 : status ))
        elif (( status == 0 )); then
            return 0
        elif (( status == REFUSED )); then
            say "the job refused to start (see above): no restart"
            return "$status"
        elif (( RESTARTS >= MAX_RESTARTS )); then
            say "the job ended with status $status after $RESTARTS restarts: giving up"
            return "$status"
        fi
        RESTARTS=$(( RESTARTS + 1 ))
        say "the job ended with status $status: restart $RESTARTS of $MAX_RESTARTS in $RESTART_WAIT s," \
            "from its last complete checkpoint"
        sleep "$RESTART_WAIT" &
        child=$!
        wait "$child" || true
        [[ -z $stopped ]] || { say "stopped by a signal"; return 1; }
    done
}
