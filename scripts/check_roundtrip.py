#!/usr/bin/env python3
"""HuggingFace -> weights file -> training beyond the trained window -> HuggingFace, and the logits that transformers
then computes beside the trainer's: every way of growing GPT-2's positions, every rotary mode, both residual forms.

    VENV/bin/python scripts/check_roundtrip.py [--build build/cpu] [--keep DIR]

VENV holds dev/requirements-golden.txt; `make cpu` comes first. Small random fp16 models, trained window 128, thirty
steps at 512 tokens. Exits 1 if anything is off (scripts/check_hf.py says what). No test runs it.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import golden_packages  # noqa: F401
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
V, SHORT, LONG = 256, 128, 512


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=SHORT, n_embd=128, n_layer=3, n_head=4)
    )


def neox(parallel):
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=V, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024,
            max_position_embeddings=SHORT, use_parallel_residual=parallel, tie_word_embeddings=False,
        )
    )


MODELS = {"gpt2": gpt2, "parallel": lambda: neox(True), "sequential": lambda: neox(False)}
CASES = [
    *(("gpt2", "train_gpt2", ["--positions", how]) for how in ("tile", "tied", "interpolate", "fresh")),
    *(("parallel", "train_pythia", ["--rope", mode]) for mode in ("none", "linear", "ntk", "dynamic", "yarn")),
    ("sequential", "train_pythia", ["--rope", "yarn", "--gelu", "tanh"]),
]


def run(*command):
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]}\nfailed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def check(folder, build):
    torch.manual_seed(3)
    for name, make in MODELS.items():
        make().to(torch.float16).save_pretrained(folder / f"hf_{name}")
        run(sys.executable, "scripts/convert_hf.py", folder / f"hf_{name}", "--to", folder / f"{name}.bin")
    run(sys.executable, "dev/markov_shard.py", folder / "train.bin", "--tokens", 100_000)
    tokens = ",".join(str((7 * i * i + 3 * i) % V) for i in range(LONG))
    failed = 0
    for number, (model, program, options) in enumerate(CASES):
        trainer, made = ROOT / build / program, folder / f"run_{number}"
        run(trainer, "--init", folder / f"{model}.bin", "--train", folder / "train.bin", "--context", LONG, "--steps",
            30, "--lr", 1e-3, "--val-every", 0, "--sample-every", 0, "--out", made, *options)
        run(sys.executable, "scripts/convert_hf.py", made, "--back", folder / f"back_{number}")
        logits = folder / f"logits_{number}.txt"
        logits.write_text(run(trainer, "--init", made, "--eval", "logits", "--prompt-tokens", tokens))
        print(f"{model} {' '.join(options)}", flush=True)
        failed += subprocess.run([sys.executable, ROOT / "scripts/check_hf.py", folder / f"back_{number}", "--tokens",
                                  tokens, "--logits", logits]).returncode != 0
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/cpu", help="whose trainers (%(default)s)")
    parser.add_argument(
        "--keep", type=pathlib.Path, metavar="DIR", help="work there, and leave it (a temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longhand_check_") as scratch:
        folder = args.keep or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        failed = check(folder.resolve(), args.build)
    print(f"{len(CASES) - failed} of {len(CASES)} agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
