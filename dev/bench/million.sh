#!/usr/bin/env bash
# One optimizer step at 1,048,576 tokens on a CPU: GPT-2 of one layer, one head and width 32, attention run again in the
# backward pass. 1.9e14 FLOPs of attention: from half an hour on two cores of a server. Prints the plan and the step.
#   dev/bench/million.sh [CONTEXT]
set -euo pipefail
cd "$(dirname "$0")/../.."
context=${1:-1048576}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make -s build/cpu/train_gpt2
python3 dev/markov_shard.py "$work/train.bin" --tokens $((context + 1)) >/dev/null
model=(--model 1,32,1 --vocab 256 --positions tied --context "$context" --recompute full --chunk 16384 --offload residual)
build/cpu/train_gpt2 --plan --plan-for cpu "${model[@]}" | grep -E 'total|step, estimated'
build/cpu/train_gpt2 "${model[@]}" --train "$work/train.bin" --out "$work/run" --steps 1 --val-every 0 --sample-every 0 \
    --save-every 0
grep -o '"ms":[0-9.]*\|"tokens_per_second":[0-9.]*\|"peak_percent":[0-9.]*' "$work/run/log.jsonl"
