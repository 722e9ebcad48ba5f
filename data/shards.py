"""Token shards on disk: written beside their final names and moved there only when everything is whole."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct

import numpy as np

import dataset
from common import HEADER_BYTES, HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, InputError, open_input
from dataset import SUMMARY
from vocabulary import read_binary

SIDES = ("train", "val")
SHARD_NAME = re.compile(r"(train|val)_(\d{6})\.bin")
STAGING = ".partial"
OWNED = ("tokenizer.bin", "tokenizer.json", SUMMARY)
# The last shard takes up to half a shard more than the others, and the count in the header is an int32.
LONGEST_SHARD = (2**31 - 1) // 3 * 2


def shard_header(count: int) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count
    return header.tobytes()


def sync(path: str):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if SHARD_NAME.fullmatch(name))


class ShardWriter:
    """One side's tokens as side_000000.bin, side_000001.bin, … A document runs on from one shard into the next."""

    def __init__(self, folder: str, side: str, size: int):
        self.folder, self.side, self.size = folder, side, size
        self.counts: list[int] = []  # tokens of each shard
        self.file = None

    def path(self, index: int) -> str:
        return os.path.join(self.folder, f"{self.side}_{index:06d}.bin")

    def add(self, tokens: np.ndarray):  # (n) uint16
        while len(tokens):
            if self.file is None:
                self.file = open(self.path(len(self.counts)), "wb")
                self.file.write(bytes(HEADER_BYTES))
                self.counts.append(0)
            part = tokens[: self.size - self.counts[-1]]
            self.file.write(part.astype("<u2").tobytes())
            self.counts[-1] += len(part)
            tokens = tokens[len(part) :]
            if self.counts[-1] == self.size:
                self.close_shard()

    def close_shard(self):
        if self.file:
            self.file.seek(0)
            self.file.write(shard_header(self.counts[-1]))
            self.file.close()
            self.file = None

    def files(self) -> list[dict]:
        """What dataset.json says of the finished shards."""
        paths = [self.path(index) for index in range(len(self.counts))]
        return dataset.describe_shards(self.folder, dict(zip(map(os.path.basename, paths), self.counts)))

    def finish(self) -> int:
        """Closes the last shard, joining a short one to the one before, and returns the tokens of all."""
        self.close_shard()
        if len(self.counts) > 1 and self.counts[-1] < self.size / 2:
            last = self.path(len(self.counts) - 1)
            count = self.counts.pop()
            self.counts[-1] += count
            with open(last, "rb") as tail, open(self.path(len(self.counts) - 1), "r+b") as file:
                tail.seek(HEADER_BYTES)
                file.write(shard_header(self.counts[-1]))
                file.seek(0, os.SEEK_END)
                shutil.copyfileobj(tail, file, 1 << 20)
            os.remove(last)
        return sum(self.counts)


class Output:
    """The output folder. Use as a context: commit() moves everything into place; without it nothing stays."""

    def __init__(self, folder: str, force: bool):
        self.folder, self.staging, self.lock = folder, os.path.join(folder, STAGING), None
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise InputError(f"{folder}: is a file, not a folder to write to")
        if os.path.isdir(folder) and not force and (shards := shard_files(folder)):
            raise InputError(
                f"{folder}: already holds {len(shards)} shards ({shards[0]} …); "
                "choose another --out, or replace them with --force"
            )

    def __enter__(self):
        self.made = not os.path.isdir(self.folder)
        os.makedirs(self.staging, exist_ok=True)
        self.lock = open(os.path.join(self.staging, "lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.close()
            self.lock = None
            raise InputError(f"{self.folder}: another run is writing here") from error
        for name in os.listdir(self.staging):  # what a killed run left behind
            if name != "lock":
                os.remove(os.path.join(self.staging, name))
        return self

    def __exit__(self, *_):
        if self.lock:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.lock.close()
            if self.made:
                with contextlib.suppress(OSError):  # not empty: the run succeeded
                    os.rmdir(self.folder)

    def commit(self, summary: dict):
        with open(os.path.join(self.staging, SUMMARY), "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1, ensure_ascii=False)
            file.write("\n")
        # The first training shard comes last but for the summary: where it is, the rest of its set is too.
        names = [name for name in OWNED if name != SUMMARY]
        names += sorted(shard_files(self.staging), reverse=True, key=lambda name: (name.startswith("val"), name))
        names.append(SUMMARY)
        for name in names:
            sync(os.path.join(self.staging, name))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for name in [SUMMARY, *shard_files(self.folder)]:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))
            for name in names:
                os.replace(os.path.join(self.staging, name), os.path.join(self.folder, name))
            sync(self.folder)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def check_shard(path: str, vocab: int, eot: int) -> tuple[int, int]:
    """(tokens, documents) of a shard that is what its header says; InputError for any other."""
    size = os.path.getsize(path)
    with open_input(path) as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise InputError(f"{path}: {size:,} bytes, shorter than a header of {HEADER_BYTES:,}")
    magic, version, count = struct.unpack_from("<3i", header)
    if magic != SHARD_MAGIC or version != SHARD_VERSION:
        raise InputError(
            f"{path}: magic {magic} version {version}, not a shard's {SHARD_MAGIC} version {SHARD_VERSION}"
        )
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        raise InputError(f"{path}: {size:,} bytes, but its header's {count:,} tokens need {HEADER_BYTES + 2 * count:,}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)  # (count)
    documents = 0
    for start in range(0, count, 1 << 22):
        part = np.asarray(tokens[start : start + (1 << 22)])
        if part.max() >= vocab:
            where = start + int((part >= vocab).argmax())
            raise InputError(f"{path}: token {where:,} is {tokens[where]}, but the tokenizer has {vocab:,}")
        documents += int((part == eot).sum())
    return count, documents


def verify(folder: str) -> list[str]:
    """A line for each shard of a folder that is whole; InputError at the first fault."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    tokens, eot = read_binary(os.path.join(folder, "tokenizer.bin"))
    names = shard_files(folder)
    lines: list[str] = []
    counts: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    for side in SIDES:
        own = [name for name in names if name.startswith(side + "_")]
        missing = {f"{side}_{index:06d}.bin" for index in range(len(own))} - set(own)
        if missing or (side == "train" and not own):
            raise InputError(f"{folder}: {min(missing, default='train_000000.bin')} is missing; run again with --force")
        for name in own:
            count, documents = check_shard(os.path.join(folder, name), len(tokens), eot)
            counts[side][name] = count
            lines.append(f"{name}: {count:,} tokens, {documents:,} documents begin in it")
    if os.path.exists(os.path.join(folder, SUMMARY)):
        dataset.verify(folder, tokens, eot, counts)
    lines.append(f"{len(tokens):,} tokens in the tokenizer, end of text {eot}: all is well")
    return lines
