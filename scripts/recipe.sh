# What the recipes for long context share; they source it. Settings come from the environment, with defaults: RUN, MODEL,
# TEXT, TOKENS, CONTEXT, SHORT, TOKENS_PER_STEP, STEPS, LR, WARMUP, VAL_TOKENS, TRAINER, OPTIONS. DRY=1 says each command
# and runs none.
# shellcheck shell=bash
set -euo pipefail
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

# Programs, the model's HuggingFace directory and its weights file $WEIGHTS. $1: the model's name on the hub.
prepare_model() {
    title "programs"
    step dev/setup.sh tools
    [[ -n ${TRAINER:-} ]] || step make
    title "$1"
    local name=${1##*/}
    if [[ -z ${MODEL:-} ]]; then
        MODEL=models/$name
        step "$PYTHON" scripts/download_hf.py "$1" "$MODEL"
    fi
    WEIGHTS=${RUN}_start.bin
    step mkdir -p "$(dirname "$RUN")"
    make_once "$WEIGHTS" "$PYTHON" scripts/convert_hf.py "$MODEL" --to "$WEIGHTS"
}

# Shards in $TOKENS, with the model's own tokenizer: of TEXT if that is given, else of the Pile's first files.
prepare_tokens() {
    title "tokens"
    TOKENS=${TOKENS:-${RUN}_tokens}
    if [[ -n ${TEXT:-} ]]; then
        make_once "$TOKENS/dataset.json" "$PYTHON" data/prepare.py "$TEXT" --tokenizer "$MODEL/tokenizer.json" \
            --out "$TOKENS"
    else
        step "$PYTHON" -m pip install --quiet pyarrow
        make_once "$TOKENS/dataset.json" "$PYTHON" data/prepare.py --recipe pile --recipe-files 4 \
            --tokenizer "$MODEL/tokenizer.json" --out "$TOKENS"
    fi
}

# val_loss of weights $1 at context $2, further options behind.
evaluate() {
    local weights=$1 context=$2
    shift 2
    step "$TRAINER" --eval loss --init "$weights" --val "$TOKENS/val_*.bin" --val-tokens "$VAL_TOKENS" \
        --context "$context" "$@"
}

# Trains, or goes on where an earlier start of the recipe stopped. OPTIONS: more options, words apart.
train() {
    # shellcheck disable=SC2086
    step "$TRAINER" --init "$WEIGHTS" --tokenizer "$TOKENS/tokenizer.bin" --train "$TOKENS/train_*.bin" \
        --val "$TOKENS/val_*.bin" --val-tokens "$VAL_TOKENS" --context "$CONTEXT" --batch 1 \
        --tokens-per-step "$TOKENS_PER_STEP" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --weight-decay 0.1 --beta1 0.9 --beta2 0.95 \
        --out "$RUN" --resume "$@" ${OPTIONS:-}
}

# The run as a HuggingFace directory, $RUN_hf, with its tokenizer.
export_run() {
    title "back to HuggingFace"
    step "$PYTHON" scripts/convert_hf.py "$RUN" --back "${RUN}_hf" --tokenizer "$MODEL/tokenizer.json" --force
}
