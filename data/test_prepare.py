"""prepare.py on small corpora: every shard is read back through tokenizer.bin alone and held against the text."""

import contextlib
import gzip
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

import corpus
import prepare
import shards
import vocabulary
from common import InputError
from testing import HERE, decode, prose, run, write_lines


@pytest.fixture(params=["raw", "trained", "gpt2", "neox"])
def tokenizer(request, gpt2_like, neox_like):
    return {
        "raw": ["--raw-bytes"],
        "trained": ["--train-tokenizer", 320],
        "gpt2": ["--tokenizer", gpt2_like],
        "neox": ["--tokenizer", neox_like],
    }[request.param]


def test_one_text_comes_back(tokenizer, tmp_path):
    text = prose(60_000)
    source = tmp_path / "text.txt"
    source.write_bytes(text.encode())
    assert run(source, "--out", tmp_path / "out", *tokenizer) == 0
    [train], [val] = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    assert train + val == text.encode()
    assert train.endswith(b"\n")  # the tail starts on a line
    assert 0.04 < len(val) / len(text.encode()) < 0.06


@pytest.mark.parametrize("piece", [64, 1000])
def test_pieces_tokenize_as_the_whole(piece, tokenizer, tmp_path, monkeypatch):
    text = prose(8_000, seed=2)
    source = tmp_path / "text.txt"
    source.write_bytes(text.encode())
    assert run(source, "--out", tmp_path / "whole", "--val-fraction", 0, *tokenizer) == 0
    monkeypatch.setattr(corpus, "PIECE", piece)
    monkeypatch.setattr(corpus, "CHUNK", 97)  # cuts characters and separators anywhere
    monkeypatch.setattr(prepare, "PIECE", piece)
    assert run(source, "--out", tmp_path / "cut", "--val-fraction", 0, *tokenizer) == 0
    same = (tmp_path / "whole" / "train_000000.bin").read_bytes() == (
        tmp_path / "cut" / "train_000000.bin"
    ).read_bytes()
    assert same


def test_text_without_a_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    (tmp_path / "text.txt").write_text("漢字" * 3000 + " " * 3000 + "\n" * 3000 + "x")
    assert run(tmp_path / "text.txt", "--out", tmp_path / "out", "--val-fraction", 0, "--raw-bytes") == 0
    assert decode(tmp_path / "out", "train") == [(tmp_path / "text.txt").read_bytes()]


