"""What the tests of data/ share: text to work on, prepare.py as a call, and a reader that knows nothing of its code."""

import json
import os
import random
import struct
from pathlib import Path

import numpy as np

import prepare

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = Path(HERE).parent
WORDS = "the of and that in he shall unto for it was king's Lord's naïve 漢字 12 1611 🙂 ( ) ; : . , \n \t".split(" ")


def prose(characters, seed=1):
    """Text with contractions, digits, runs of spaces, newlines and characters of two to four bytes."""
    draw = random.Random(seed)
    count = characters // 4  # a word and its space have more than four on average
    ends = draw.choices([" ", " ", " ", "  ", "\n", "\n\n", "\r\n"], k=count)
    return "".join(word + end for word, end in zip(draw.choices(WORDS, k=count), ends)) + "end\n"


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def decode(folder, side):
    """The documents of one side as bytes, from the files alone: header by struct, tokens by numpy."""
    with open(folder / "tokenizer.bin", "rb") as file:
        head = struct.unpack("<256i", file.read(1024))
        assert head[0] == 20240328 and head[1] in (2, 3)
        width = 1 if head[1] == 2 else 4
        tokens = [file.read(int.from_bytes(file.read(width), "little")) for _ in range(head[2])]
        assert not file.read()
    ids = []
    for path in sorted(folder.glob(f"{side}_*.bin")):
        shard = struct.unpack("<256i", path.read_bytes()[:1024])
        assert shard[:2] == (20240520, 1) and not any(shard[3:])
        part = np.frombuffer(path.read_bytes()[1024:], "<u2")
        assert len(part) == shard[2]
        ids.extend(part.tolist())
    documents = []
    for token in ids:
        if token == head[3]:
            documents.append([])
        else:
            documents[-1].append(tokens[token])  # fails where the first token does not end a text
    return [b"".join(document) for document in documents]


def write_lines(path, texts, opener=open):
    with opener(path, "wb") as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")
