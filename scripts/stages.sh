# What the recipes for a million tokens share, beyond recipe.sh: the context grows by stages, each a run in RUN/CONTEXT
# that starts from the weights of the stage before. Every step has the same number of tokens, and every evaluation is of
# the same tokens. Settings beside those of recipe.sh:
#     CONTEXT      of the last stage
#     STAGES       "8192:100 32768:50 ...", contexts and optimizer steps, in place of those that CONTEXT gives
#     MEMORY       of the GPU, whole: a card of "16 GB" shows a little under 16 GiB
#     HOST_MEMORY  of the host, for what is to wait there; empty: the GPU has to do alone
# What the trainer is not told (recomputing, chunks, heads at a time, what waits on the host) it chooses to fit.
# shellcheck shell=bash
# shellcheck source=scripts/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
STAGES_BELOW="8192:100 32768:50 131072:20 524288:10"
LAST_STEPS=10

# The stages on the way to $1.
stages_to() {
    local stage
    for stage in $STAGES_BELOW; do
        if ((${stage%:*} < $1)); then printf '%s ' "$stage"; fi
    done
    printf '%s:%s' "$1" "$LAST_STEPS"
}

# Refuses what is no list of stages; without one it is what CONTEXT gives. CONTEXT becomes that of the last stage.
# Refuses a step, else one sequence of the last stage, that is no whole number of sequences of each stage.
check_stages() {
    local stage before=0 me
    me=$(basename "$0")
    if [[ ! $CONTEXT =~ ^[1-9][0-9]{0,9}$ ]]; then
        echo "$me: CONTEXT '$CONTEXT' is not a number of tokens such as 262144" >&2
        exit 2
    fi
    STAGES=${STAGES:-$(stages_to "$CONTEXT")}
    for stage in $STAGES; do
        if [[ ! $stage =~ ^[1-9][0-9]{0,9}:[1-9][0-9]{0,7}$ ]] || ((${stage%:*} <= before)); then
            echo "$me: STAGES '$STAGES': at '$stage': give CONTEXT:STEPS, words apart, contexts growing" >&2
            exit 2
        fi
        before=${stage%:*}
    done
    CONTEXT=$before
    TOKENS_PER_STEP=${TOKENS_PER_STEP:-$CONTEXT}
    for stage in $STAGES; do
        if ((TOKENS_PER_STEP % ${stage%:*})); then
            echo "$me: a step of $TOKENS_PER_STEP tokens is no whole number of ${stage%:*}; give another" \
                "TOKENS_PER_STEP, CONTEXT or STAGES" >&2
            exit 2
        fi
    done
}

# From the pretrained model to the last stage's. $1: its name on the hub, $2: the trainer. POSITIONS are the options of
# its positions, TYPES those that keep states, master weights and gradients small.
run_stages() {
    local stage context from
    check_stages
    VAL_TOKENS=${VAL_TOKENS:-$((CONTEXT > 524288 ? CONTEXT : 524288))}
    # Books: few documents of the Pile are longer than the first stage.
    CORPUS=${CORPUS:-pg19}
    CORPUS_FILES=${CORPUS_FILES:-2000}
    LR=${LR:-1e-5}
    WARMUP=${WARMUP:-5}
    ROOM=(--memory "$MEMORY" --offload none)
    [[ -z $HOST_MEMORY ]] || ROOM=(--memory "$MEMORY" --host-memory "$HOST_MEMORY")

    begin "$1" "$2"
    title "memory"
    for stage in $STAGES; do
        context=${stage%:*}
        if [[ -n ${DRY:-} || $context == "$CONTEXT" ]]; then
            plan "$context" "${POSITIONS[@]}" "${TYPES[@]}" "${ROOM[@]}"
        fi
    done
    prepare_model "$1"
    prepare_tokens --tokenizer "$TOKENIZER" --min-tokens $((CONTEXT + 1))

    title "before: the trained window"
    measure "at $SHORT, before" "$WEIGHTS" "$SHORT" "${ROOM[@]}"
    from=$WEIGHTS
    for stage in $STAGES; do
        context=${stage%:*}
        title "$context tokens"
        measure "at $context, before training there" "$from" "$context" "${POSITIONS[@]}" "${ROOM[@]}"
        WEIGHTS=$from RUN=$RUN/$context CONTEXT=$context STEPS=${stage#*:} train "${POSITIONS[@]}" "${TYPES[@]}" \
            "${ROOM[@]}" --save-every 10 --keep 1 --val-every 0 --sample-every 0
        from=$RUN/$context
        measure "at $context, after" "$from" "$context" "${POSITIONS[@]}" "${ROOM[@]}"
    done
    measure "at $SHORT, in the end" "$from" "$SHORT" "${ROOM[@]}"

    table
    export_run "$from"
}
