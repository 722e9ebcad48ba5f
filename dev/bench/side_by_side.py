#!/usr/bin/env python3
"""What vs_llmc.sh, vs_torch.py and pythia_torch.py share: one job, its input files, our trainer as a subprocess, and
the ratio lines.

The job is one optimizer step of GPT-2 124M at B=4 T=64 on random weights and tokens (fixed seeds). The programs take
turns, so that a machine that slows down slows them all. Run directly, it measures a built llm.c:

    side_by_side.py --llmc PATH/train_gpt2 [--turns 5] [--threads N] [--build DIR ...]
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
B, T = 4, 64
L, H, C, V, VP, MAX_T = 12, 12, 768, 50257, 50304, 1024
TRAIN_TOKENS = 200 * B * T + 1
# What llm.c's trainer averages for one "val loss" line: five batches, whatever the order.
VAL_TOKENS = 5 * B * T + 1
# The names under which llm.c's train_gpt2.c looks for its files.
WEIGHTS = "gpt2_124M.bin"
TRAIN = "dev/data/tinyshakespeare/tiny_shakespeare_train.bin"
VAL = "dev/data/tinyshakespeare/tiny_shakespeare_val.bin"


def header(*values):
    words = np.zeros(256, np.int32)
    words[: len(values)] = values
    return words


def make_inputs(folder):
    """GPT-2 124M with GPT-2's initial distribution, and two shards of uniformly random tokens."""
    rng = np.random.default_rng(1)

    def normal(f, *shape, std=0.02):
        (rng.standard_normal(shape, np.float32) * np.float32(std)).tofile(f)

    def constant(f, value, *shape):
        np.full(shape, value, np.float32).tofile(f)

    residual = 0.02 / (2 * L) ** 0.5
    with open(folder / WEIGHTS, "wb") as f:
        header(20240326, 3, MAX_T, V, L, H, C, VP).tofile(f)
        normal(f, V, C)
        constant(f, 0, VP - V, C)
        normal(f, MAX_T, C)
        for OC, projection_in in ((3 * C, C), (4 * C, 4 * C)):  # attention, then MLP: gain, bias, in, out
            constant(f, 1, L, C)
            constant(f, 0, L, C)
            normal(f, L, OC, C)
            constant(f, 0, L, OC)
            normal(f, L, C, projection_in, std=residual)
            constant(f, 0, L, C)
        constant(f, 1, C)
        constant(f, 0, C)
    (folder / TRAIN).parent.mkdir(parents=True, exist_ok=True)
    for name, count in ((TRAIN, TRAIN_TOKENS), (VAL, VAL_TOKENS)):
        with open(folder / name, "wb") as f:
            header(20240520, 1, count).tofile(f)
            rng.integers(0, V, count, dtype=np.uint16).tofile(f)


def environment(threads):
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