def test_header_bytes_exactly(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abc")
    assert (
        run(tmp_path / "text.txt", "--out", tmp_path / "out", "--raw-bytes", "--val-fraction", 0, "--min-tokens", 1)
        == 0
    )
    expected = struct.pack("<3i", 20240520, 1, 4) + bytes(1012) + struct.pack("<4H", 256, 97, 98, 99)
    assert (tmp_path / "out" / "train_000000.bin").read_bytes() == expected
    binary = (tmp_path / "out" / "tokenizer.bin").read_bytes()
    assert binary[:1024] == struct.pack("<4i", 20240328, 2, 257, 256) + bytes(1008)
    assert binary[1024:1030] == b"\x01\x00\x01\x01\x01\x02" and binary.endswith(b"\x01\xff\x0d<|endoftext|>")


def test_raw_bytes_json_is_a_real_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    text = prose(30_000) + "".join(map(chr, range(256)))
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert run(tmp_path / "text.txt", "--out", tmp_path / "out", "--raw-bytes", "--val-fraction", 0) == 0
    real = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    real.encode_special_tokens = True
    assert real.encode(text).ids == list(text.encode())
    assert (
        run(
            tmp_path / "text.txt",
            "--out",
            tmp_path / "again",
            "--tokenizer",
            tmp_path / "out" / "tokenizer.json",
            "--val-fraction",
            0,
        )
        == 0
    )
    for name in ("train_000000.bin", "tokenizer.bin", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_shards_split_and_join(tmp_path):
    text = prose(30_000)
    (tmp_path / "text.txt").write_bytes(text.encode())
    for size in (1000, 3333, 20_000, 100_000):
        out = tmp_path / f"out{size}"
        assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--shard-tokens", size) == 0
        counts = [shards.check_shard(str(path), 257, 256)[0] for path in sorted(out.glob("train_*.bin"))]
        assert all(count == size for count in counts[:-1])
        assert len(counts) == 1 or 0.5 * size <= counts[-1] < 1.5 * size
        assert b"".join(decode(out, "train") + decode(out, "val")) == text.encode()


@pytest.mark.parametrize("count,fraction", [(400, 0.05), (97, 0.1), (50, 0.5)])
def test_many_documents_split_whole(count, fraction, tmp_path):
    texts = [f"document {i}\n{prose(60, i)}" for i in range(count)]
    write_lines(tmp_path / "a.jsonl", texts)
    assert (
        run(
            tmp_path / "a.jsonl",
            "--out",
            tmp_path / "out",
            "--raw-bytes",
            "--val-fraction",
            fraction,
            "--min-tokens",
            1,
        )
        == 0
    )
    train, val = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    assert len(val) == int(count * fraction) and not set(train) & set(val)
    assert sorted(train + val) == sorted(text.encode() for text in texts)
    assert [text.encode() for text in texts if text.encode() in set(train)] == train  # in the order they came


def test_few_documents_lose_their_tails(tmp_path):
    texts = [prose(4000 + 500 * i, i) for i in range(5)]
    write_lines(tmp_path / "a.jsonl", texts)
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--raw-bytes") == 0
    train, val = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    assert [head + tail for head, tail in zip(train, val, strict=True)] == [text.encode() for text in texts]
    assert all(0.02 < len(tail) / len(text) < 0.08 for tail, text in zip(val, texts))


def test_every_kind_of_file_in_a_directory(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    texts = {name: [f"{name} {i} {prose(300, i)}" for i in range(3)] for name in ("a", "b", "c", "d", "e", "f")}
    write_lines(folder / "a.jsonl", texts["a"])
    write_lines(folder / "b.jsonl.gz", texts["b"], gzip.open)
    half = len(json.dumps({"text": texts["c"][0]})) + 1
    whole = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts["c"])
    press = zstandard.ZstdCompressor()
    (folder / "sub" / "c.jsonl.zst").write_bytes(
        press.compress(whole[:half]) + press.compress(whole[half:])
    )  # two frames
    with gzip.open(folder / "sub" / "d.txt.gz", "wb") as file:
        file.write("".join(texts["d"]).encode())
    (folder / "sub" / "e.txt").write_bytes(b"\xef\xbb\xbf" + "".join(texts["e"]).encode())
    (folder / "sub" / "f.txt.zst").write_bytes(press.compress("".join(texts["f"]).encode()))
    (folder / "sub" / "g.txt").write_text("  \n\n")
    for other in (folder / "picture.png", folder / ".hidden" / "x.txt", folder / ".x.txt"):
        other.write_bytes(b"\xff\xfe never read")
    assert run(folder, "--out", tmp_path / "out", "--raw-bytes", "--val-fraction", 0) == 0
    expected = texts["a"] + texts["b"] + texts["c"] + ["".join(texts[name]) for name in "def"]
    assert decode(tmp_path / "out", "train") == [text.encode() for text in expected]
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert summary["train"]["documents"] == 12 and summary["left_out"]["empty_documents"] == 1


def test_field_and_separator(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": "no"}\n\n{"body": "two"}\n')
    assert (
        run(
            tmp_path / "a.jsonl",
            "--field",
            "body",
            "--out",
            tmp_path / "a",
            "--raw-bytes",
            "--val-fraction",
            0,
            "--min-tokens",
            1,
        )
        == 0
    )
    assert decode(tmp_path / "a", "train") == [b"one", b"two"]
    monkeypatch.setattr(corpus, "CHUNK", 7)
    (tmp_path / "b.txt").write_text("\nà one\n<|endoftext|>\n two à\n\n<|endoftext|><|endoftext|> \nthree")
    for kind in (["--raw-bytes"], ["--train-tokenizer", 257]):
        assert (
            run(
                tmp_path / "b.txt",
                "--split-on",
                "<|endoftext|>",
                "--out",
                tmp_path / "b",
                *kind,
                "--val-fraction",
                0,
                "--min-tokens",
                1,
                "--force",
            )
            == 0
        )
        assert decode(tmp_path / "b", "train") == ["à one".encode(), "two à".encode(), b"three"]


def test_spelled_out_end_of_text_is_only_text(gpt2_like, tmp_path):
    text = prose(3000) + " <|endoftext|> " + prose(3000)
    (tmp_path / "text.txt").write_bytes(text.encode())
    for kind in (["--tokenizer", gpt2_like], ["--train-tokenizer", 300], ["--raw-bytes"]):
        assert run(tmp_path / "text.txt", "--out", tmp_path / "out", *kind, "--val-fraction", 0, "--force") == 0
        assert decode(tmp_path / "out", "train") == [text.encode()]


def test_trained_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_bytes(prose(200_000).encode())
    for size in (257, 300, 400):
        assert run(tmp_path / "text.txt", "--out", tmp_path / str(size), "--train-tokenizer", size) == 0
        tokens, eot = vocabulary.read_binary(str(tmp_path / str(size) / "tokenizer.bin"))
        assert len(tokens) == size and tokens[eot] == b"<|endoftext|>" and set(map(len, tokens)) >= {1}
        assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    sizes = [(tmp_path / str(size) / "train_000000.bin").stat().st_size for size in (257, 300, 400)]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2] * 1.02
    # The tail meant for validation is never seen.
    (tmp_path / "tail.txt").write_text("abab " * 2000 + "\n" + "zq" * 260 + "\n")
    assert run(tmp_path / "tail.txt", "--out", tmp_path / "tail", "--train-tokenizer", 300, "--min-tokens", 1) == 0
    assert b"zq" not in vocabulary.read_binary(str(tmp_path / "tail" / "tokenizer.bin"))[0]


def test_workers_do_not_change_a_byte(tmp_path):
    texts = [prose(3000, i) for i in range(150)]
    write_lines(tmp_path / "a.jsonl", texts)
    assert (tmp_path / "a.jsonl").stat().st_size > corpus.PIECE  # a smaller corpus needs no processes
    names = ("train_000000.bin", "train_000001.bin", "val_000000.bin", "tokenizer.bin", "tokenizer.json")
    written = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        # A process of its own, so that another seed of Python's hashes would show.
        subprocess.run(
            [
                sys.executable,
                f"{HERE}/prepare.py",
                tmp_path / "a.jsonl",
                "--out",
                out,
                "--train-tokenizer",
                "300",
                "--shard-tokens",
                "150000",
                "--workers",
                str(workers),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        written.append([(out / name).read_bytes() for name in names])
    assert written[0] == written[1]
    assert sorted(decode(out, "train") + decode(out, "val")) == sorted(text.encode() for text in texts)


def test_tokenizer_sample_is_even_and_bounded():
    pieces = [(i % 2, True, f"{i:04}" * 25) for i in range(2000)]  # 1,000 pieces of 100 characters are for training
    taken = [int(text[:4]) for text in prepare.sample(iter(pieces), 5_000, 100_000)]
    assert 49 <= len(taken) <= 52 and not any(index % 2 for index in taken)
    assert max(np.diff(taken)) <= 44 and taken[0] == 0 and taken[-1] > 1900
    assert len(list(prepare.sample(iter(pieces), 5_000, 1000))) == 50  # compressed a hundredfold
    assert len(list(prepare.sample(iter(pieces), 1e9, 100_000))) == 1000


@pytest.mark.parametrize("kind", ["jsonl", "txt.gz"])
def test_memory_does_not_grow_with_the_input(kind, tmp_path):
    text = prose(40_000)
    line = json.dumps({"text": text}).encode() + b"\n" if kind == "jsonl" else text.encode()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import prepare; code = prepare.main(sys.argv[2:]); "
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    peaks = []
    for count in (10, 600):  # 0.5 and 30 MB
        data = line * count
        (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data, 1) if kind == "txt.gz" else data)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                HERE,
                tmp_path / f"a.{kind}",
                "--out",
                tmp_path / f"out{count}",
                "--raw-bytes",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-2]))
    assert peaks[1] < peaks[0] + 12_000  # KiB; holding the input would add 30,000 or more


