#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command under nine minutes, on a machine with nvcc and no network: build
# for its architecture, all CUDA tests against the oracle, compute-sanitizer, benches beside PyTorch's, one run of the
# trainer. Logs and a short table go to DIR; exits 1 if anything failed.
#   dev/gpu_check.sh DIR [DEPS]      DEPS: header-only packages from dev/deps.sh, where apt has not installed them
set -uo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: dev/gpu_check.sh DIR [DEPS]}
deps=${2:-}
for tool in nvidia-smi nvcc; do
    command -v $tool >/dev/null || {
        echo "gpu_check.sh: no $tool on PATH: this is for a machine with a GPU and the CUDA toolkit" >&2
        exit 2
    }
done
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
export DEPS=${deps:+$(cd "$deps" && pwd)}
begin=$SECONDS
table=$dir/table.txt
: >"$table"
failures=0

say() { printf '%-44s %s\n' "$1" "$2" | tee -a "$table"; }
# step NAME SECONDS COMMAND...: its output goes to DIR/NAME.log; one line of the table says how it went.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$dir/$name.log" 2>&1 || code=$?
    if ((code)); then
        failures=$((failures + 1))
        say "$name" "FAILED (exit $code) after $((SECONDS - start)) s: $(grep -v '^$' "$dir/$name.log" | tail -1 | cut -c1-120)"
        return 1
    fi
    say "$name" "ok, $((SECONDS - start)) s"
}

{
    date -u
    nvidia-smi
    nvcc --version
    git log -1 --format=%H 2>/dev/null
} >"$dir/machine.log" 2>&1
say GPU "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"

tests=(gelu layernorm rotary matmul attention attention_backends attention_huge classifier embedding accumulate global_norm
    optimizer optimizer_bf16 optimizer_codes device recording host_store host_update target gpt2 pythia positions)
benches=(gelu layernorm rotary classifier embedding accumulate global_norm optimizer matmul attention ladder)
jobs=$(nproc)
step build 240 make -j"$jobs" cuda "${tests[@]/#/build/cuda/test_}" "${benches[@]/#/build/cuda/bench_}" || exit 1
make -j"$jobs" cuda PRECISION=fp32 "${tests[@]/#/build/cuda-fp32/test_}" >"$dir/build-fp32.log" 2>&1 & # beside the tests

for build in cuda cuda-fp32; do
    [[ $build == cuda-fp32 ]] && wait
    for name in "${tests[@]}"; do
        step "test-$build-$name" 40 build/$build/test_"$name" --test-suite-exclude=long
    done
done

# A few cases only: the tools slow kernels down a hundredfold.
declare -A sanitized=([layernorm]='backward: complex*,residual*' [attention]='documents*,offsets*,sums in any*'
    [classifier]='loss and gradient*' [embedding]='backward: complex*,backward: tokens*' [optimizer]='several*,bf16*'
    [optimizer_codes]='what is coded*,each array*'
    [matmul]='backward to weight*' [rotary]='numbers of pairs*,positions*')
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        for name in "${!sanitized[@]}"; do
            step "$tool-$name" 30 compute-sanitizer --tool $tool --error-exitcode 9 \
                build/cuda/test_"$name" --test-case="${sanitized[$name]}"
        done
    done
else
    say compute-sanitizer "not installed: skipped"
fi

for name in "${benches[@]}"; do
    step "bench-$name" 40 build/cuda/bench_"$name" && cat "$dir/bench-$name.log" >>"$dir/benches.txt"
done

# The trainer: the losses of the CPU build on the same tokens (build/cpu/train_gpt2 with the arguments below wrote
# dev/cpu_losses.json), then its speed.
step shard 30 python3 dev/markov_shard.py "$dir/train.bin" --tokens 2000000
losses() { sed -n 's/.*"event":"step".*"loss":\([0-9.e+-]*\).*/\1/p' "$1/log.jsonl"; }
run() { # run NAME BUILD/TRAINER MODEL ARGUMENTS...
    local name=$1 trainer=$2 model=$3
    shift 3
    rm -rf "${dir:?}/$name"
    step "$name" 90 build/"$trainer" --model "$model" --train "$dir/train.bin" --out "$dir/$name" --save-every 0 \
        --val-every 0 --sample-every 0 "$@"
}
same=(--context 64 --batch 4 --steps 20 --lr 3e-4 --warmup 5 --seed 1)
for build in cuda-fp32 cuda; do
    run "losses-$build" $build/train_gpt2 124M "${same[@]}" &&
        say "  largest relative difference from the CPU" \
            "$(python3 dev/compare_losses.py dev/cpu_losses.json "$dir/losses-$build/log.jsonl")"
done
run learns cuda/train_gpt2 124M --context 1024 --batch 32 --steps 40 --lr 6e-4 --warmup 10 &&
    say "  first and last loss" "$(losses "$dir/learns" | sed -n '1p;$p' | tr '\n' ' ')"
run long cuda/train_gpt2 124M --context 8192 --batch 4 --steps 10 --lr 6e-4
run pythia cuda/train_pythia 410m --context 8192 --batch 1 --steps 10 --lr 3e-4 --state int8 --grad bf16
for name in learns long pythia; do
    [[ -s $dir/$name/log.jsonl ]] &&
        say "  $name" "$(grep '"event":"step"' "$dir/$name/log.jsonl" | tail -1 | grep -o '"ms":[0-9.]*\|"tokens_per_second":[0-9.]*\|"peak_percent":[0-9.]*' | tr '\n' ' ')"
done
rm -rf "$dir"/*/step_*

if python3 -c 'import torch' 2>/dev/null; then
    for part in bytes attention step; do
        step "torch-$part" 100 python3 dev/bench/gpu_torch.py $part
    done
else
    say PyTorch "not installed: skipped"
fi

echo
echo "attention, ours:" && grep -h attention "$dir/bench-attention.log" 2>/dev/null
echo "attention, PyTorch:" && cat "$dir/torch-attention.log" 2>/dev/null
echo "bytes, ours:" && grep -hE "16384x3072|65536x768|8192x50304|124439808" "$dir"/bench-*.log 2>/dev/null
echo "bytes, PyTorch:" && cat "$dir/torch-bytes.log" 2>/dev/null
cat "$dir/torch-step.log" 2>/dev/null
echo
cat "$table"
echo "$failures failed, $((SECONDS - begin)) s"
((failures == 0))