class Ours:
    """One build of our trainer, e.g. build/cpu-bf16."""

    def __init__(self, build, folder, threads, program="train_gpt2", weights=WEIGHTS, batch=B, context=T):
        self.binary, self.folder, self.threads = ROOT / build / program, folder, threads
        self.precision = precision_of(build)
        self.peak_percents = []  # of the steps so far: FLOPs against this run's measured matmul rate
        self.job = ["--init", folder / weights, "--batch", batch, "--context", context]

    def run(self, *options):
        command = [self.binary, *self.job]
        command = [str(word) for word in (*command, *options)]
        done = subprocess.run(command, env=environment(self.threads), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nfailed with exit code {done.returncode}:\n{done.stderr}")
        return done.stdout

    def val_loss(self):
        said = self.run("--eval", "loss", "--val", self.folder / VAL, "--val-tokens", 0)
        return float(re.search(r"^val_loss (\S+)", said, re.M)[1])

    def turn(self, steps=4):
        """Milliseconds of each step but the first, which also touches every page for the first time."""
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        habits = "--val-every 0 --sample-every 0 --save-every 0 --warmup 0 --schedule constant --lr 1e-4".split()
        self.run("--train", self.folder / TRAIN, "--out", out, "--steps", steps, *habits)
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        steps = [event for event in events if event["event"] == "step"][1:]
        self.peak_percents += [event["peak_percent"] for event in steps]
        return [event["ms"] for event in steps]


class Llmc:
    """llm.c's train_gpt2, which takes no options: it reads fixed names in its working directory and makes 41 steps."""

    def __init__(self, binary, folder, threads):
        self.binary, self.folder, self.threads = binary, folder, threads
        self.val_loss = None

    def turn(self, steps=3):
        """Milliseconds of each step but the first. Stopped after `steps`: at step 20 it would sample for minutes."""
        # stdbuf: into a pipe its lines would otherwise come 4 KiB at a time.
        command = ["stdbuf", "-oL", str(self.binary)]
        times = []
        with subprocess.Popen(
            command, cwd=self.folder, env=environment(self.threads), stdout=subprocess.PIPE, text=True
        ) as program:
            for line in program.stdout:
                if said := re.match(r"val loss (\S+)", line):
                    self.val_loss = float(said[1])
                if said := re.match(r"step (\d+): train loss \S+ \(took (\S+) ms\)", line):
                    times.append(float(said[2]))
                    if len(times) == steps:
                        break
            program.kill()
        if len(times) < steps:
            sys.exit(f"{self.binary} ended after {len(times)} steps; run it in {self.folder} to see why")
        return times[1:]


def take_turns(programs, turns):
    """{name: [milliseconds, ...]}: each program once, then each again."""
    times = {name: [] for name in programs}
    for turn in range(turns):
        for name, program in programs.items():
            times[name] += program.turn()
            print(f"turn {turn + 1}/{turns}: {name} {statistics.median(times[name]):.0f} ms", file=sys.stderr, flush=True)
    return times


def ratio_line(what, other, ours, theirs, threads, turns):
    """Milliseconds of both → 'fp32 step: 4.31x llm.c (...)', by medians; the best of each stands beside it."""
    a, b = statistics.median(ours), statistics.median(theirs)
    best = min(theirs) / min(ours)
    return (
        f"{what}: {b / a:.2f}x {other} (ours {a / 1e3:.3g} s, theirs {b / 1e3:.3g} s, {threads} threads, "
        f"{turns} alternations; best against best {best:.2f}x)"
    )


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="alternations (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for all (%(default)s)")
    parser.add_argument(
        "--build",
        action="append",
        help="a build of ours, as build/cpu; may be said twice; '' measures the others alone (build/cpu, build/cpu-bf16)",
    )
    return parser


def precision_of(build):
    return "bf16" if build.rstrip("/").endswith("bf16") else "fp32"


def build_names(args):
    return ["build/cpu", "build/cpu-bf16"] if args.build is None else [b for b in args.build if b]


def our_builds(args, folder):
    made = [Ours(build, folder, args.threads) for build in build_names(args)]
    for ours in made:
        if not ours.binary.exists():
            sys.exit(f"{ours.binary} is not there: `make cpu` and `make cpu PRECISION=bf16` build both")
    return made


def main():
    parser = arguments(__doc__)
    parser.add_argument("--llmc", type=pathlib.Path, required=True, metavar="PATH", help="llm.c's built train_gpt2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longhand_bench_") as scratch:
        folder = pathlib.Path(scratch)
        builds = our_builds(args, folder)
        make_inputs(folder)
        theirs = Llmc(args.llmc.resolve(), folder, args.threads)
        programs = {**{f"ours {ours.precision}": ours for ours in builds}, "llm.c": theirs}
        times = take_turns(programs, args.turns)
        for ours in builds:
            # bf16 keeps 8 bits: a mean loss near 11 may move in the third digit.
            loss, close = ours.val_loss(), 1e-5 if ours.precision == "fp32" else 5e-3
            print(f"{ours.precision} loss on the same tokens: ours {loss:.6f}, llm.c {theirs.val_loss:.6f}")
            if not abs(loss / theirs.val_loss - 1) < close:
                sys.exit("the losses differ: the two programs do not do the same work, and no ratio is printed")
        for ours in builds:
            mine = times[f"ours {ours.precision}"]
            print(ratio_line(f"{ours.precision} step", "llm.c", mine, times["llm.c"], args.threads, args.turns))
        if not builds:
            print(f"llm.c step: median {statistics.median(times['llm.c']):.0f} ms, best {min(times['llm.c']):.0f} ms")


if __name__ == "__main__":
    main()