def test_few_batches_are_under_way():
    """The reader never runs ahead of the workers by more than two batches each, and the order is kept."""
    under_way, most = [], 0

    class Pipe:
        def __init__(self):
            self.mine = []

        def send(self, batch):
            nonlocal most
            self.mine.append(batch)
            under_way.append(batch)
            most = max(most, len(under_way))

        def recv(self):
            under_way.remove(self.mine[0])
            return self.mine.pop(0)

        def close(self):
            pass

    workers = object.__new__(prepare.Workers)
    workers.pipes = [Pipe() for _ in range(3)]
    assert list(workers.encode(range(20))) == list(range(20))
    assert most == 6


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL", "a worker's death"])
def test_interrupted_run_leaves_nothing_final(how, gpt2_like, tmp_path):
    write_lines(tmp_path / "a.jsonl", [prose(30_000)] * 400)
    out, errors = tmp_path / "out", tmp_path / "errors"
    options = ["--out", out, "--tokenizer", gpt2_like, "--shard-tokens", "20000", "--workers", "2"]
    command = [sys.executable, f"{HERE}/prepare.py", tmp_path / "a.jsonl", *options]
    with open(errors, "w") as file:
        # Whoever starts the tests in the background has them ignore SIGINT, and a child would inherit that.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        wait_until(lambda: len(list(out.glob(".partial/train_*.bin"))) >= 3)
        workers = children(process.pid)
        assert len(workers) >= 2
        if how == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        elif how == "a worker's death":
            os.kill(workers[-1], signal.SIGKILL)
        else:
            process.send_signal(getattr(signal, how))
        code = process.wait(30)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers))  # none outlives the run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if how == "SIGKILL":
        assert [path.name for path in out.iterdir()] == [".partial"]
        write_lines(tmp_path / "b.jsonl", [prose(3000)])
        assert run(tmp_path / "b.jsonl", "--out", out, "--raw-bytes", "--min-tokens", 1) == 0  # over the leftovers
        assert not (out / ".partial").exists()
    else:
        said = "a worker was killed" if "worker" in how else "stopped; nothing was written"
        assert code == 1 and not out.exists()
        lines = [line for line in errors.read_text().splitlines() if not line.startswith("prepare: ")]  # progress
        assert len(lines) == 1 and lines[0].startswith(f"prepare.py: error: {said}")


