#!/usr/bin/env python3
"""Corpora → token shards and a tokenizer, in llm.c's formats (FORMATS.md), in constant memory."""

import argparse
import errno
import os
import queue
import re
import signal
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Iterable, Iterator, Optional

import numpy as np

import recipes
import vocabulary
from common import EOT_TEXT, MAX_VOCAB, InputError, RunError
from corpus import PIECE, Corpus, Split, find_sources, survey
from shards import LONGEST_SHARD, SIDES, Output, ShardWriter, verify

Batch = list[tuple[int, bool, str]]  # (side, starts a document, text)
DEFAULT_VAL = 0.05
LONGEST_WORD = 512  # characters
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def say(line: str):
    print(line, flush=True)


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


class Encoder:
    """A batch of pieces → the tokens of each side. Every document is preceded by the end-of-text token."""

    def __init__(self, text: Optional[str], eot_text: str):
        """`text` is a tokenizer.json; None means raw bytes."""
        self.vocab = vocabulary.Vocabulary(text, "tokenizer", eot_text) if text else vocabulary.RawBytes()
        self.encode = self.vocab.encode if text else vocabulary.encode_raw

    def __call__(self, batch: Batch) -> list[np.ndarray]:
        sides: list[list[np.ndarray]] = [[np.empty(0, np.uint16)] for _ in SIDES]
        for (side, starts, _), ids in zip(batch, self.encode([text for _, _, text in batch])):
            if starts:
                sides[side].append(np.array([self.vocab.eot], np.uint16))
            sides[side].append(np.asarray(ids, np.uint16))
        return [np.concatenate(parts) for parts in sides]


