#!/usr/bin/env bash
# Long Pythia: pythia-1.4b-deduped, taken from 2,048 to 8,192 tokens, beside the same training at 2,048: the same steps
# of the same number of tokens, and validation losses of both on the same text.
#
#     scripts/long_pythia.sh               # downloads the model (2.9 GB) and four files of the Pile, trains, exports
#     DRY=1 scripts/long_pythia.sh         # says what it would do
#     ROPE=yarn scripts/long_pythia.sh     # stretches the rotary positions; the essay left them as they are
#     COMPARE=0 scripts/long_pythia.sh     # leaves out the training at 2,048
#     NAME=EleutherAI/pythia-160m-deduped RUN=runs/small scripts/long_pythia.sh
#     SETUP=0 DEPS=deps/ scripts/long_pythia.sh    # without apt: .venv is there, and dev/deps.sh made deps/
#
#     OPTIONS="--optimizer lion" scripts/long_pythia.sh    # as the essay did
#
# Stopped, it goes on where it was when started again, without the network once model and tokens are there. On a GPU of
# 40 GB: at batch 1 in bf16 13 GB of activations, 2.8 of weights, 5.7 of float master weights, 5.7 of gradients, 4.1 of
# optimizer states in 8 bits (the embeddings' in fp32). Disk: about 55 GB. Of these a checkpoint is 9.8, and two are
# kept while a third is written, of the training at 2,048 one; the Pile's files and their tokens are 2.1, and the model
# as downloaded, at the start and exported 11.5. The essay that this follows took 512 sequences a step, with 8-bit Lion
# at lr 1e-5; its loss at 2k was about 2.1, and at 8k fell from 3.2 to 2.1 in 30 hours.
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
NAME=${NAME:-EleutherAI/pythia-1.4b-deduped}
RUN=${RUN:-runs/long_pythia}
CONTEXT=${CONTEXT:-8192}
TOKENS_PER_STEP=${TOKENS_PER_STEP:-524288}
STEPS=${STEPS:-1000}
LR=${LR:-1e-5}
WARMUP=${WARMUP:-20}
VAL_TOKENS=${VAL_TOKENS:-524288}
SHORT=${SHORT:-2048}
ROPE=${ROPE:-none}

COMPARE=${COMPARE:-1}

begin "$NAME" train_pythia
prepare_model "$NAME"
prepare_tokens --tokenizer "$TOKENIZER"

title "before: the trained window, and the long one on the same tokens"
measure "before, at $SHORT" "$WEIGHTS" "$SHORT"
measure "before, at $CONTEXT" "$WEIGHTS" "$CONTEXT" --rope "$ROPE"

if [[ $COMPARE != 0 ]]; then
    title "training at $SHORT tokens, to compare with"
    RUN=${RUN}_$SHORT CONTEXT=$SHORT train --state int8 --save-every 50 --keep 1 --sample-every 0
    measure "trained at $SHORT, at $SHORT" "${RUN}_$SHORT" "$SHORT"
    measure "trained at $SHORT, at $CONTEXT" "${RUN}_$SHORT" "$CONTEXT" --rope "$ROPE"
fi

title "training at $CONTEXT tokens"
train --rope "$ROPE" --state int8 --save-every 50 --sample-every 250

title "after: the long window, and the trained one on the same tokens"
measure "trained at $CONTEXT, at $CONTEXT" "$RUN" "$CONTEXT"
measure "trained at $CONTEXT, at $SHORT" "$RUN" "$SHORT"

table
export_run "$RUN"
