"""Texts of every kind through tokenizers of every kind: data/prepare.py has to give each document the ids that its
tokenizer gives it, and tokenizer.bin has to give back the text."""

import gzip
import json
import struct

import numpy as np
import pytest

from runs import ROOT
from trials import covered, hold

PYTHON = ROOT / ".venv/bin/python"
END = "<|endoftext|>"
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
WORDS = "the of and that lord's shall unto naïve 漢字 12 1611 🙂 ( ) ; : . , \n \t \r\n é ... ---- 0000 ’ ".split(" ")
ALPHABETS = ["abcdefgh", "ab ", "0123456789", " \n", "\r\n", "漢字仮名", "🙂👍🏽", "\0\x01\x7f\x85\u2028", "é\u0301e", "-=", "aA'sS"]


def text(trial):
    rng, size = trial.rng, trial.rng.choice([0, 1, 10, 300, 3000, 3000, 20_000])
    if trial.chance(0.5):
        return " ".join(rng.choices(WORDS, k=size // 4))
    if trial.chance(0.3):
        return rng.choice("a -=0\n漢") * size
    return "".join(rng.choices(rng.choice(ALPHABETS), k=size))


def documents(trial):
    made = [text(trial) for _ in range(trial.rng.randrange(1, 8))]
    if trial.chance(0.15):  # longer than the pieces in which it is read
        made.append("".join(trial.rng.choice([" ".join(trial.rng.choices(WORDS, k=2000)), "ab" * 3000, "\n\n\n", "9" * 5000])
                            for _ in range(60)))
    return made


def tokenizer(trial, made):
    """A HuggingFace tokenizer in the manner of GPT-2, GPT-NeoX or Llama 3, of tokens that may be long."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rng, bytes_ = trial.rng, pre_tokenizers.ByteLevel(add_prefix_space=False)
    kind = rng.choice(["gpt2", "gpt-neox", "llama-3"])
    new = Tokenizer(models.BPE())
    new.decoder = decoders.ByteLevel()
    new.pre_tokenizer = bytes_
    if kind == "llama-3":
        new.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    longest = rng.choice([8, 254, 255, 256, 300, 600])
    tale = [document[:5000] for document in made] + [" ".join(WORDS) * 3] + [rng.choice("-=a") * longest] * 3
    new.train_from_iterator(tale, trainers.BpeTrainer(
        vocab_size=rng.choice([258, 400, 1200]), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if kind == "gpt-neox":
        new.normalizer = normalizers.NFC()
        new.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    new.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    if longest > 8:
        new.add_tokens([AddedToken("=" * longest, normalized=False)])
    trial.tell(f"a tokenizer in the manner of {kind}, with tokens of up to {longest} bytes")
    covered[f"texts: {kind}"] += 1
    return new


def bytes_of(path):
    """What tokenizer.bin says of each id: lengths are bytes up to version 2, and of 32 bits from version 3 on."""
    content = path.read_bytes()
    head = struct.unpack("<256i", content[:1024])
    assert head[0] == 20240328 and head[1] in (2, 3)
    found, at, width = [], 1024, 1 if head[1] == 2 else 4
    for _ in range(head[2]):
        length = int.from_bytes(content[at : at + width], "little")
        found.append(content[at + width : at + width + length])
        at += width + length
    assert at == len(content)
    return found, head[3]


def texts(trial):
    rng, folder = trial.rng, trial.folder
    made = documents(trial)
    made.append("a text")  # one at least that is not blank
    form = rng.choice(["txt", "jsonl", "jsonl.gz"])
    if form == "txt":
        made = ["".join(made)]
        (folder / "in.txt").write_bytes(made[0].encode())
    else:
        lines = "".join(json.dumps({"text": text}, ensure_ascii=trial.chance(0.5)) + "\n" for text in made).encode()
        (folder / f"in.{form}").write_bytes(gzip.compress(lines) if form.endswith("gz") else lines)
    command = [PYTHON, ROOT / "data/prepare.py", f"in.{form}", "--out", "out", "--val-fraction", 0, "--min-tokens", 1,
               "--workers", rng.choice([1, 1, 2])]
    how = rng.choice(["given", "given", "given", "bytes", "trained"])
    if how == "given":
        tokenizer(trial, made).save(str(folder / "tokenizer.json"))
        command += ["--tokenizer", "tokenizer.json"]
    else:
        command += ["--raw-bytes"] if how == "bytes" else ["--train-tokenizer", rng.choice([257, 300, 1000])]
    covered[f"texts: tokenizer {how}, {form}"] += 1
    code, said = trial.run(command, "prepare.py", codes={0, 2})
    if code == 2:
        trial.check(how == "trained" and "--train-tokenizer" in said, "a text and its tokenizer are refused")
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "out/tokenizer.json"))
    own.encode_special_tokens = True
    known, end = bytes_of(folder / "out/tokenizer.bin")
    ids = np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2")
                          for path in sorted((folder / "out").glob("train_*.bin"))]).tolist()
    kept = [text for text in made if text.strip(" \t\r\n\v\f")]  # blank documents are left out, and counted
    want = [token for text in kept for token in [end, *own.encode(text, add_special_tokens=False).ids]]
    trial.check(ids == want, f"{len(ids)} ids, which are not the {len(want)} of the tokenizer: " + first_other(ids, want))
    text = b"".join(known[token] for token in ids if token != end)
    if own.normalizer is None:
        trial.check(text == "".join(kept).encode(), "tokenizer.bin does not give the text back")
    verified, _ = trial.run([PYTHON, ROOT / "data/prepare.py", "--verify", "out"], "prepare.py")
    trial.check(verified == 0, "--verify refuses what was written")


def first_other(ids, want):
    at = next((i for i, (a, b) in enumerate(zip(ids, want)) if a != b), min(len(ids), len(want)))
    return f"from {at} on {ids[at : at + 8]} for {want[at : at + 8]}"


def test_some(tmp_path):
    hold(texts, "texts", 2, tmp_path, many=False)


@pytest.mark.long
def test_many(tmp_path):
    hold(texts, "texts", 150, tmp_path, many=True)