def work(pipe: Connection, text: Optional[str], eot_text: str):
    """A worker process: batches in, their tokens out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    received: queue.SimpleQueue = queue.SimpleQueue()

    def receive():
        # Takes the next batch while this one is encoded: parent and worker never wait to send to each other.
        while True:
            try:
                received.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    encoder = Encoder(text, eot_text)
    while True:
        try:
            pipe.send(encoder(received.get()))
        except OSError:
            os._exit(1)


class Workers:
    """Processes with a pipe each, served in turn. An executor of the library would do, but on Python 3.10 it can hang
    for ever when a worker is killed."""

    def __init__(self, count: int, text: Optional[str], eot_text: str):
        context = get_context("spawn")  # a fork of a process whose tokenizer has started threads can hang
        self.pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, text, eot_text), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)

    def encode(self, batches: Iterable[Batch]) -> Iterator[list[np.ndarray]]:
        """The tokens of the batches in their order; at most two batches a worker are under way."""
        count, sent, taken = len(self.pipes), 0, 0
        try:
            for batch in batches:
                self.pipes[sent % count].send(batch)
                sent += 1
                if sent - taken == 2 * count:
                    yield self.pipes[taken % count].recv()
                    taken += 1
            while taken < sent:
                yield self.pipes[taken % count].recv()
                taken += 1
        except (EOFError, ConnectionError) as error:
            raise RunError("a worker was killed, most likely for want of memory; try fewer --workers") from error
        finally:
            for pipe in self.pipes:
                pipe.close()


def batches(pieces: Iterable[tuple[int, bool, str]]) -> Iterator[Batch]:
    """Groups pieces to about PIECE characters. The grouping depends on the text alone, so the output is the same for
    any number of workers."""
    batch: Batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[2])
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, both on stderr."""

    def __init__(self, total: int):
        self.total, self.start, self.last, self.bar = total, time.monotonic(), time.monotonic(), None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="prepare", leave=False)

    def __call__(self, position: int, tokens: int):
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            self.bar.update(position - self.bar.n)
        elif now - self.last >= 10:
            self.last = now
            print(
                f"prepare: {position / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, {tokens:,} tokens, "
                f"{position / 1e6 / (now - self.start):.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self):
        if self.bar is not None:
            self.bar.close()


def tokenize(corpus: Corpus, split: Split, encoder: Encoder, workers: int, writers: list[ShardWriter]) -> list[int]:
    """Streams the corpus through the workers into the writers; returns the documents of each side."""
    documents = [0 for _ in SIDES]

    def counted_batches() -> Iterator[Batch]:
        for batch in batches(split.of(corpus.pieces())):
            for side, starts, _ in batch:
                documents[side] += starts
            yield batch

    if workers > 1 and encoder.encode is not vocabulary.encode_raw and corpus.total > PIECE:
        encoded = Workers(workers, encoder.vocab.text, encoder.vocab.eot_text).encode(counted_batches())
    else:
        encoded = map(encoder, counted_batches())
    progress = Progress(corpus.total)
    try:
        for sides in encoded:
            for writer, tokens in zip(writers, sides):
                writer.add(tokens)
            progress(corpus.position(), sum(sum(writer.counts) for writer in writers))
    finally:
        progress.close()
    return documents


def sample(pieces: Iterable[tuple[int, bool, str]], most: float, total: int) -> Iterator[str]:
    """Training text of about `most` characters: whole pieces, evenly over a corpus of `total` bytes on disk."""
    seen = taken = 0
    for side, _, text in pieces:
        if side == 0:
            if taken * total <= seen * most:
                taken += len(text)
                yield text
            seen += len(text)
        if taken >= most:  # compressed files hold more text than they have bytes
            return


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """The same, cut within runs of more than LONGEST_WORD characters: training takes the square of a word's length, and
    no token is as long."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def train_tokenizer(corpus: Corpus, split: Split, args) -> vocabulary.Vocabulary:
    most = args.tokenizer_sample * 1e6
    say(f"training a tokenizer of {args.train_tokenizer:,} tokens")
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = bounded(sample(split.of(corpus.pieces()), most, corpus.total))
    trained = vocabulary.train(texts, args.train_tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if trained.size < args.train_tokenizer:
        say(f"the text repeats itself enough for {trained.size:,} tokens only")
    return trained


def check_separator(corpus: Corpus):
    """Refuses a --split-on that a corpus, read to its end, does not have."""
    if corpus.split_on and not corpus.separators:
        raise InputError(
            f"--split-on: {corpus.split_on!r} is nowhere in the text files; leave it out if each file is one document"
        )


def prepare(args) -> None:
    started = time.monotonic()
    output = Output(args.out, args.force)
    if args.recipe:
        recipe = recipes.RECIPES[args.recipe]
        own_tokenizer = not (args.tokenizer or args.train_tokenizer or args.raw_bytes)
        args.inputs, tokenizer = recipes.run(
            args.recipe, os.path.join(args.out, "download"), args.recipe_files, own_tokenizer, say
        )
        args.tokenizer = tokenizer or args.tokenizer
        args.split_on = args.split_on or recipe.split_on
        args.val_fraction = recipe.val_fraction if args.val_fraction is None else args.val_fraction
    fraction = DEFAULT_VAL if args.val_fraction is None else args.val_fraction
    sources, others = find_sources(args.inputs)
    corpus = Corpus(
        sources,
        field=args.field,
        split_on=args.split_on,
        skip_bad=args.skip_bad,
        replace_invalid=args.replace_invalid,
        raw=args.raw_bytes,
    )
    loaded = vocabulary.load(args.tokenizer, args.eot_token) if args.tokenizer else None
    say(
        f"{counted(len(sources), 'file')}, {corpus.total / 1e6:,.1f} MB"
        + (f"; {counted(others, 'file')} of other kinds left alone" if others else "")
    )
    with output:
        split = survey(corpus, fraction)
        if split.lengths is not None:
            check_separator(corpus)
        if args.train_tokenizer:
            loaded = train_tokenizer(corpus, split, args)
        encoder = Encoder(loaded.text if loaded else None, args.eot_token)
        vocab = encoder.vocab
        corpus.encode = None if args.raw_bytes else vocab.encode
        writers = [ShardWriter(output.staging, side, args.shard_tokens) for side in SIDES]
        documents = tokenize(corpus, split, encoder, args.workers, writers)
        totals = [writer.finish() for writer in writers]
        check_separator(corpus)
        if not sum(documents):
            raise InputError(
                f"{', '.join(args.inputs)}: no text in {counted(len(sources), 'file')}"
                + (f" ({counted(corpus.bad, 'bad line')} left out)" if corpus.bad else "")
            )
        for side, total in zip(SIDES, totals):
            if total < args.min_tokens and (side == "train" or fraction > 0):
                raise InputError(
                    f"too little text: {side} would have {total:,} tokens, fewer than --min-tokens "
                    f"{args.min_tokens:,}; give more text"
                    + (", a larger --val-fraction, or none (0)" if side == "val" else "")
                )
        vocab.write(output.staging)
        output.commit(
            {
                "tokenizer": {"from": vocab.name, "tokens": vocab.size, "end_of_text": vocab.eot},
                **{
                    side: {"tokens": total, "documents": count, "shards": len(writer.counts)}
                    for side, total, count, writer in zip(SIDES, totals, documents, writers)
                },
                "validation": {
                    "fraction": fraction,
                    "of": "documents" if split.lengths is None else "each document's tail",
                },
                "left_out": {
                    "empty_documents": corpus.empty,
                    "bad_lines": corpus.bad,
                    "replaced_characters": corpus.replaced,
                },
            }
        )
    for side, total, count, writer in zip(SIDES, totals, documents, writers):
        if total:
            of = ("document",) if split.lengths is None or side == "train" else ("document's tail", "documents' tails")
            say(f"{side}: {counted(total, 'token')} in {counted(len(writer.counts), 'shard')}, {counted(count, *of)}")
    for count, what, done in (
        (corpus.empty, "empty document", "left out"),
        (corpus.bad, "bad line", "left out"),
        (corpus.replaced, "undecodable place", "replaced"),
    ):
        if count:
            say(f"{counted(count, what)} {done}")
    say(f"tokenizer: {vocab.size:,} tokens, end of text {vocab.eot}")
    say(f"{args.out}: ready after {time.monotonic() - started:.1f} s")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def whole(least: int, most: int):
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", "").replace(",", ""))
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least:,} to {most:,}")
        return value

    return parse


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 0.5")
    return value


def unescaped(text: str) -> str:
    return re.sub(r"\\([nrt\\])", lambda escape: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[escape[1]], text)


def size_mb(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in MB above 0")
    return value


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser() -> argparse.ArgumentParser:
    options = OneLineParser(
        prog="prepare.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turns text into token shards (train_000000.bin …, val_000000.bin …) and their tokenizer "
        "(tokenizer.bin, tokenizer.json), in llm.c's formats.",
        epilog="recipes:\n"
        + "\n".join(f"  {name:16} {recipe.about}" for name, recipe in recipes.RECIPES.items())
        + "\n\nexit codes: 0 done, 1 the run failed, 2 bad options or input; nothing is left half-written.",
    )
    options.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text files, JSON lines (.jsonl), both also as .gz, .zst, .bz2 or .xz, .parquet, or directories of such",
    )
    options.add_argument("--out", metavar="DIR", help="folder to write to")
    options.add_argument("--force", action="store_true", help="replace the shards that DIR holds")
    which = options.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer", metavar="FILE", help="a byte-level BPE tokenizer.json (GPT-2, GPT-NeoX, an earlier run's)"
    )
    which.add_argument(
        "--train-tokenizer",
        metavar="V",
        type=whole(257, MAX_VOCAB),
        help="train byte-level BPE of V tokens (257 to 65,536) on the training text",
    )
    which.add_argument("--raw-bytes", action="store_true", help="a token for each byte: 256 and the end of text")
    options.add_argument(
        "--tokenizer-sample",
        metavar="MB",
        type=size_mb,
        default=256.0,
        help="train the tokenizer on about so much text (256), taken evenly from all",
    )
    options.add_argument(
        "--eot-token", metavar="TEXT", default=EOT_TEXT, help=f"the token of FILE that ends a text ({EOT_TEXT})"
    )
    options.add_argument(
        "--field", metavar="NAME", default="text", help="the field of JSON lines and parquet that is the text (text)"
    )
    options.add_argument(
        "--split-on",
        metavar="TEXT",
        type=unescaped,
        default="",
        help="text files: TEXT separates documents, which lose the spaces around them (a file is one document); "
        "\\n, \\r, \\t and \\\\ in it stand for newline, carriage return, tab and backslash",
    )
    options.add_argument(
        "--skip-bad", action="store_true", help="leave out JSON lines that cannot be used, and count them"
    )
    options.add_argument(
        "--replace-invalid", action="store_true", help="text files: bytes that are not UTF-8 become U+FFFD"
    )
    options.add_argument(
        "--val-fraction",
        metavar="F",
        type=share,
        help=f"share of the text for validation ({DEFAULT_VAL}): whole documents if that gives at least two, "
        "else the tail of each document; 0 for none",
    )
    options.add_argument(
        "--shard-tokens",
        metavar="N",
        type=whole(1, LONGEST_SHARD),
        default=100_000_000,
        help="tokens in a shard (100,000,000); the last one has from half to one and a half of it",
    )
    options.add_argument(
        "--min-tokens",
        metavar="N",
        type=whole(1, LONGEST_SHARD),
        default=1025,
        help="refuse to write fewer training or validation tokens (1,025: one window of 1,024)",
    )
    options.add_argument(
        "--workers",
        metavar="N",
        type=whole(1, 4096),
        default=cores(),
        help="processes (all cores); the output does not depend on it",
    )
    options.add_argument(
        "--recipe", metavar="NAME", choices=recipes.RECIPES, help="download and prepare a known corpus, see below"
    )
    options.add_argument(
        "--recipe-files",
        metavar="N",
        type=whole(0, 1 << 31),
        default=-1,
        help="how many of the recipe's files to take, 0 for all (1; pg19: 500)",
    )
    options.add_argument(
        "--verify", metavar="DIR", help="check the shards of DIR against its tokenizer, print their counts, and exit"
    )
    return options


def check(args):
    if args.verify:
        return
    if not args.out:
        raise InputError("--out DIR is missing (--help lists the options)")
    if bool(args.inputs) == bool(args.recipe):
        raise InputError("give either inputs or --recipe (--help lists the options)")
    if not (args.tokenizer or args.train_tokenizer or args.raw_bytes or args.recipe):
        raise InputError("choose a tokenizer: --tokenizer FILE, --train-tokenizer V or --raw-bytes")


def terminate(*_):
    raise KeyboardInterrupt


def main(argv: Optional[list[str]] = None) -> int:
    try:
        args = parser().parse_args(argv)
        check(args)
        if args.verify:
            print("\n".join(verify(args.verify)))
        else:
            prepare(args)
        return 0
    except InputError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 1, "stopped; nothing was written"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code, message = (
            1,
            (
                f"{where}{error.strerror or error}"
                + (f"; nothing was written to {args.out}, free some space and run again" if full else "")
            ),
        )
    print(f"prepare.py: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
