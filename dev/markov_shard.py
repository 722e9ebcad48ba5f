#!/usr/bin/env python3
"""Writes a token shard that any machine can make and a model can learn: a chain in which each of 256 tokens is followed
by one of four, by a generator of its own, so that the bytes are the same everywhere. The entropy is ln 4 = 1.386.

    dev/markov_shard.py OUT.bin [--tokens N] [--seed S]
"""

import argparse
import array
import struct
import sys


def chain(count, seed):
    state, token = seed, 0
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        token = (token * 5 + 17 + (state >> 62) * 61) % 256
        yield token


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokens = array.array("H", chain(args.tokens, args.seed))
    if sys.byteorder == "big":
        tokens.byteswap()
    with open(args.out, "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, args.tokens, *[0] * 253))
        tokens.tofile(file)


if __name__ == "__main__":
    main()
