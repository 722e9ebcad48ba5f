#!/usr/bin/env python3
"""A thousand steps of a small GPT-2 and a small Pythia with 8-bit optimizer states beside fp32 ones, several seeds.

    dev/bench/int8_states.py OUT --train 'tokens/train_*.bin' --val 'tokens/val_*.bin' --tokenizer tokens/tokenizer.bin

Prints the final validation losses (over all of --val) and their ratio, writes them to OUT/losses.json and the curves to
OUT/int8_states.png. One run a core, each on one thread.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
STATES = {"fp32": [], "int8": ["--state", "int8"]}


def train(args, trainer, state, seed):
    out = args.out / f"{trainer}_{state}_{seed}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        ROOT / args.build / trainer, "--model", args.model, "--train", args.train, "--val", args.val, "--tokenizer",
        args.tokenizer, "--context", args.context, "--batch", 8, "--steps", args.steps, "--lr", args.lr, "--warmup", 50,
        "--val-every", max(1, args.steps // 10), "--val-tokens", 0, "--sample-every", 0, "--save-every", 0, "--seed", seed,
        "--threads", 1, "--out", out, *STATES[state], *args.options.split(),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}:\n{done.stderr}")
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return [(event["step"], event["loss"]) for event in events if event["event"] == "val"]


def plot(args, curves):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, trainer in zip(axes, ("train_gpt2", "train_pythia")):
        for (name, state, _), points in curves.items():
            if name == trainer:
                axis.plot(*zip(*points), "k-" if state == "fp32" else "r--", linewidth=1)
        axis.set(title=trainer.removeprefix("train_"), xlabel="step")
    axes[0].set_ylabel("validation loss")
    axes[1].plot([], [], "k-", label="fp32 states"), axes[1].plot([], [], "r--", label="int8 states")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(args.out / "int8_states.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, metavar="OUT")
    for name in ("train", "val", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--build", default="build/cpu", help="whose trainers (%(default)s)")
    parser.add_argument("--model", default="2,128,4", help="layers,width,heads (%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of 8 sequences each (%(default)s)")
    parser.add_argument("--lr", default="2e-3", help="(%(default)s)")
    parser.add_argument("--seeds", default="1,2,3", help="(%(default)s)")
    parser.add_argument("--options", default="", help="more options for all runs, in one word")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(trainer, state, seed) for trainer in ("train_gpt2", "train_pythia") for seed in args.seeds.split(",")
            for state in STATES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        curves = dict(zip(runs, pool.map(lambda run: train(args, *run), runs)))
    last = {run: points[-1][1] for run, points in curves.items()}
    table = []
    for trainer in ("train_gpt2", "train_pythia"):
        for seed in args.seeds.split(","):
            fp32, int8 = last[trainer, "fp32", seed], last[trainer, "int8", seed]
            table.append({"trainer": trainer, "seed": seed, "fp32": fp32, "int8": int8, "ratio": int8 / fp32})
            print(f"{trainer} seed {seed}: fp32 {fp32:.4f}, int8 {int8:.4f}, {100 * (int8 / fp32 - 1):+.2f}%")
        mean = statistics.mean(row["ratio"] for row in table if row["trainer"] == trainer)
        print(f"{trainer}: {100 * (mean - 1):+.3f}% over {len(args.seeds.split(','))} seeds")
    (args.out / "losses.json").write_text(json.dumps(table, indent=1) + "\n")
    plot(args, curves)


if __name__ == "__main__":
    main()
