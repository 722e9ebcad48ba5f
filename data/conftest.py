"""Tokenizers in the manner of GPT-2 and GPT-NeoX, small and made on the spot."""

import json

import pytest

from testing import prose


@pytest.fixture(scope="session")
def gpt2_like(tmp_path_factory):
    """A tokenizer.json in GPT-2's manner: byte-level BPE, <|endoftext|> as the last id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.train_from_iterator(
        [prose(50_000)],
        trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    made.enable_truncation(8)  # prepare must not let a file's own settings cut documents
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def neox_like(gpt2_like, tmp_path_factory):
    """As GPT-NeoX adds to that: NFC, and runs of spaces as plain added tokens."""
    from tokenizers import AddedToken, Tokenizer, normalizers

    made = Tokenizer.from_file(str(gpt2_like))
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    path = tmp_path_factory.mktemp("neox") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def long_tokens(neox_like, tmp_path_factory):
    """GPT-NeoX-20B's vocabulary has runs of one character of up to 512 bytes: here of 256, 257 and 512 by merges, of 255
    and 70,000 as added tokens."""
    made = json.loads(neox_like.read_text())
    vocab, merges, added = made["model"]["vocab"], made["model"]["merges"], made["added_tokens"]
    for left, right in [*((1 << i, 1 << i) for i in range(9)), (256, 1)]:
        if "=" * (left + right) not in vocab:
            vocab["=" * (left + right)] = len(vocab)
            merges.append(["=" * left, "=" * right])
    added += [dict(added[0], content=token, special=False) for token in ("-" * 255, "é" * 35_000)]
    for index, token in enumerate(added, len(vocab)):  # the library gives them these ids whatever the file says
        token["id"] = index
    path = tmp_path_factory.mktemp("long") / "tokenizer.json"
    path.write_text(json.dumps(made))
    return path
