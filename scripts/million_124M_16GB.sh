#!/usr/bin/env bash
# GPT-2 124M at 262,144 tokens on one GPU of 16 GB, and at 1,048,576 with layer inputs in the host's memory.
#
#     DRY=1 scripts/million_124M_16GB.sh   # says what it would do, and what memory each stage takes
#     scripts/million_124M_16GB.sh         # downloads GPT-2 and 2,000 books (0.8 GB), trains by stages, exports
#     CONTEXT=1048576 HOST_MEMORY=32GiB scripts/million_124M_16GB.sh
#     STAGES="8192:100 65536:20" TEXT=books/ scripts/million_124M_16GB.sh
#
# Before anything is downloaded it prints the memory of its longest stage, and ends with exit code 3 if that does not
# fit. Stopped, it goes on where it was when started again. Position t looks up row t mod 1,024 of GPT-2's table
# (--positions tied): a table of a million rows would be 0.8 billion parameters. Of 16 GB a card shows a little less,
# hence MEMORY. By the plan a step of 262,144 tokens takes an L4 100 seconds and one of 1,048,576 25 minutes,
# nearly all of it attention. Disk: about 8 GB, 12 for a million tokens.
# shellcheck source=scripts/stages.sh
. "$(dirname "$0")/stages.sh"
RUN=${RUN:-runs/million_124M}
CONTEXT=${CONTEXT:-262144}
MEMORY=${MEMORY:-15GiB}
HOST_MEMORY=${HOST_MEMORY:-}
GPU=${GPU:-l4}
SIZE=${SIZE:-124M}
SHORT=${SHORT:-1024}
POSITIONS=(--positions tied)
TYPES=(--state "${STATE:-int8}" --master "${MASTER:-fp32}" --grad "${GRAD:-fp32}")

run_stages openai-community/gpt2 train_gpt2
