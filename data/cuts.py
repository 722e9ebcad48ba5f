"""Where a long document may be cut so that its pieces have the tokens of the whole.

BPE works inside the pre-tokens that a tokenizer's pre-tokenizer makes, and no two pre-tokenizers make the same: GPT-2's
takes a space to the word behind it, Llama 3's a newline to the sign before it. So no rule is trusted. A candidate is
taken if the tokenizer itself gives the same ids for the text around it with and without the cut, for many beginnings
and ends of that text: a pre-token or a merge across the cut shows in at least one of them, whatever stands where the
window begins. This holds for every tokenizer whose decisions reach less than WINDOW characters. A run that is one
pre-token throughout, such as 300 letters without a space, is longer than that; so a candidate has characters of another
kind close on both sides of it.
"""

import re
from typing import Callable, Iterator, Optional, Sequence

Encode = Callable[[list[str]], Sequence[Sequence[int]]]

WINDOW = 192  # characters on each side of a cut that the tokenizer is asked about
STARTS = 16  # windows that a candidate is tried in, each a character longer on both sides
MARGIN = WINDOW + STARTS
NEAR = 1 << 12  # characters before the wanted place that are searched first
TRIES = 24  # candidates of a kind in a region
LONGEST = 1 << 22  # characters: a document that has no place to cut in so many is refused

# Best first: between words; at spaces or a newline of any text; at a sign in a text without spaces; between kinds of
# characters in one without signs.
CANDIDATES = [
    re.compile(pattern)
    for pattern in (
        r"(?<=[a-z]) (?=[A-Za-z])",
        r"(?<=\S)\s{1,8}(?=\S)",
        r"(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)",
        r"(?<=[^\W\d])(?=\d)|(?<=\d)(?=[^\W\d])",
    )
]


WORD_END = re.compile(r"(?<=\S)\s")


def last_matches(pattern: re.Pattern, text: str, start: int, end: int) -> list[int]:
    """Beginnings of the last matches in text[start:end], the last one first."""
    found: list[int] = []
    for match in pattern.finditer(text, start, end):
        found.append(match.start())
        if len(found) > 2 * TRIES:
            del found[:TRIES]
    return found[: -TRIES - 1 : -1]


def word_end(text: str, size: int) -> int:
    for start in (max(0, size - NEAR), 0):
        if found := last_matches(WORD_END, text, start, size):
            return found[0]
    return size


def candidates(text: str, size: int) -> Iterator[int]:
    """Places to cut off at most `size` characters, those near `size` first."""
    near = max(1, size - NEAR)
    for start, end in ((near, size), (1, near)):
        for pattern in CANDIDATES:
            yield from last_matches(pattern, text, start, end)


def unseen(encode: Encode, text: str, at: int) -> bool:
    """Whether the tokenizer gives the same ids for the text around `at` with and without a cut there."""
    windows = [(max(0, at - WINDOW - i), min(len(text), at + WINDOW + i)) for i in range(STARTS)]
    for some in (windows[:1], windows[1:]):  # most that fail do so in the first
        ids = encode([part for a, b in some for part in (text[a:b], text[a:at], text[at:b])])
        if any(list(ids[i]) != [*ids[i + 1], *ids[i + 2]] for i in range(0, len(ids), 3)):
            return False
    return True


class NoPlace(Exception):
    """A document that the tokenizer lets nobody cut; the message goes behind the name of its file."""


class Cutter:
    """Cuts the pieces of one document. Without an encoder, as for raw bytes and for text to train a tokenizer on, the end
    of a word will do, or any place."""

    def __init__(self, size: int, encode: Optional[Encode]):
        self.size, self.encode, self.wanted = size, encode, size

    def __call__(self, text: str) -> int:
        """Where to cut off about `size` characters of what is left of the document; 0: not yet, more is needed."""
        if self.encode is None:
            return word_end(text, self.size) if len(text) > self.size else 0
        while len(text) >= self.wanted + MARGIN:
            for at in candidates(text, self.wanted):
                if unseen(self.encode, text, at):
                    self.wanted = self.size
                    return at
            if self.wanted == LONGEST:
                raise NoPlace(
                    f"{LONGEST:,} characters from {text[:24]!r} on without a place where this tokenizer lets them be "
                    "cut; break them into words or lines, or use --raw-bytes"
                )
            self.wanted = min(2 * self.wanted, LONGEST)
        return 0
