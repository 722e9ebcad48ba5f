"""dataset.json: what made the shards beside it, and what tells one shard from another (FORMATS.md).

The trainer reads it, so that shards of one tokenizer are not trained on by a model of another; runtime/files/dataset.cpp is
the same in C++.
"""

import json
import os
import struct
from typing import Any, Iterable

from common import HEADER_BYTES, InputError, open_input

SUMMARY = "dataset.json"
VERSION = 2  # the first that was numbered; before it there was neither a hash nor a list of shards
PIECE_BYTES, PIECES = 4096, 16  # of a shard's ids that its hash is of


def fnv(parts: Iterable[bytes]) -> str:
    """FNV-1a, 64 bits."""
    state = 0xCBF29CE484222325
    for part in parts:
        for byte in part:
            state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def tokenizer_hash(tokens: Iterable[bytes]) -> str:
    return fnv(struct.pack("<I", len(token)) + token for token in tokens)


def shard_hash(path: str, count: int) -> str:
    """Sampled, so that gigabytes cost some reads."""
    size = 2 * count
    if size <= PIECES * PIECE_BYTES:
        pieces = [(0, size)]
    else:
        pieces = [(i * (size - PIECE_BYTES) // (PIECES - 1), PIECE_BYTES) for i in range(PIECES)]
    parts = []
    with open_input(path) as file:
        parts.append(file.read(HEADER_BYTES))
        for begin, length in pieces:
            file.seek(HEADER_BYTES + begin)
            parts.append(file.read(length))
    return fnv(parts)


def describe_tokenizer(name: str, tokens: list[bytes], eot: int) -> dict[str, Any]:
    return {"from": name, "tokens": len(tokens), "end_of_text": eot, "hash": tokenizer_hash(tokens)}


def describe_shards(folder: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Of the shards whose tokens `counts` has by name."""
    return [
        {"name": name, "tokens": count, "hash": shard_hash(os.path.join(folder, name), count)}
        for name, count in counts.items()
    ]


def read(path: str) -> dict[str, Any]:
    try:
        with open_input(path, "r", encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged; run again with --force") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: damaged; run again with --force")
    return record


def verify(folder: str, tokens: list[bytes], eot: int, counts: dict[str, dict[str, int]]):
    """Refuses a dataset.json that does not describe the shards, whose tokens `counts` has by side and name."""
    path = os.path.join(folder, SUMMARY)
    record = read(path)
    try:
        version = record.get("version", 1)
        if version > VERSION:
            raise InputError(f"{path}: version {version}, this program reads up to {VERSION}")
        for side, own in counts.items():
            if record[side]["tokens"] != sum(own.values()):
                raise InputError(
                    f"{folder}: {side} has {sum(own.values()):,} tokens, but {SUMMARY} says {record[side]['tokens']:,}"
                )
        if version == 1:
            return
        if record["tokenizer"] != describe_tokenizer(record["tokenizer"]["from"], tokens, eot):
            raise InputError(f"{folder}: tokenizer.bin is not the one that {SUMMARY} describes; run again with --force")
        for side, own in counts.items():
            found, listed = describe_shards(folder, own), record[side]["files"]
            if found != listed:
                odd = next((shard for shard in found if shard not in listed), None) or listed[len(found)]
                raise InputError(
                    f"{folder}: {odd['name']} is not the shard that {SUMMARY} describes; run again with --force"
                )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; run again with --force") from error
