#!/usr/bin/env bash
# Long GPT-2: the pretrained 124M, taken from 1,024 to 8,192 tokens by repeating its position table, on one GPU of
# 16 GB.
#
#     scripts/long_gpt2.sh                 # downloads GPT-2 and four files of the Pile (about 1.6 GB), trains, exports
#     DRY=1 scripts/long_gpt2.sh           # says what it would do
#     TEXT=books/ STEPS=500 scripts/long_gpt2.sh
#     SETUP=0 DEPS=deps/ scripts/long_gpt2.sh    # without apt: .venv is there, and dev/deps.sh made deps/
#
# Stopped, it goes on where it was when started again, without the network once model and tokens are there. Memory at
# batch 1, bf16: 2.5 GB of activations and 2.2 GB of weights, gradients and optimizer state. Disk: about 9 GB. Of these
# a checkpoint is 1.6 (weights 0.5, optimizer states 1.0), and two are kept while a third is written; the Pile's files
# and their tokens are 2.1, and the model as downloaded, at the start and exported 1.6. The essay that this follows
# trained on the Pile with AdamW at weight decay 0.1, betas 0.9 and 0.95 and lr 1e-6, with an accumulation that doubled
# as training went on.
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
RUN=${RUN:-runs/long_gpt2}
CONTEXT=${CONTEXT:-8192}
TOKENS_PER_STEP=${TOKENS_PER_STEP:-65536}
STEPS=${STEPS:-2000}
LR=${LR:-1e-5}
WARMUP=${WARMUP:-50}
VAL_TOKENS=${VAL_TOKENS:-524288}
SHORT=${SHORT:-1024}

begin openai-community/gpt2 train_gpt2
prepare_model openai-community/gpt2
prepare_tokens --tokenizer "$TOKENIZER"

title "before: the trained window, and the repeated one on the same tokens"
evaluate "$WEIGHTS" "$SHORT"
evaluate "$WEIGHTS" "$CONTEXT" --positions tile

title "training at $CONTEXT tokens"
train --positions tile --save-every 100 --sample-every 500

title "after: the long window, and the trained one on the same tokens"
evaluate "$RUN" "$CONTEXT"
evaluate "$RUN" "$SHORT"

export_run "$RUN"
