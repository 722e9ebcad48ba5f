"""Tokenizers: a HuggingFace tokenizer.json, one trained on the corpus, or raw bytes; and the binary of each.

Byte-level BPE writes its tokens in a printable alphabet, one character for each of the 256 bytes. The binary holds the
real bytes, so that decoding is a table lookup. Raw bytes are such a tokenizer too, with no merges: its tokenizer.json
is a real one, which any program that reads the format can encode with.
"""

import json
import os
import struct
from typing import Iterable, Optional

import numpy as np

from common import (
    EOT_TEXT,
    HEADER_BYTES,
    HEADER_INTS,
    MAX_VOCAB,
    SHORT_TOKEN,
    TOKENIZER_MAGIC,
    InputError,
    open_input,
)

UNUSED = "\ufffd".encode()  # the text of an id that the vocabulary leaves out; llm.c's reader refuses empty tokens
LENGTH = {1: "<B", 2: "<B", 3: "<I"}  # of a token, by the version of the tokenizer binary
PROBES = ("In the beginning, it's 12.5\n\n  and\tso on", "x", " x", "naïve 漢字 🙂")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character → byte: visible Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """The tokens as bytes, the id that ends a text, and an encoder; made from the text of a tokenizer.json."""

    def __init__(self, text: str, name: str, eot_text: str = EOT_TEXT):
        import tokenizers

        try:
            self.encoder = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{name}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
        self.text, self.name, self.eot_text = text, name, eot_text
        self.encoder.no_truncation()
        self.encoder.no_padding()
        # A document that spells <|endoftext|> holds those characters, not the end of a text.
        self.encoder.encode_special_tokens = True
        added = self.encoder.get_added_tokens_decoder()
        ids = {index: token for token, index in self.encoder.get_vocab(with_added_tokens=True).items()}
        self.size = max(ids, default=-1) + 1
        if self.size > MAX_VOCAB:
            raise InputError(f"{name}: {self.size:,} tokens; a shard's uint16 holds at most {MAX_VOCAB:,}")
        alphabet = byte_alphabet()
        self.tokens = [UNUSED] * self.size
        for index, token in ids.items():
            try:  # added tokens are written in plain text, all others in the byte alphabet
                self.tokens[index] = token.encode() if index in added else bytes(alphabet[char] for char in token)
            except KeyError as error:
                raise InputError(
                    f"{name}: token {index} ({token!r}) is not byte-level BPE as in GPT-2 and GPT-NeoX"
                ) from error
            if not self.tokens[index]:
                raise InputError(f"{name}: token {index} is empty")
        eot = self.encoder.token_to_id(eot_text)
        if eot is None:
            raise InputError(f'{name}: no token "{eot_text}" to end a text; name the right one with --eot-token')
        self.eot: int = eot
        for probe in PROBES:
            if self.decode(self.encode([probe])[0]) != probe.encode():
                raise InputError(
                    f"{name}: {probe!r} does not come back as it was; "
                    "only byte-level BPE without a prefix space is supported"
                )

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[index] for index in ids)

    def binary(self) -> bytes:
        """llm.c's version 2 where it can hold the tokens, else version 3."""
        version = 2 if max(map(len, self.tokens)) <= SHORT_TOKEN else 3
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:4] = TOKENIZER_MAGIC, version, self.size, self.eot
        return header.tobytes() + b"".join(struct.pack(LENGTH[version], len(token)) + token for token in self.tokens)

    def write(self, folder: str):
        with open(os.path.join(folder, "tokenizer.bin"), "wb") as file:
            file.write(self.binary())
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8", newline="") as file:
            file.write(self.text)


class RawBytes(Vocabulary):
    """Ids 0 to 255 are the bytes, 256 ends a text. numpy encodes, much faster than the same tokenizer.json."""

    def __init__(self):
        alphabet = {char: byte for char, byte in sorted(byte_alphabet().items(), key=lambda item: item[1])}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        eot = {
            "id": 256,
            "content": EOT_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        super().__init__(
            json.dumps(
                {
                    "version": "1.0",
                    "truncation": None,
                    "padding": None,
                    "added_tokens": [eot],
                    "normalizer": None,
                    "pre_tokenizer": level,
                    "post_processor": None,
                    "decoder": level,
                    "model": {
                        "type": "BPE",
                        "dropout": None,
                        "unk_token": None,
                        "continuing_subword_prefix": None,
                        "end_of_word_suffix": None,
                        "fuse_unk": False,
                        "byte_fallback": False,
                        "ignore_merges": False,
                        "vocab": alphabet | {EOT_TEXT: 256},
                        "merges": [],
                    },
                },
                ensure_ascii=False,
                indent=1,
            ),
            "raw bytes",
        )


def encode_raw(texts: list[str]) -> list[np.ndarray]:
    """For documents whose characters are bytes (Corpus with raw=True)."""
    return [np.frombuffer(text.encode("latin-1"), dtype=np.uint8) for text in texts]


def load(path: str, eot_text: str) -> Vocabulary:
    try:
        with open_input(path, "r", encoding="utf-8", newline="") as file:
            text = file.read()
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); scripts/download_hf.py gets a model's") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a tokenizer.json (not UTF-8); tokenizer.bin only decodes") from error
    return Vocabulary(text, path, eot_text)


def train(pieces: Iterable[str], size: int) -> Vocabulary:
    """Byte-level BPE with `size` tokens: the end of a text, the 256 bytes, and merges that occur at least twice."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[EOT_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=SHORT_TOKEN,  # so that llm.c reads it
    )
    encoder.train_from_iterator(pieces, trainer)
    return Vocabulary(encoder.to_str(pretty=True), "trained tokenizer")


def read_binary(path: str) -> tuple[list[bytes], Optional[int]]:
    """The tokens and the end of text of a tokenizer binary."""
    try:
        with open_input(path) as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) < HEADER_BYTES:
        raise InputError(f"{path}: {len(data):,} bytes, shorter than a header of {HEADER_BYTES:,}")
    magic, version, size, eot = struct.unpack_from("<4i", data)
    if magic != TOKENIZER_MAGIC or version not in LENGTH or not 0 < size <= MAX_VOCAB:
        raise InputError(f"{path}: not a tokenizer binary (magic {magic}, version {version}, {size} tokens)")
    tokens, at, prefix = [], HEADER_BYTES, struct.Struct(LENGTH[version])
    for index in range(size):
        begin = at + prefix.size
        end = begin + (prefix.unpack_from(data, at)[0] if begin <= len(data) else 0)
        if begin > len(data) or end > len(data):
            raise InputError(f"{path}: token {index} of {size} is cut short")
        if begin == end:
            raise InputError(f"{path}: token {index} of {size} is empty")
        tokens.append(data[begin:end])
        at = end
    if at != len(data):
        raise InputError(f"{path}: {len(data) - at:,} bytes after the last token")
    return tokens, 50256 if version == 1 else eot
