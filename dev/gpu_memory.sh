#!/usr/bin/env bash
# How far one GPU goes: GPT-2 124M up to 262,144 tokens within 16 GiB and Pythia 1.4b up to 131,072 within 40 GiB, limits that
# the run sets itself, so that any larger GPU will do. Two steps each; a table of planned and measured bytes, tokens a
# second and percent of peak. About six minutes on an H100.
#   dev/gpu_memory.sh DIR [DEPS]      DEPS: as for dev/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: dev/gpu_memory.sh DIR [DEPS]}
mkdir -p "$dir"
export DEPS=${2:+$(cd "$2" && pwd)}
build=${BUILD:-cuda}
make -s -j"$(nproc)" "build/$build/train_gpt2" "build/$build/train_pythia"
python3 dev/markov_shard.py "$dir/train.bin" --tokens 600000 >/dev/null

measure() { # measure PROGRAM CONTEXT MEMORY ARGUMENTS...
    local program=$1 context=$2 memory=$3 run=$dir/$1-$2
    shift 3
    rm -rf "$run"
    if ! "build/$build/$program" "$@" --context "$context" --memory "$memory" --offload none --train "$dir/train.bin" --out "$run" \
        --steps 2 --val-every 0 --sample-every 0 --save-every 0 >"$run.log" 2>&1; then
        printf '%-13s %8s   %s\n' "$program" "$context" "failed: $(tail -1 "$run.log")"
        return
    fi
    rm -rf "$run"/step_*
    python3 - "$program" "$context" "$memory" "$run" <<'PY'
import json, re, sys
program, context, memory, run = sys.argv[1:]
events = [json.loads(line) for line in open(f"{run}/log.jsonl")]
plan = next(e for e in events if e["event"] == "plan")
step = [e for e in events if e["event"] == "step"][-1]
peak = re.search(r"peak memory ([0-9.]+ GiB)", open(f"{run}.log").read()).group(1)
print(f"{program:13} {context:>8}   plan {plan['bytes'] / 2**30:6.2f} of {memory}   measured {peak:>10}   "
      f"{step['tokens_per_second']:9.0f} tokens/s   {step['peak_percent']:5.1f}% of peak   {step['ms'] / 1e3:7.2f} s a step")
PY
}
for context in 8192 32768 131072 262144; do
    measure train_gpt2 $context 16GiB --model 124M --positions tied --state int8
done
for context in 8192 32768 131072; do
    measure train_pythia $context 40GiB --model 1.4b --state int8 --master none --grad bf16
done
