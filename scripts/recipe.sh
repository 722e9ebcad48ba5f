# What the recipes for long context share; they source it before anything else. Settings come from the environment: RUN,
# MODEL, TEXT, CORPUS, CORPUS_FILES, TOKENS, CONTEXT, SHORT, TOKENS_PER_STEP, STEPS, LR, WARMUP, VAL_TOKENS, TRAINER,
# DEPS, GPU, PLAN_FOR; the recipes have the defaults. OPTIONS are more options of the trainer, words apart, and go to
# training alone, never to the evaluations. DRY=1 says each command and runs none. SETUP=0 leaves out dev/setup.sh, for
# machines without apt: .venv with requirements.txt is then there already, and DEPS is the folder of dev/deps.sh that
# make takes headers from.
# shellcheck shell=bash
set -euo pipefail
shopt -s lastpipe # a function that reads from a pipe keeps what it read

# Paths that were given are the caller's, whose folder this is still; those of the defaults are in the checkout. A
# TRAINER without a slash may be a program on the PATH.
for setting in RUN MODEL TEXT TOKENS TRAINER DEPS; do
    given=${!setting:-}
    if [[ -n $given && ($setting != TRAINER || $given == */* || -e $given) ]]; then
        printf -v "$setting" %s "$(realpath -ms -- "$given")"
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python

title() { printf '\n== %s\n' "$*"; }

# Says a command and, unless DRY is set, runs it.
step() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    [[ -n ${DRY:-} ]] || "$@"
}

# The same, unless its product is there from an earlier start of the recipe.
make_once() {
    local product=$1
    shift
    if [[ -e $product ]]; then echo "  $product is there"; else step "$@"; fi
}

# Refuses to go on if one of the products $3 and on is there, and its $1 was another one than $2 then.
made_from() {
    local what=$1 now=$2 was product
    shift 2
    was=$(sed -n "s/^$what //p" "$STAMP")
    for product in "$@"; do
        if [[ -e $product && $was != "$now" ]]; then
            echo "$(basename "$0"): $product is of the $what $was, not of $now; choose another RUN" >&2
            exit 2
        fi
    done
}

# What is made once is found by the name of RUN alone, so what it was made from is written down beside it. $1: the
# model.
remember() {
    local text=${TEXT:-$CORPUS}
    [[ $text != pile ]] || text="the Pile"
    STAMP=${RUN}_recipe.txt
    if [[ -e $STAMP ]]; then
        made_from model "$1" "$WEIGHTS" "$TOKENS/dataset.json" "$RUN"
        made_from text "$text" "$TOKENS/dataset.json" "$RUN"
    fi
    if [[ -z ${DRY:-} ]]; then
        mkdir -p "$(dirname "$RUN")"
        printf 'model %s\ntext %s\n' "$1" "$text" >"$STAMP.part"
        mv "$STAMP.part" "$STAMP"
    fi
}

# The first thing of a recipe: names of what it makes, and the programs. $1: the model, $2: its trainer; $3: the file of
# the weights to start from, where that is not ${RUN}_start.bin; empty: none, the model starts from scratch.
begin() {
    WEIGHTS=${3-${RUN}_start.bin}
    TOKENS=${TOKENS:-${RUN}_tokens}
    CORPUS=${CORPUS:-pile}
    CORPUS_FILES=${CORPUS_FILES:-4}
    remember "${MODEL:-$1}"
    title "programs"
    [[ ${SETUP:-1} == 0 ]] || step dev/setup.sh tools
    [[ -n ${TRAINER:-} ]] || step make ${DEPS:+"DEPS=$DEPS"}
    TRAINER=${TRAINER:-./$2}
}

# The model's HuggingFace directory and its weights file $WEIGHTS. $1: its name on the hub.
prepare_model() {
    title "$1"
    if [[ -z ${MODEL:-} ]]; then
        MODEL=models/$1
        # Without asking the hub, which would list the model's files: a run goes on where there is no network too.
        if [[ -e $WEIGHTS && -e $MODEL/tokenizer.json ]]; then
            echo "  $MODEL is there"
        else
            step "$PYTHON" scripts/download_hf.py "$1" "$MODEL"
        fi
    fi
    make_once "$WEIGHTS" "$PYTHON" scripts/convert_hf.py "$MODEL" --to "$WEIGHTS"
    TOKENIZER=$MODEL/tokenizer.json
}

# Shards in $TOKENS of TEXT if that is given, else of the first files of CORPUS. The tokenizer and other options of
# data/prepare.py are behind.
prepare_tokens() {
    title "tokens"
    local from=("${TEXT:-}")
    if [[ -z ${TEXT:-} ]]; then
        from=(--recipe "$CORPUS" --recipe-files "$CORPUS_FILES")
        if [[ $CORPUS == pile || $CORPUS == fineweb-edu ]] && [[ ! -e $TOKENS/dataset.json ]]; then
            step "$PYTHON" -m pip install --quiet pyarrow
        fi
    fi
    make_once "$TOKENS/dataset.json" "$PYTHON" data/prepare.py "${from[@]}" "$@" --out "$TOKENS"
    same_tokens
}

# Makes VAL_TOKENS what all contexts of the recipe divide and the first validation shard holds: a window never spans
# shards and what is left at a shard's end is not looked at, so that else each context would see other tokens.
same_tokens() {
    local shard=$TOKENS/val_000000.bin unit=1 context a b rest most
    [[ -e $shard ]] || return 0
    for context in "$SHORT" "$CONTEXT" ${STAGES:-}; do
        context=${context%:*} a=$unit b=$context
        while ((b)); do rest=$((a % b)) a=$b b=$rest; done
        unit=$((unit / a * context))
    done
    most=$(($(od -An -td4 -j8 -N4 "$shard") - 1))
    ((most < VAL_TOKENS)) || most=$VAL_TOKENS
    if ((most < unit)); then
        echo "  no $unit tokens in $shard: losses at different contexts are of different tokens"
    else
        VAL_TOKENS=$((most / unit * unit))
        echo "  validation losses are of the same $VAL_TOKENS tokens at every context"
    fi
}

# val_loss of weights $1 at context $2, further options behind.
evaluate() {
    local weights=$1 context=$2
    shift 2
    step "$TRAINER" --eval loss --init "$weights" --val "$TOKENS/val_*.bin" --val-tokens "$VAL_TOKENS" \
        --context "$context" "$@"
}

# The same, and a row of the table at the end: $1 says what is measured, the rest is as above.
LOSSES=()
measure() {
    local what=$1 line
    shift
    evaluate "$@" | while IFS= read -r line; do
        printf '%s\n' "$line"
        if [[ $line == "val_loss "* ]]; then LOSSES+=("$what" "${line#val_loss }"); fi
    done
}

# All that was measured. Losses are comparable unless same_tokens said otherwise.
table() {
    title "validation loss"
    [[ -n ${DRY:-} ]] || printf '  %-56s %s\n' "${LOSSES[@]}"
}

# What training at context $1 takes of memory, further options behind; exit 3 if that does not fit. A dry run plans too,
# once there is a trainer. SIZE is the model to plan for as long as its weights are not there; PLAN_FOR, cuda or cpu,
# the build; GPU the one whose speed a step's time is estimated from.
plan() {
    local context=$1 start=(--init "$WEIGHTS") build=(--plan-for "${PLAN_FOR:-cuda}") dry=
    shift
    [[ -e $WEIGHTS ]] || start=(--model "$SIZE")
    [[ ${build[1]} == cpu || -z ${GPU:-} ]] || build+=(--gpu "$GPU")
    command -v "$TRAINER" >/dev/null || dry=${DRY:-}
    # shellcheck disable=SC2086
    DRY=$dry step "$TRAINER" --plan "${build[@]}" "${start[@]}" --context "$context" --batch 1 \
        --tokens-per-step "$TOKENS_PER_STEP" "$@" ${OPTIONS:-}
    [[ -z $dry ]] || echo "  $TRAINER is not there: once make has built it, a dry run prints the plan too"
}

# Trains, or goes on where an earlier start of the recipe stopped.
train() {
    local start=(--init "$WEIGHTS")
    [[ -n $WEIGHTS ]] || start=(--model "$SIZE")
    # shellcheck disable=SC2086,SC2153
    step "$TRAINER" "${start[@]}" --tokenizer "$TOKENS/tokenizer.bin" --train "$TOKENS/train_*.bin" \
        --val "$TOKENS/val_*.bin" --val-tokens "$VAL_TOKENS" --context "$CONTEXT" --batch 1 \
        --tokens-per-step "$TOKENS_PER_STEP" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --weight-decay 0.1 \
        --beta1 0.9 --beta2 0.95 --out "$RUN" --resume "$@" ${OPTIONS:-}
}

# A run, $1, as a HuggingFace directory, $RUN_hf, with its tokenizer.
export_run() {
    title "back to HuggingFace"
    step "$PYTHON" scripts/convert_hf.py "$1" --back "${RUN}_hf" --tokenizer "$TOKENIZER" --force
}