def test_failed_write_leaves_the_old_set(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_bytes(prose(40_000).encode())
    out = tmp_path / "out"
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # stands in for a full disk
    try:
        code = run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--force", "--val-fraction", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 1 and "free some space" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_force_and_lock(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(prose(40_000).encode())
    out = tmp_path / "out"
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--shard-tokens", 5000) == 0
    (out / "mine.txt").write_text("stays")
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes") == 2
    assert "--force" in capsys.readouterr().err and len(list(out.glob("train_*.bin"))) > 1
    with shards.Output(str(out), True):
        assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--force") == 2
        assert "another run" in capsys.readouterr().err
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--force") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json",
        "mine.txt",
        "tokenizer.bin",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_verify(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(prose(40_000).encode())
    out = tmp_path / "out"
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--shard-tokens", 9000) == 0
    assert run("--verify", out) == 0
    assert "all is well" in capsys.readouterr().out
    shard = out / "train_000001.bin"
    good = shard.read_bytes()
    for bad, says in (
        (b"", "shorter than a header"),
        (good[:-1], "header's"),
        (good + b"\0\0", "header's"),
        (b"\1" + good[1:], "magic"),
        (good[:-2] + struct.pack("<H", 257), "is 257"),
        (good[:8] + struct.pack("<i", -1) + good[12:], "header's"),
    ):
        shard.write_bytes(bad)
        assert run("--verify", out) == 2
        error = capsys.readouterr().err
        assert "train_000001.bin" in error and says in error
    shard.unlink()
    assert run("--verify", out) == 2 and "train_000001.bin is missing" in capsys.readouterr().err
    for path in sorted(out.glob("train_*.bin"))[1:]:
        path.unlink()
    assert run("--verify", out) == 2 and "dataset.json says" in capsys.readouterr().err


def test_long_words_stay_below_what_the_binary_holds(tmp_path):
    (tmp_path / "text.txt").write_text(("=" * 700 + " and\n") * 100)
    assert run(tmp_path / "text.txt", "--out", tmp_path / "out", "--train-tokenizer", 600, "--min-tokens", 1) == 0
    tokens, _ = vocabulary.read_binary(str(tmp_path / "out" / "tokenizer.bin"))
    assert 128 < max(map(len, tokens)) <= 255  # unbounded, a run of 700 would become one token


def test_damaged_tokenizer_binaries(tmp_path):
    good = struct.pack("<4i", 20240328, 2, 2, 1) + bytes(1008) + b"\x01a\x02bc"
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(good)
    assert vocabulary.read_binary(str(path)) == ([b"a", b"bc"], 1)
    for bad in (
        good[:-1],
        good + b"x",
        good[:1000],
        good[:1024],
        good[:1026],
        b"\0" + good[1:],
        good[:1024] + b"\x00\x02bc",
        good[:8] + struct.pack("<i", 2**31 - 1) + good[12:],
    ):
        path.write_bytes(bad)
        with pytest.raises(InputError):
            vocabulary.read_binary(str(path))
