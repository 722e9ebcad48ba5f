#!/usr/bin/env python3
"""Continues a text with a trained model: encodes the prompt, lets the trainer sample, prints what it says.

scripts/generate.py demo/run "In the beginning" --tokens 200 --temperature 0.8
scripts/generate.py demo/run -f chapter.txt
some_program | scripts/generate.py demo/run -
"""

import argparse
import glob
import os
import struct
import subprocess
import sys
import tempfile
import time
from typing import Optional

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENIZER_MAGIC = 20240328
ATTEMPTS, WAIT = 3, 0.2  # at reading a folder that a trainer saves to; seconds between
TRAINERS = {20240326: "train_gpt2", 20261124: "train_pythia"}  # by the magic of the weights


class Refused(Exception):
    """One line for the user; exit code 2."""


def recorded_tokenizer(run: str) -> str:
    """The tokenizer binary that the run's options name."""
    options = os.path.join(run, "options.toml")
    if not os.path.isfile(options):  # a pipe of that name would be waited for, here and below
        raise Refused(f"{options}: no such file; name the tokenizer with --tokenizer FILE.bin")
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


def newest_weights(run: str) -> str:
    """The last weights file of a run's folder, or the file itself."""
    pattern = os.path.join(glob.escape(run), "**", "model.bin")
    there = [run] if os.path.isfile(run) else glob.glob(pattern, recursive=True)
    files = sorted(path for path in there if os.path.isfile(path))
    if not files:
        raise Refused(f"{run}: no checkpoint in this folder")
    return files[-1]


def trainer_of(run: str) -> str:
    """The program for the weights of a run, a checkpoint or a weights file."""
    for attempt in range(ATTEMPTS):
        path = newest_weights(run)
        try:
            with open(path, "rb") as file:
                magic = int.from_bytes(file.read(4), "little")
            break
        except FileNotFoundError as error:  # a trainer that saves here has removed it: there is a newer one
            if attempt == ATTEMPTS - 1:
                raise Refused(f"{path}: was removed while it was read; start again") from error
            time.sleep(WAIT)
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror})") from error
    if magic not in TRAINERS:
        raise Refused(f"{path}: not a weights file (data/FORMATS.md)")
    return os.path.join(HOUSE, TRAINERS[magic])


def vocabulary_size(path: str) -> int:
    """The tokens of a tokenizer binary."""
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such file")
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


def prompt_of(args) -> str:
    """The text to go on from, as it is, the newline at a file's end included."""
    if args.file and args.text:
        raise Refused(f"a prompt in words and --file {args.file} are both given: leave one out")
    name = args.file or ("-" if args.text == "-" else "")
    try:
        if name == "-":
            return sys.stdin.buffer.read().decode()
        if name:
            with open(name, "rb") as file:
                return file.read().decode()
        args.text.encode()
    except OSError as error:
        raise Refused(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        where = {"": "the prompt", "-": "standard input"}.get(name, name)
        raise Refused(f"{where} is not valid UTF-8 ({error.reason} at {error.start:,})") from error
    return args.text


def complain(why: str):
    print(f"generate.py: error: {' '.join(why.split())}", file=sys.stderr)


def sample(command: list[str]) -> int:
    """Runs the trainer. Of what it says on stderr only a warning about the prompt is of interest, and why it failed."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise Refused(f"{command[0]}: no such program; build it with make, or name it with --trainer") from error
    except OSError as error:
        raise Refused(f"{command[0]}: cannot be started ({error.strerror})") from error
    said = done.stderr.decode(errors="replace").splitlines()
    if done.returncode:
        why = " ".join(line for line in said if line and not line.startswith("warning: "))
        complain(why or f"{command[0]} failed without a word (exit status {done.returncode})")
        return done.returncode if done.returncode > 0 else 128 - done.returncode
    sys.stderr.writelines(f"{line}\n" for line in said if line.startswith("warning: the prompt"))
    return 0


def generate(args) -> int:
    if not os.path.exists(args.run):
        raise Refused(f"{args.run}: no such run folder or weights file")
    if not os.path.isdir(args.run) and not args.tokenizer:
        raise Refused(f"{args.run}: is a weights file, which names no tokenizer; add --tokenizer FILE.bin")
    tokenizer = args.tokenizer or recorded_tokenizer(args.run)
    trainer = args.trainer or trainer_of(args.run)
    command = [trainer, "--eval", "sample", "--init", args.run, "--tokenizer", tokenizer]
    command += ["--sample-tokens", str(args.tokens)]
    for option, value in (("--temperature", args.temperature), ("--top-k", args.top_k), ("--seed", args.seed)):
        if value is not None:
            command += [option, str(value)]
    prompt = prompt_of(args)
    if not prompt:  # the trainer begins a text
        return sample(command)
    # In a file: a command line holds a few ten thousand tokens.
    with tempfile.NamedTemporaryFile("w", prefix="longhand_prompt_", suffix=".toml") as file:
        file.write(f"prompt-tokens = [{', '.join(map(str, encode(prompt, tokenizer)))}]\n")
        file.flush()
        return sample([*command, "--config", file.name])


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
        "text",
        metavar="TEXT",
        nargs="?",
        default="",
        help="the prompt, - for standard input; without one the model begins a text",
    )
    parser.add_argument("-f", "--file", metavar="FILE", help="the prompt is what FILE holds, UTF-8")
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
        return generate(parser.parse_intermixed_args(argv))
    except Refused as refused:
        complain(str(refused))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
