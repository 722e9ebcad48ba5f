"""What prepare.py takes for a corpus: separators as people type them, folders behind links, compressed files."""

import bz2
import lzma
import os
import re
import zipfile

import pytest

import corpus
import prepare
import vocabulary
from testing import decode, prose, run

BARE = ["--raw-bytes", "--val-fraction", 0, "--min-tokens", 1, "--force"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_separators_as_people_type_them(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    path, out = tmp_path / "a.txt", tmp_path / "out"
    for data, separator, documents in (
        (b"one\n\ntwo\n\n\nthree", r"\n\n", [b"one", b"two", b"three"]),
        (b"one\r\n\r\ntwo\r\nand\r\n\r\nthree", r"\n\n", [b"one", b"two\r\nand", b"three"]),
        (b"one\r\n\r\ntwo", "\n\n", [b"one", b"two"]),
        (b"one\r\n---\r\ntwo\n---\nthree", r"\n---\n", [b"one", b"two", b"three"]),
        (b"one\r\n\r\ntwo\n\nthree", r"\r\n\r\n", [b"one", b"two\n\nthree"]),
        (b"one\ttwo", r"\t", [b"one", b"two"]),
        (rb"one\newpage two", r"\\newpage", [b"one", b"two"]),
        (rb"one\section two", r"\section", [b"one", b"two"]),
        (b"one.*two", ".*", [b"one", b"two"]),
    ):
        path.write_bytes(data)
        assert run(path, "--out", out, *BARE, "--split-on", separator) == 0
        assert decode(out, "train") == documents, separator


def test_a_separator_that_is_nowhere_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(3000).replace("<", ""))
    (tmp_path / "b.txt").write_text("first<eot>second")
    for fraction in (0, 0.1):
        options = ["--out", tmp_path / "out", *BARE, "--split-on", "<eot>", "--val-fraction", fraction]
        assert run(tmp_path / "a.txt", *options) == 2
        error = capsys.readouterr().err
        assert "--split-on: '<eot>' is nowhere in the text files" in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert run(tmp_path, *options) == 0  # one file has it
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


def test_folders_behind_links(tmp_path, capsys):
    books, shelf = tmp_path / "books", tmp_path / "elsewhere/shelf"
    books.mkdir()
    shelf.mkdir(parents=True)
    (books / "a.txt").write_text("a text")
    (shelf / "b.txt").write_text("b text")
    (books / "linked").symlink_to(shelf)
    (books / "again").symlink_to(shelf)  # the same folder twice is read once
    (shelf / "loop").symlink_to(books)
    (books / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert run(books, "--out", tmp_path / "out", *BARE) == 0
    assert sorted(decode(tmp_path / "out", "train")) == [b"a text", b"b text"]
    assert "2 files" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("a text")
    assert run(tmp_path, "--out", tmp_path / "out", *BARE) == 2
    assert "shut: cannot be read" in capsys.readouterr().err


def test_compressed_files(tmp_path, capsys):
    text = prose(9000)
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "c.bz2").write_bytes(bz2.compress(text.encode()))
    names = ["a.txt.bz2", "b.txt.xz", "c.bz2"]
    assert run(*(tmp_path / name for name in names), "--out", tmp_path / "out", *BARE) == 0
    assert decode(tmp_path / "out", "train") == [text.encode()] * 3
    capsys.readouterr()
    for name in names:
        (tmp_path / f"torn_{name}").write_bytes((tmp_path / name).read_bytes()[:-20])
        assert run(tmp_path / f"torn_{name}", "--out", tmp_path / "out", *BARE) == 2
        assert f"torn_{name}: cannot be read" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("d.txt", text)
    (tmp_path / "misnamed.txt").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "misnamed.jsonl").write_bytes(lzma.compress(text.encode()))
    for name, kind in (("d.zip", "zip"), ("misnamed.txt", "bzip2"), ("misnamed.jsonl", "xz")):
        assert run(tmp_path / name, "--out", tmp_path / "out", *BARE) == 2
        assert f"{name}: is a {kind} file" in capsys.readouterr().err


def test_no_word_to_train_on_is_longer_than_a_token_can_use(tmp_path, monkeypatch):
    """Training takes the square of a word's length: a text without blanks would take hours."""
    text = "漢字" * 3000 + " " * 3000 + "word " * 30 + "x" * 40_000
    (tmp_path / "a.txt").write_text(text)
    seen, train = [], vocabulary.train
    monkeypatch.setattr(vocabulary, "train", lambda texts, size: train(map(seen_too(seen), texts), size))
    trained = ["--train-tokenizer", 300, "--val-fraction", 0, "--min-tokens", 1]
    assert run(tmp_path / "a.txt", "--out", tmp_path / "out", *trained) == 0
    assert "".join(seen) == text
    assert max(len(word) for part in seen for word in re.findall(r"\S+|\s+", part)) <= prepare.LONGEST_WORD


def seen_too(seen):
    def remember(text):
        seen.append(text)
        return text

    return remember
