#!/usr/bin/env python3
"""Whether a training step reached every row of both embeddings of a GPT-2 checkpoint: no weight that is not finite, no
row of positions and no row of a token that a batch could hold as it was.

    dev/check_moved.py BEFORE AFTER [--tokens N]      model.bin of both; the shard's tokens are below N
"""

import argparse
import array
import math
import struct
import sys

MAGIC, FP32, BF16 = 20240326, 3, 5


def embeddings(path, rows_of_tokens):
    """The first rows of wte and all of wpe, as lists of raw rows, and whether every number in them is finite."""
    with open(path, "rb") as file:
        header = struct.unpack("<256i", file.read(1024))
        if header[0] != MAGIC or header[1] not in (FP32, BF16):
            sys.exit(f"{path}: not a GPT-2 checkpoint: magic {header[0]}, version {header[1]}")
        positions, width, padded = header[2], header[6], header[7]
        size = 4 if header[1] == FP32 else 2
        tables = []
        for skipped, rows in ((0, rows_of_tokens), (padded, positions)):
            file.seek(1024 + skipped * width * size)
            tables.append([file.read(width * size) for _ in range(rows)])
    return tables, all(finite(row, size) for table in tables for row in table)


def finite(row, size):
    if size == 4:
        return all(map(math.isfinite, array.array("f", row)))
    return all(bits & 0x7F80 != 0x7F80 for bits in array.array("H", row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    (before, _), (after, all_finite) = (embeddings(path, args.tokens) for path in (args.before, args.after))
    failed = not all_finite
    print("embeddings are finite" if all_finite else "a weight of the embeddings is not finite")
    for name, old, new in zip(("token", "position"), before, after):
        still = [row for row, (a, b) in enumerate(zip(old, new)) if a == b]
        print(f"{len(old) - len(still)} of {len(old)} {name} rows moved" + (f"; row {still[0]} did not" if still else ""))
        failed |= bool(still)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
