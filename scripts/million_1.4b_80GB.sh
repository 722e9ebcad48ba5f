#!/usr/bin/env bash
# Pythia 1.4b at 1,048,576 tokens on one GPU of 80 GB, with layer inputs in the host's memory.
#
#     DRY=1 scripts/million_1.4b_80GB.sh   # says what it would do, and what memory each stage takes
#     scripts/million_1.4b_80GB.sh         # downloads model (2.9 GB) and 2,000 books (0.8), trains by stages, exports
#     CONTEXT=2097152 HOST_MEMORY=220GiB CORPUS_FILES=6000 scripts/million_1.4b_80GB.sh
#     CONTEXT=262144 HOST_MEMORY= scripts/million_1.4b_80GB.sh    # on the card alone
#
# All else is as in million_1.4b_40GB.sh. By the plan a step of 1,048,576 tokens takes an H100 33 minutes with kernels
# of sm_80 instructions. Disk: about 55 GB.
# shellcheck source=scripts/stages.sh
. "$(dirname "$0")/stages.sh"
NAME=${NAME:-EleutherAI/pythia-1.4b-deduped}
RUN=${RUN:-runs/million_1.4b_80GB}
CONTEXT=${CONTEXT:-1048576}
MEMORY=${MEMORY:-79GiB}
HOST_MEMORY=${HOST_MEMORY-128GiB}
GPU=${GPU:-h100}
SIZE=${SIZE:-1.4b}
SHORT=${SHORT:-2048}
POSITIONS=(--rope "${ROPE:-yarn}")
TYPES=(--state "${STATE:-int8}" --master "${MASTER:-none}" --grad "${GRAD:-bf16}")

run_stages "$NAME" train_pythia
