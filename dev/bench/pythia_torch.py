#!/usr/bin/env python3
"""One optimizer step of Pythia at long context on the CPU: our trainer and HuggingFace's model in PyTorch eager, taking
turns on the same threads and from the same weights.

    VENV/bin/python dev/bench/pythia_torch.py [--size 70m --size 160m] [--context 2048] [--turns 3] [--build build/cpu]

VENV holds dev/requirements-golden.txt. A line for each size and build: the ratio, and what percent of the matmul rate
of the same run our step reached. The losses on the same tokens are compared first: both must do the same work.
"""
import functools
import pathlib
import statistics
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
    import transformers

    import side_by_side as job
    from vs_torch import TorchStep
except ImportError as error:
    print(f"{pathlib.Path(__file__).name}: error: the Python package {error.name} is missing; install what it needs with: "
          "pip install -r dev/requirements-golden.txt", file=sys.stderr)
    sys.exit(2)

V = 50304


def make_inputs(folder, trainer, size, context):
    """Weights of the trainer's own initialisation, the same as a HuggingFace directory, and random tokens."""
    rng = np.random.default_rng(1)
    for name, count in ((job.TRAIN, 20 * context + 1), (job.VAL, context + 1)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            job.header(20240520, 1, count).tofile(f)
            rng.integers(0, V, count, dtype=np.uint16).tofile(f)
    made = folder / "made"
    convert = job.ROOT / "scripts" / "convert_hf.py"
    commands = [
        [trainer, "--model", size, "--context", context, "--steps", 0, "--out", made],
        [sys.executable, convert, made, "--back", folder / "hf"],
    ]
    for command in commands:
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    (made / "step_00000000" / "model.bin").rename(folder / "pythia.bin")


def compare(args, size, build, folder):
    precision = job.precision_of(build)
    make_inputs(folder, job.ROOT / build / "train_pythia", size, args.context)
    ours = job.Ours(build, folder, args.threads, "train_pythia", "pythia.bin", 1, args.context)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", use_cache=False, dtype=torch.float32)
    tokens = functools.partial(torch.randint, V, (1, args.context + 1))
    theirs = TorchStep(model, "bf16 autocast" if precision == "bf16" else "fp32", tokens)
    rows = np.fromfile(folder / job.VAL, np.uint16, offset=1024).astype(np.int64)
    with torch.no_grad():
        want, got = float(theirs.loss(torch.from_numpy(rows)[None])), ours.val_loss()
    print(f"{size} {precision} loss on the same tokens: ours {got:.6f}, PyTorch {want:.6f}")
    if not abs(got / want - 1) < (1e-5 if precision == "fp32" else 5e-3):
        sys.exit("the losses differ: the two programs do not do the same work, and no ratio is printed")
    times = job.take_turns({"ours": ours, "PyTorch": theirs}, args.turns)
    what = f"Pythia {size} {precision} step at B=1 T={args.context}"
    print(job.ratio_line(what, "PyTorch eager", times["ours"], times["PyTorch"], args.threads, args.turns))
    print(f"{what}: {statistics.median(ours.peak_percents):.0f}% of this run's matmul rate", flush=True)


def main():
    parser = job.arguments(__doc__)
    parser.add_argument("--size", action="append", help="may be said twice (70m and 160m)")
    parser.add_argument("--context", type=int, default=2048, help="tokens (%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads", flush=True)
    for size in args.size or ["70m", "160m"]:
        for build in job.build_names(args):
            with tempfile.TemporaryDirectory(prefix="longhand_bench_") as scratch:
                compare(args, size, build, pathlib.Path(scratch))


if __name__ == "__main__":
    main()
