"""Vocabularies with tokens that llm.c's tokenizer binary cannot hold, as GPT-NeoX-20B's."""

import json
import struct

import numpy as np
import pytest

import vocabulary
from common import InputError
from testing import decode, prose, run

LENGTHS = (255, 256, 257, 512, 70_000)  # bytes


def test_tokens_of_any_length_come_back(long_tokens, tmp_path):
    from tokenizers import Tokenizer

    long = ["-" * 255, "=" * 256, "=" * 257, "=" * 512, "é" * 35_000]
    text = prose(20_000) + " ".join(long) + "\n" + prose(20_000, seed=2)
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert run(tmp_path / "text.txt", "--out", tmp_path / "out", "--tokenizer", long_tokens, "--val-fraction", 0) == 0
    assert decode(tmp_path / "out", "train") == [text.encode()]
    assert run("--verify", tmp_path / "out") == 0
    tokens, eot = vocabulary.read_binary(str(tmp_path / "out" / "tokenizer.bin"))
    ids = set(np.fromfile(tmp_path / "out" / "train_000000.bin", "<u2", offset=1024).tolist())
    assert set(LENGTHS) <= {len(tokens[index]) for index in ids}  # the text holds each as one token
    assert tokens[eot] == b"<|endoftext|>"
    real = Tokenizer.from_file(str(long_tokens))
    assert len(tokens) == real.get_vocab_size()
    assert [tokens[real.token_to_id(token)] for token in long] == [token.encode() for token in long]


def test_llm_c_reads_every_vocabulary_that_its_format_holds(long_tokens, tmp_path):
    made = json.loads(long_tokens.read_text())
    for longest, version in ((255, 2), (256, 3)):
        short = json.loads(json.dumps(made))
        short["added_tokens"] = [token for token in made["added_tokens"] if len(token["content"]) <= longest]
        short["model"]["vocab"] = {text: at for text, at in made["model"]["vocab"].items() if len(text) <= longest}
        short["model"]["merges"] = [pair for pair in made["model"]["merges"] if len("".join(pair)) <= longest]
        vocab = vocabulary.Vocabulary(json.dumps(short), "short")
        assert max(map(len, vocab.tokens)) == longest
        assert struct.unpack_from("<4i", vocab.binary()) == (20240328, version, vocab.size, vocab.eot)
        (tmp_path / "tokenizer.bin").write_bytes(vocab.binary())
        assert vocabulary.read_binary(str(tmp_path / "tokenizer.bin")) == (vocab.tokens, vocab.eot)


def test_damaged_binaries_of_version_3(tmp_path):
    good = struct.pack("<4i", 20240328, 3, 2, 1) + bytes(1008) + b"\1\0\0\0a" + b"\0\1\0\0" + b"b" * 256
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(good)
    assert vocabulary.read_binary(str(path)) == ([b"a", b"b" * 256], 1)
    for bad in (good[:-1], good + b"x", good[:1024], good[:1026], good[:1031],
                good[:1024] + bytes(4) + good[1029:], good[:1024] + b"\xff" * 4 + good[1028:],
                good[:4] + b"\4" + good[5:]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="tokenizer.bin: "):
            vocabulary.read_binary(str(path))
