#!/usr/bin/env bash
# One run on several GPUs of this machine, or on several CPU processes: a rank a GPU.
#   scripts/multi_gpu.sh RANKS ./train_gpt2 --out RUN …
# mpirun starts the ranks, and without mpirun this script does (RANK, WORLD_SIZE). Ctrl-C, TERM and HUP stop the run at
# the end of its step, with a checkpoint and exit code 4. What mpirun makes of these signals by itself would leave the
# ranks a second.
#     DRY=1    print what would be run
#     MPIRUN   another mpirun, or empty for none; MPI_OPTIONS: more of its options, such as "--hostfile HOSTS"
set -euo pipefail

me=$(basename "$0")
usage() {
    echo "$me: $1; $me RANKS PROGRAM [OPTION ...]" >&2
    exit 2
}
(($# >= 2)) || usage "too few arguments"
ranks=$1
shift
[[ $ranks =~ ^[1-9][0-9]{0,4}$ ]] || usage "RANKS '$ranks' is no number of processes"
command -v "$1" >/dev/null || usage "there is no program $1"

if [[ -z ${MPIRUN+set} ]]; then MPIRUN=$(command -v mpirun || true); fi
pids=()
# In a session of its own no process gets the terminal's Ctrl-C. A rank of a script's has no terminal to begin with.
begin() {
    if [[ ${DRY:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        setsid "$@" &
        pids+=($!)
    fi
}

if [[ $MPIRUN ]]; then
    # As root mpirun wants to be told twice; containers on rented machines know no other user.
    if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
    command -v "$MPIRUN" >/dev/null || usage "there is no MPIRUN $MPIRUN"
    # To Open MPI a machine has room for as many ranks as it has cores, however many GPUs.
    more=()
    if [[ $("$MPIRUN" --version 2>/dev/null) == *"Open MPI"* ]]; then more=(--oversubscribe); fi
    # shellcheck disable=SC2086
    begin "$MPIRUN" -n "$ranks" --bind-to none ${more[@]+"${more[@]}"} ${MPI_OPTIONS:-} "$@"
else
    port=${LONGHAND_PORT:-$((20000 + RANDOM % 12000))}
    for ((rank = 0; rank < ranks; rank++)); do
        begin env RANK=$rank WORLD_SIZE="$ranks" LOCAL_RANK=$rank MASTER_ADDR=127.0.0.1 LONGHAND_PORT="$port" \
            LONGHAND_RUN="${LONGHAND_RUN:-$me $$}" "$@"
    done
fi

# Until its ranks are there mpirun forwards a signal to nobody.
stop() {
    while ((SECONDS < 3)); do sleep 0.2; done
    kill -USR1 "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM HUP USR1 USR2
code=0
for pid in "${pids[@]}"; do
    ended=0
    wait "$pid" || ended=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait and not the process
        ended=0
        wait "$pid" || ended=$?
    done
    if ((ended && !code)); then code=$ended; fi
done
exit "$code"
