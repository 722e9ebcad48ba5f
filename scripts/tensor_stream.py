"""Tensors read from files block by block, and recoded between fp32, fp16 and bf16: memory does not grow with the model.

Blocks are read into memory and not mapped, because pages of a mapping count as the process's own.
"""

import os
from typing import Iterator, NamedTuple

import numpy as np

from weights_file import InputError

STORAGE = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}  # numpy has no bf16: its bits
BITS = {"fp32": "<u4", "fp16": "<u2", "bf16": "<u2"}
EXPONENT = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}  # all ones: Inf or NaN
BLOCK = 1 << 21  # elements; 8 MB in fp32


class Stored(NamedTuple):
    """A tensor somewhere in a file that stays open."""

    handle: int
    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, out: np.ndarray, element: int):
        """Fills `out`, contiguous, from the tensor's elements onwards."""
        left, at = memoryview(out).cast("B"), self.offset + element * out.itemsize
        while len(left):
            got = os.preadv(self.handle, [left], at)
            if not got:
                raise InputError(f"{self.path}: became shorter while it was read")
            left, at = left[got:], at + got

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Elements start to stop in their order."""
        for begin in range(start, stop, BLOCK):
            block = np.empty(min(BLOCK, stop - begin), STORAGE[self.dtype])
            self.read(block, begin)
            yield block

    def transposed_blocks(self) -> Iterator[np.ndarray]:
        """(rows, columns) → its columns in their order, so many at a time that a block is no larger than others."""
        rows, columns = self.shape
        width = max(1, BLOCK // rows)
        for begin in range(0, columns, width):
            band = np.empty((rows, min(width, columns - begin)), STORAGE[self.dtype])
            for row in range(rows):
                self.read(band[row], row * columns + begin)
            yield np.ascontiguousarray(band.T).reshape(-1)


def unusable(block: np.ndarray, dtype: str) -> np.ndarray:
    """Which elements are Inf or NaN."""
    return (block.view(BITS[dtype]) & EXPONENT[dtype]) == EXPONENT[dtype]


def widen(block: np.ndarray, dtype: str) -> np.ndarray:
    """Exactly the same numbers as float32."""
    if dtype == "bf16":
        return (block.astype("<u4") << 16).view("<f4")
    return block.astype("<f4", copy=False)


def narrow(block: np.ndarray, dtype: str) -> np.ndarray:
    """float32 → the nearest number of the dtype, even where two are as near; Inf where it is too large."""
    if dtype == "bf16":  # no NaN comes here, so the carry cannot pass the sign
        bits = block.view("<u4")
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        return block.astype(STORAGE[dtype], copy=False)


def recode(block: np.ndarray, source: str, target: str, name: str) -> np.ndarray:
    """A block in another dtype; refuses what is no number, or none of the target's, in the tensor's name."""
    bad = unusable(block, source)
    if bad.any():
        value = widen(block[bad.argmax()].reshape(1), source)[0]
        raise InputError(f"{name}: holds {'NaN' if np.isnan(value) else 'Inf'}")
    if source == target:
        return block
    wide = widen(block, source)
    made = narrow(wide, target)
    if target != "fp32":
        bad = unusable(made, target)
        if bad.any():
            raise InputError(f"{name}: {wide[bad.argmax()]:g} is too large for {target}; choose another --dtype")
    return made
