#!/usr/bin/env bash
# Pythia 1.4b at 131,072 tokens on one GPU of 40 GB, at 524,288 with layer inputs and attention outputs in the host's
# memory, and at 1,048,576 with layer inputs there.
#
#     DRY=1 scripts/million_1.4b_40GB.sh   # says what it would do, and what memory each stage takes
#     scripts/million_1.4b_40GB.sh         # downloads model (2.9 GB) and 2,000 books (0.8), trains by stages, exports
#     CONTEXT=524288 HOST_MEMORY=100GiB scripts/million_1.4b_40GB.sh
#     CONTEXT=1048576 HOST_MEMORY=100GiB scripts/million_1.4b_40GB.sh
#     STAGES="8192:100 65536:20" TEXT=books/ scripts/million_1.4b_40GB.sh
#
# Before anything is downloaded it prints the memory of its longest stage, and ends with exit code 3 if that does not
# fit. Stopped, it goes on where it was when started again. Rotary positions are stretched by YaRN, anew at each stage.
# To fit, optimizer states are in 8 bits, gradients in bf16, and there are no float master weights (STATE, GRAD,
# MASTER). Of 40 GB a card shows a little less, hence MEMORY. By the plan a step of 131,072 tokens takes 48 seconds, one
# of 524,288 twelve minutes and one of 1,048,576 an hour, nearly all of it attention. Disk: 7 GB a checkpoint, of which
# each stage keeps two, and 25 for all else.
# shellcheck source=scripts/stages.sh
. "$(dirname "$0")/stages.sh"
NAME=${NAME:-EleutherAI/pythia-1.4b-deduped}
RUN=${RUN:-runs/million_1.4b_40GB}
CONTEXT=${CONTEXT:-131072}
MEMORY=${MEMORY:-39GiB}
HOST_MEMORY=${HOST_MEMORY:-}
GPU=${GPU:-a100-40}
SIZE=${SIZE:-1.4b}
SHORT=${SHORT:-2048}
POSITIONS=(--rope "${ROPE:-yarn}")
TYPES=(--state "${STATE:-int8}" --master "${MASTER:-none}" --grad "${GRAD:-bf16}")

run_stages "$NAME" train_pythia
