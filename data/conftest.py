"""Tokenizers in the manner of GPT-2 and GPT-NeoX, small and made on the spot."""

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
