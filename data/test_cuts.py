"""Long documents are cut where their tokenizer cannot see it: the ids of the pieces are those of the whole."""

import random

import numpy as np
import pytest

import corpus
import cuts
import vocabulary
from common import EOT_TEXT, InputError
from testing import ROOT, prose, run

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ["gpt2", "neox", "llama3", "digits", "lines", "words", "no regex"]


def pre_tokenizer(kind):
    from tokenizers import Regex, pre_tokenizers as p

    byte_level = p.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt2": p.ByteLevel(add_prefix_space=False),
        "neox": p.ByteLevel(add_prefix_space=False),
        "llama3": p.Sequence([p.Split(Regex(LLAMA3), "isolated"), byte_level]),
        "digits": p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)]),
        "lines": p.Sequence([p.Split("\n", "merged_with_previous"), byte_level]),
        "words": p.Sequence([p.Split(Regex(r"\S+\s*"), "isolated"), byte_level]),  # spaces belong to the word before
        "no regex": byte_level,
        "metaspace": p.Metaspace(),
        "none": None,
    }[kind]


def tokenizer(kind, text):
    """The text of a tokenizer.json, trained on `text`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind != "none":
        made.pre_tokenizer = pre_tokenizer(kind)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Merges across words: without a regex BPE would make them of any text.
    made.train_from_iterator(
        [text[at : at + 200] for at in range(0, 30_000, 200)],
        trainers.BpeTrainer(vocab_size=1200, special_tokens=[EOT_TEXT], show_progress=False, initial_alphabet=alphabet),
    )
    if kind == "neox":
        made.normalizer = normalizers.NFC()
        made.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    return made.to_str()


def hostile(characters, seed):
    """Runs of all that pre-tokenizers treat apart, short ones and some that are longer than a window."""
    draw = random.Random(seed)
    parts = [" ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "1", "a", "Z", "é", "e\u0301", "漢", ".", "'s", ")", "=", "🙂"]
    made, size = [], 0
    while size < characters:
        run_of = draw.choice(parts) * draw.choice([1, 1, 1, 1, 2, 2, 3, 4, 8, 9, 30, 300])
        made.append(run_of)
        size += len(run_of)
    return "".join(made)


@pytest.fixture(scope="module")
def texts():
    real = (ROOT / "runtime/options/options.cpp").read_text() + (ROOT / "dev/LOG.md").read_text()
    chinese = "".join(random.Random(3).choices("的一是不了人我在有他。，、！「」\n", k=6_000))
    return {
        "real": real[:40_000],
        "prose": prose(15_000, 5),
        "double spaced": real[:10_000].replace("\n", "\n\n").replace(". ", ".\n\n \n"),
        "Chinese": chinese,
        "one sign": "x1" * 3_000,
        **{f"hostile {seed}": hostile(8_000, seed) for seed in range(3)},
    }


@pytest.fixture(scope="module", params=KINDS)
def vocab(request, texts):
    return vocabulary.Vocabulary(tokenizer(request.param, texts["real"]), request.param)


@pytest.mark.parametrize("piece", [pytest.param(400, marks=pytest.mark.long), 3000])
def test_the_ids_of_pieces_are_those_of_the_whole(vocab, piece, texts):
    for name, text in texts.items():
        ids, rest, cutter, pieces = [], text, cuts.Cutter(piece, vocab.encode), 0
        while cut := cutter(rest):
            ids += vocab.encode([rest[:cut]])[0]
            rest, pieces = rest[cut:], pieces + 1
        ids += vocab.encode([rest])[0]
        assert ids == vocab.encode([text])[0], (name, vocab.name)
        if name in ("real", "prose"):  # and there are as many as asked for
            assert pieces > 0.6 * len(text) / (piece + cuts.MARGIN), (name, vocab.name)


def test_a_file_has_the_ids_that_its_tokenizer_gives(vocab, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 700)
    monkeypatch.setattr(corpus, "CHUNK", 1999)
    (tmp_path / "t.json").write_text(vocab.text)
    (tmp_path / "text.txt").write_bytes(texts["real"].encode())
    out = ["--out", tmp_path / "out", "--val-fraction", 0]
    assert run(tmp_path / "text.txt", *out, "--tokenizer", tmp_path / "t.json") == 0
    written = np.fromfile(tmp_path / "out/train_000000.bin", "<u2", offset=1024)
    assert written.tolist() == [vocab.eot, *vocab.encode([texts["real"]])[0]]


def test_a_text_that_cannot_be_cut_is_refused(tmp_path, monkeypatch, capsys, gpt2_like):
    monkeypatch.setattr(cuts, "LONGEST", 20_000)
    monkeypatch.setattr(corpus, "PIECE", 3000)
    (tmp_path / "text.txt").write_text("word " * 5000 + "漢" * 30_000 + " word" * 5000)
    command = [tmp_path / "text.txt", "--out", tmp_path / "out"]
    assert run(*command, "--tokenizer", gpt2_like) == 2
    error = capsys.readouterr().err
    assert "text.txt: 20,000 characters from " in error and "漢" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*command, "--raw-bytes") == 0
    (tmp_path / "text.txt").write_text("word " * 5000 + "漢" * 9_000 + " word" * 5000)
    assert run(*command, "--tokenizer", gpt2_like, "--force") == 0


@pytest.mark.parametrize("kind", ["metaspace", "none"])
def test_other_pre_tokenizers_are_refused(kind, texts):
    with pytest.raises(InputError, match="byte-level"):
        vocabulary.Vocabulary(tokenizer(kind, texts["real"]), kind)
