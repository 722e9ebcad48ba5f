#!/usr/bin/env bash
# Everything that only a GPU can tell, on a machine with nvcc and no network. Two visits, each of which can stand alone:
#   --quick  six minutes: losses beside the CPU's, layers against the oracle, a run that repeats, resumes and offloads to
#            the bit, attention and products timed and profiled, speeds of the trainers, 262,144 tied positions
#   --rest   nine minutes: compute-sanitizer, all tests in bf16 and fp32, all benches, PyTorch's compiled step
#   dev/gpu_check.sh [--quick|--rest] DIR [DEPS]     neither: both. DEPS: header-only packages from dev/deps.sh, where
#                                                    apt has not installed them
# Every step has a limit of its own and a line in DIR/table.txt, written when it ends, so that a visit that is cut short
# has shown what it saw; what a step prints is in DIR/STEP.log. Exits 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
visits=(quick rest)
case ${1-} in
--quick | --rest) visits=("${1#--}") && shift ;;
esac
if (($# < 1 || $# > 2)) || [[ $1 == -* ]]; then
    echo "usage: dev/gpu_check.sh [--quick|--rest] DIR [DEPS]" >&2
    exit 2
fi
# BUILD=cpu-bf16 and the like rehearse the steps elsewhere.
build=${BUILD:-cuda}
for tool in nvidia-smi nvcc; do
    command -v $tool >/dev/null || {
        echo "gpu_check.sh: no $tool on PATH: this is for a machine with a GPU and the CUDA toolkit" >&2
        exit 2
    }
done
nvidia-smi -L 2>/dev/null | grep -q . || {
    echo "gpu_check.sh: nvidia-smi finds no GPU here" >&2
    exit 2
}
mkdir -p "$1" && dir=$(cd "$1" && pwd) || exit 2
export DEPS=
if [[ ${2-} ]]; then
    DEPS=$(cd "$2" && pwd) || exit 2
fi
table=$dir/table.txt
: >"$table"

say() { printf '%-44s %s\n' "$1" "$2" | tee -a "$table"; }
# step NAME SECONDS COMMAND...: its output goes to DIR/NAME.log; one line of the table says how it went.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    timeout -k 5 "$limit" "$@" >"$dir/$name.log" 2>&1 </dev/null || code=$?
    if ((code)); then
        say "$name" "FAILED (exit $code) after $((SECONDS - start)) s: $(grep -v '^$' "$dir/$name.log" | tail -1 | cut -c1-120)"
        return 1
    fi
    say "$name" "ok, $((SECONDS - start)) s"
}
# few NUMBER: waits until fewer than so many steps run in the background.
few() {
    while (($(jobs -rp | wc -l) >= $1)); do wait -n; done
}
# run NAME SECONDS PROGRAM ARGUMENTS...: a run of a trainer, in DIR/NAME.
run() {
    local name=$1 limit=$2 program=$3
    shift 3
    step "$name" "$limit" "build/$build/$program" --train "$dir/train.bin" --out "$dir/$name" --val-every 0 --sample-every 0 "$@"
}
# last NAME FIELDS: of the last step that DIR/NAME logged.
last() { grep -s '"event":"step"' "$dir/$1/log.jsonl" | tail -1 | grep -oE "\"($2)\":[0-9.e+-]*" | tr '\n' ' '; }
# same NAME A B: whether two checkpoints hold the same bits.
same() {
    step "$1" 20 bash -c 'for file in model.bin optimizer.bin; do cmp "$1/$file" "$2/$file" || exit 1; done' - "$dir/$2" "$dir/$3"
}
# fresh NAMES: removes these runs' folders, of an earlier visit.
fresh() {
    local name
    for name in "$@"; do rm -rf "${dir:?}/$name"; done
}
profile() { # profile NAME SECONDS ARGUMENTS... of ncu
    local name=$1 limit=$2
    shift 2
    if command -v ncu >/dev/null; then
        step "$name" "$limit" ncu --clock-control none "$@"
    else
        say "$name" "skipped: no ncu"
    fi
}
torch() { # torch SECONDS ARGUMENTS... of gpu_torch.py
    local limit=$1
    shift
    if python3 -c 'import torch' 2>/dev/null; then
        step "torch-$1" "$limit" python3 dev/bench/gpu_torch.py "$@"
    else
        say "torch-$1" "skipped: no PyTorch"
    fi
}

quick() {
    local essential=(device gelu layernorm matmul attention classifier embedding rotary optimizer_bf16 gpt2 pythia positions
        host_store recording) name
    step build 170 make -k -j"$(nproc)" "build/$build/train_gpt2" "build/$build/train_pythia" \
        "${essential[@]/#/build/$build/test_}" "build/$build/test_ranks_comm" "build/$build/bench_attention" \
        "build/$build/bench_matmul"

    # The CPU build's losses on the same tokens (build/cpu/train_gpt2 with these arguments wrote dev/cpu_losses.json).
    fresh losses repeat-a repeat-b resumed offloaded learns long pythia tied-before tied
    run losses 60 train_gpt2 --model 124M --context 64 --batch 4 --steps 20 --lr 3e-4 --warmup 5 --seed 1 --save-every 0
    step losses-beside-cpu 10 python3 dev/compare_losses.py dev/cpu_losses.json "$dir/losses/log.jsonl" --bound 0.02 &&
        say "  largest relative difference" "$(cat "$dir/losses-beside-cpu.log")"
    for name in "${essential[@]}"; do
        few 4
        step "test-$name" 60 "build/$build/test_$name" --test-suite-exclude=long &
    done
    few 1
    # One rank through NCCL, which PyTorch may have brought along.
    local nccl
    nccl=$(python3 -c 'import nvidia.nccl as n; print(list(n.__path__)[0] + "/lib")' 2>/dev/null || true)
    step nccl 60 env RANKS_WITH_LIBRARY=1 LD_LIBRARY_PATH="$nccl:${LD_LIBRARY_PATH-}" "build/$build/test_ranks_comm"

    local words=(--model 4,768,12 --context 2048 --batch 4 --schedule constant --warmup 0 --lr 3e-4 --save-every 5 --keep 9)
    run repeat-a 60 train_gpt2 "${words[@]}" --steps 10
    run repeat-b 60 train_gpt2 "${words[@]}" --steps 10
    same repeats-to-the-bit repeat-a/step_00000010 repeat-b/step_00000010
    if [[ -d $dir/repeat-b/step_00000005 ]]; then
        rm -rf "$dir/repeat-b/step_00000010"
        step resume 60 "build/$build/train_gpt2" --resume --out "$dir/repeat-b"
        same resumes-to-the-bit repeat-a/step_00000010 repeat-b/step_00000010
    fi
    run offloaded 60 train_gpt2 "${words[@]}" --steps 10 --offload state,master
    same offloads-to-the-bit repeat-a/step_00000010 offloaded/step_00000010
    step plan 20 "build/$build/train_gpt2" "${words[@]}" --steps 10 --train "$dir/train.bin" --out "$dir/planned" --plan-json &&
        say "  ms a step, by the plan" "$(python3 -c 'import json, sys; print(round(json.load(open(sys.argv[1]))["time"]["step"] * 1e3, 1))' "$dir/plan.log")"
    say "  ms a step" "$(last repeat-a ms)  offloaded: $(last offloaded ms)"

    step bench-attention 60 "build/$build/bench_attention" quick
    torch 60 quick
    local sections=(SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats Occupancy LaunchStats)
    profile profile-attention 60 "${sections[@]/#/--section=}" --kernel-name 'regex:^(forward|dk_dv|dq)_kernel' \
        "build/$build/bench_attention" once
    profile profile-wavefronts 40 --metrics l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,sm__inst_executed_pipe_tensor.sum \
        --kernel-name 'regex:^(forward|dk_dv|dq)_kernel' "build/$build/bench_attention" once
    step bench-logits 40 "build/$build/bench_matmul" logits
    profile profile-logits 30 --section LaunchStats --launch-count 60 "build/$build/bench_matmul" logits

    run learns 60 train_gpt2 --model 124M --context 1024 --batch 32 --steps 40 --lr 6e-4 --warmup 10 --save-every 0
    say "  first and last loss" "$(sed -n 's/.*"event":"step".*"loss":\([0-9.e+-]*\).*/\1/p' "$dir/learns/log.jsonl" | sed -n '1p;$p' | tr '\n' ' ')"
    run long 60 train_gpt2 --model 124M --context 8192 --batch 4 --steps 8 --lr 6e-4 --save-every 0
    run pythia 60 train_pythia --model 410m --context 8192 --batch 1 --steps 8 --lr 3e-4 --state int8 --grad bf16 --save-every 0
    for name in learns long pythia; do say "  $name" "$(last $name 'ms|tokens_per_second|peak_percent')"; done

    # One step at 262,144 positions of a table of 1,024: whether all that was uploaded and summed came through.
    words=(--model 124M --positions tied --context 262144 --state int8)
    run tied-before 40 train_gpt2 "${words[@]}" --steps 0
    run tied 120 train_gpt2 "${words[@]}" --steps 1 --warmup 0 --lr 1e-3
    step tied-moved 40 python3 dev/check_moved.py "$dir/tied-before/step_00000000/model.bin" "$dir/tied/step_00000001/model.bin"
    say "  tied" "$(last tied 'loss|grad_norm|ms|tokens_per_second|peak_percent')"
}

rest() {
    local tests=(gelu layernorm rotary matmul attention attention_backends attention_huge classifier embedding accumulate
        global_norm optimizer optimizer_bf16 optimizer_codes device recording host_store host_update target gpt2 pythia
        positions)
    local benches=(gelu layernorm rotary classifier embedding accumulate global_norm optimizer update matmul attention ladder)
    local name tool which
    step build-all 240 make -k -j"$(nproc)" "${tests[@]/#/build/$build/test_}" "${benches[@]/#/build/$build/bench_}"
    # A few cases only: the tools slow kernels down a hundredfold. On some machines they cannot run at all.
    local -A sanitized=([layernorm]='backward: complex*,residual*' [attention]='documents*,offsets*,sums in any*'
        [classifier]='loss and gradient*' [embedding]='backward: complex*,backward: tokens*' [optimizer]='several*,bf16*'
        [optimizer_codes]='what is coded*,each array*' [matmul]='backward to weight*' [rotary]='numbers of pairs*,positions*')
    if ! command -v compute-sanitizer >/dev/null; then
        say compute-sanitizer "skipped: not installed"
    elif step sanitizer-probe 40 compute-sanitizer --error-exitcode 9 "build/$build/test_gelu" --test-suite-exclude=long; then
        for tool in memcheck racecheck; do
            for name in "${!sanitized[@]}"; do
                step "$tool-$name" 30 compute-sanitizer --tool $tool --error-exitcode 9 \
                    "build/$build/test_$name" --test-case="${sanitized[$name]}"
            done
        done
    fi
    # The other precision is compiled beside the tests.
    local fp32=$build-fp32
    [[ $build == cuda ]] || fp32=cpu
    make -k -j"$(nproc)" "${tests[@]/#/build/$fp32/test_}" >"$dir/build-fp32.log" 2>&1 &
    local compiling=$!
    for which in $build $fp32; do
        [[ $which == "$fp32" ]] && wait $compiling
        for name in "${tests[@]}"; do
            step "test-$which-$name" 40 "build/$which/test_$name" --test-suite-exclude=long
        done
    done
    for name in "${benches[@]}"; do step "bench-$name" 40 "build/$build/bench_$name"; done
    torch 60 bytes
    torch 100 attention
    torch 100 step
}

{
    date -u
    nvidia-smi
    nvcc --version
    git log -1 --format=%H
} >"$dir/machine.log" 2>&1
say GPU "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active --format=csv -lms 500 \
    >"$dir/clocks.csv" 2>&1 &
sampler=$!
disown $sampler # no step
trap 'kill $sampler $(jobs -p) 2>/dev/null' EXIT
step shard 30 python3 dev/markov_shard.py "$dir/train.bin" --tokens 2000000
for visit in "${visits[@]}"; do
    start=$SECONDS
    $visit
    say "--$visit" "$((SECONDS - start)) s"
done
rm -rf "$dir"/*/step_*

for name in bench-attention torch-quick torch-attention bench-logits torch-bytes torch-step; do
    [[ -s $dir/$name.log ]] && printf '\n%s\n' "$name:" && cat "$dir/$name.log"
done
failed=$(grep -c 'FAILED' "$table")
printf '\n' && cat "$table" && echo "$failed failed"
((failed == 0))
