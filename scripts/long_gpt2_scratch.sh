#!/usr/bin/env bash
# GPT-2 124M at 8,192 tokens from scratch, on one GPU of 16 GB.
#
#     scripts/long_gpt2_scratch.sh               # downloads two files of FineWeb-Edu (4 GB), trains, exports
#     DRY=1 scripts/long_gpt2_scratch.sh         # says what it would do, and what memory it takes
#     TEXT=books/ scripts/long_gpt2_scratch.sh   # with a tokenizer of its own, of VOCAB tokens
#     SIZE=6,384,6 STEPS=500 RUN=runs/small scripts/long_gpt2_scratch.sh
#
# Stopped, it goes on where it was when started again. The position table has a trained row for each of the 8,192. What
# does not fit MEMORY is recomputed or worked on in chunks. 2,500 steps of 524,288 tokens are 1.3 billion, about what
# the two files have: nine hours at 40,000 tokens/s (derived). Disk: about 13 GB.
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
RUN=${RUN:-runs/long_gpt2_scratch}
SIZE=${SIZE:-124M}
CORPUS=${CORPUS:-fineweb-edu}
CORPUS_FILES=${CORPUS_FILES:-2}
VOCAB=${VOCAB:-50257}
CONTEXT=${CONTEXT:-8192}
MEMORY=${MEMORY:-15GiB}
GPU=${GPU:-l4}
TOKENS_PER_STEP=${TOKENS_PER_STEP:-524288}
STEPS=${STEPS:-2500}
LR=${LR:-6e-4}
WARMUP=${WARMUP:-250}
VAL_TOKENS=${VAL_TOKENS:-524288}
SHORT=${SHORT:-1024}
unset MODEL

begin "$SIZE from scratch" train_gpt2 ""
TOKENIZER=$TOKENS/tokenizer.json
ROOM=(--memory "$MEMORY")
OWN=()
[[ -z ${TEXT:-} ]] || OWN=(--train-tokenizer "$VOCAB")

title "memory"
plan "$CONTEXT" "${ROOM[@]}"
prepare_tokens "${OWN[@]}"

title "training at $CONTEXT tokens"
train "${ROOM[@]}" --save-every 100 --sample-every 500

title "after: the whole window, and its beginning alone on the same tokens"
measure "at $CONTEXT" "$RUN" "$CONTEXT" "${ROOM[@]}"
measure "at $SHORT" "$RUN" "$SHORT" "${ROOM[@]}"

table
export_run "$RUN"
