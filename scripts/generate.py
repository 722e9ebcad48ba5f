#!/usr/bin/env python3
"""Continues a text with a trained model: encodes the prompt, lets the trainer sample, prints what it says.

scripts/generate.py demo/run "In the beginning" --tokens 200 --temperature 0.8
"""

import argparse
import glob
import os
import struct
import subprocess
import sys
from typing import Optional

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENIZER_MAGIC = 20240328
TRAINERS = {20240326: "train_gpt2", 20261124: "train_pythia"}  # by the magic of the weights


class Refused(Exception):
    """One line for the user; exit code 2."""


def recorded_tokenizer(run: str) -> str:
    """The tokenizer binary that the run's options name."""
    options = os.path.join(run, "options.toml")
    try:
        with open(options, "rb") as file:
            named = tomllib.load(file).get("tokenizer")
    except OSError as error:
        raise Refused(
            f"{options}: cannot be read ({error.strerror}); name the tokenizer with --tokenizer FILE.bin"
        ) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise Refused(f"{options}: not TOML ({error}); name the tokenizer with --tokenizer FILE.bin") from error
    if not named or not isinstance(named, str):
        raise Refused(f"{options}: the run was trained without --tokenizer; name it with --tokenizer FILE.bin")
    # The path was written relative to where training was started: here, or the root of this checkout.
    tried = [os.path.join(base, named) for base in ("", HOUSE, run)]
    for path in tried:
        if os.path.isfile(path):
            return path
    raise Refused(f"{options} names the tokenizer {named}, which is not there; name it with --tokenizer FILE.bin")


def trainer_of(run: str) -> str:
    """The program for the weights of a run, a checkpoint or a weights file."""
    pattern = os.path.join(glob.escape(run), "**", "model.bin")
    files = [run] if os.path.isfile(run) else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise Refused(f"{run}: no checkpoint in this folder")
    try:
        with open(files[-1], "rb") as file:
            magic = int.from_bytes(file.read(4), "little")
    except OSError as error:
        raise Refused(f"{files[-1]}: cannot be read ({error.strerror})") from error
    if magic not in TRAINERS:
        raise Refused(f"{files[-1]}: not a weights file (data/FORMATS.md)")
    return os.path.join(HOUSE, TRAINERS[magic])


def vocabulary_size(path: str) -> int:
    """The tokens of a tokenizer binary."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from error
    magic, version, size, _ = struct.unpack("<4i", head) if len(head) == 16 else (0, 0, 0, 0)
    if magic != TOKENIZER_MAGIC or version not in (1, 2, 3):
        raise Refused(f"{path}: not a tokenizer binary (data/FORMATS.md)")
    return size


def encode(text: str, binary: str) -> list[int]:
    """The prompt's tokens, by the tokenizer.json beside the binary."""
    size = vocabulary_size(binary)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Refused(
            "the Python package tokenizers is missing; install it with: pip install -r requirements.txt"
        ) from error
    stem = os.path.splitext(binary)[0] + ".json"
    if not os.path.isfile(stem):
        raise Refused(f"{stem}: no such file; encoding needs the tokenizer.json that belongs to {binary}")
    try:
        encoder = Tokenizer.from_file(stem)
    except Exception as error:  # the library raises plain Exception
        raise Refused(f"{stem}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
    known = max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if known != size:
        raise Refused(f"{stem} has {known:,} tokens and {binary} {size:,}: they do not belong together")
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # as in data/prepare.py: <|endoftext|> in a text is only characters
    return encoder.encode(text, add_special_tokens=False).ids


def generate(args) -> int:
    if not os.path.exists(args.run):
        raise Refused(f"{args.run}: no such run folder or weights file")
    if not os.path.isdir(args.run) and not args.tokenizer:
        raise Refused(f"{args.run}: is a weights file, which names no tokenizer; add --tokenizer FILE.bin")
    tokenizer = args.tokenizer or recorded_tokenizer(args.run)
    trainer = args.trainer or trainer_of(args.run)
    command = [trainer, "--eval", "sample", "--init", args.run, "--tokenizer", tokenizer]
    if args.text:  # without a prompt the trainer begins a text
        try:
            args.text.encode()
        except UnicodeError as error:
            raise Refused("the prompt is not valid UTF-8") from error
        command += ["--prompt-tokens", ",".join(map(str, encode(args.text, tokenizer)))]
    command += ["--sample-tokens", str(args.tokens)]
    for option, value in (("--temperature", args.temperature), ("--top-k", args.top_k), ("--seed", args.seed)):
        if value is not None:
            command += [option, str(value)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise Refused(f"{trainer}: no such program; build it with make, or name it with --trainer") from error
    except OSError as error:  # not executable, or a prompt longer than a command line
        raise Refused(f"{trainer}: cannot be started ({error.strerror})") from error
    if done.returncode:  # its header and progress are noise, but the reason it failed is not
        sys.stderr.write(done.stderr.decode(errors="replace"))
        return done.returncode if done.returncode > 0 else 128 - done.returncode
    return 0


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message} (--help lists the options)")


def main(argv: Optional[list[str]] = None) -> int:
    parser = OneLineParser(
        prog="generate.py",
        description="Continues a text with a trained model.",
        epilog="What is not said here, the trainer chooses (see its --help).",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or a weights file together with --tokenizer")
    parser.add_argument(
        "text", metavar="TEXT", nargs="?", default="", help="the prompt; without it the model begins a text"
    )
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens to add (256)")
    parser.add_argument("--temperature", type=float, metavar="X", help="below 1 is tamer, above wilder")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.bin, its tokenizer.json beside it (what the run names)"
    )
    parser.add_argument(
        "--trainer", metavar="PATH", help="the trainer (./train_gpt2 or ./train_pythia, as the weights ask for)"
    )
    try:
        return generate(parser.parse_args(argv))
    except Refused as refused:
        print(f"generate.py: error: {' '.join(str(refused).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
