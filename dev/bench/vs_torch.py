#!/usr/bin/env python3
"""Our trainer and attention against PyTorch eager on the CPU: same job, same threads, taking turns.

    VENV/bin/python dev/bench/vs_torch.py [--turns 5] [--threads N] [--build build/cpu] [--only step|attention]

VENV holds dev/requirements-golden.txt. One line a ratio, for the dtype of each build:
  step: one optimizer step of GPT-2 124M at B=4 T=64. fp32 against fp32; bf16 against autocast (fp32 weights, as our
        master weights are) and against a model that is bf16 throughout.
  attention: causal, forward and backward, B=1 T=8192 D=64, against scaled_dot_product_attention; ours is what
        BUILD/bench_attention prints, for each number of heads that it has.
"""
import contextlib
import functools
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

try:
    import torch
    import transformers

    import side_by_side as job
except ImportError as error:
    print(f"{pathlib.Path(__file__).name}: error: the Python package {error.name} is missing; install what it needs with: "
          "pip install -r dev/requirements-golden.txt", file=sys.stderr)
    sys.exit(2)

ATTENTION_T, ATTENTION_D = 8192, 64


class TorchStep:
    """A HuggingFace model with torch's fused AdamW, the fastest that needs no compiler. tokens() gives (B,T+1)."""

    def __init__(self, model, kind, tokens):
        self.model, self.tokens = model, tokens
        if kind == "pure bf16":
            self.model.to(torch.bfloat16)
        self.autocast = kind == "bf16 autocast"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def loss(self, rows):
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext():
            logits = self.model(rows[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def step(self):
        rows = self.tokens()
        start = time.perf_counter()
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = float(loss.detach())  # waits for the result
        milliseconds = 1e3 * (time.perf_counter() - start)
        if not loss < 12:
            sys.exit(f"PyTorch's loss is {loss}; a fresh model starts near ln V = 10.8")
        return milliseconds

    def turn(self, steps=4):
        return [self.step() for _ in range(steps)][1:]


def gpt2_124m():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def compare_steps(args):
    with tempfile.TemporaryDirectory(prefix="longhand_bench_") as scratch:
        folder = pathlib.Path(scratch)
        builds = job.our_builds(args, folder)
        job.make_inputs(folder)
        kinds = {"fp32": ["fp32"], "bf16": ["bf16 autocast", "pure bf16"]}
        wanted = [ours.precision for ours in builds] or kinds
        lines = []
        for precision in wanted:
            programs = {f"ours {ours.precision}": ours for ours in builds if ours.precision == precision}
            tokens = functools.partial(torch.randint, job.V, (job.B, job.T + 1))
            programs |= {f"PyTorch {kind}": TorchStep(gpt2_124m(), kind, tokens) for kind in kinds[precision]}
            times = job.take_turns(programs, args.turns)
            for kind in kinds[precision]:
                theirs = times[f"PyTorch {kind}"]
                if f"ours {precision}" in times:
                    mine = times[f"ours {precision}"]
                    other = f"PyTorch {kind}"
                    line = job.ratio_line(f"{precision} step", other, mine, theirs, args.threads, args.turns)
                else:
                    line = f"PyTorch {kind} step: median {statistics.median(theirs):.0f} ms, best {min(theirs):.0f} ms"
                lines.append(line)
        print("\n".join(lines))


def our_attention(build, threads):
    """{H: best milliseconds of forward and backward} from the lines of BUILD/bench_attention at T=8192 D=64."""
    binary = job.ROOT / build / "bench_attention"
    if not binary.exists():
        sys.exit(f"{binary} is not there: `make {build}/bench_attention` builds it")
    done = subprocess.run([binary], env=job.environment(threads), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{binary} failed with exit code {done.returncode}:\n{done.stderr}")
    shape = rf"B=1 T={ATTENTION_T} H=(\d+) D={ATTENTION_D}"
    found = {int(H): float(ms) for H, ms in re.findall(rf"^attention both +{shape} +(\S+)", done.stdout, re.M)}
    if not found:
        sys.exit(f"{binary} prints no line 'attention both B=1 T={ATTENTION_T} H=… D={ATTENTION_D}'")
    return found


def torch_attention(H, dtype, calls=3):
    """Best milliseconds of causal scaled_dot_product_attention, forward and backward; q, k, v are (1,H,T,D)."""
    shape = (1, H, ATTENTION_T, ATTENTION_D)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, dtype=dtype)
    times = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), dout)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def compare_attention(args):
    for build in job.build_names(args):
        precision = job.precision_of(build)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        mine, theirs = {}, {}
        for turn in range(args.turns):
            for H, ms in our_attention(build, args.threads).items():
                mine.setdefault(H, []).append(ms)
                theirs.setdefault(H, []).append(torch_attention(H, dtype))
            print(f"turn {turn + 1}/{args.turns} of {precision} attention", file=sys.stderr, flush=True)
        for H in mine:
            what = f"{precision} attention forward+backward T={ATTENTION_T} D={ATTENTION_D} H={H}"
            print(job.ratio_line(what, "PyTorch", mine[H], theirs[H], args.threads, args.turns), flush=True)


def main():
    parser = job.arguments(__doc__)
    parser.add_argument("--only", choices=("step", "attention"))
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads", flush=True)
    if args.only != "attention":
        compare_steps(args)
    if args.only != "step":
        compare_attention(args)


if __name__ == "__main__":
    main()
