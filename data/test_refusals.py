"""What prepare.py refuses: each in one line that names the place, with exit code 2 and nothing written."""

import gzip
import json
import os
import shutil

import pytest
import zstandard

import corpus
from testing import decode, prose, run


BAD_LINES = [
    (b'{"text": "cut', "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"other": "x"}', '"text"'),
    (b'{"text": 3}', '"text"'),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b"[" * 200_000, "nested"),
]


@pytest.mark.parametrize("line,says", BAD_LINES, ids=[says for _, says in BAD_LINES])
def test_bad_line_is_named_or_skipped(line, says, tmp_path, capsys):
    good = json.dumps({"text": prose(3000)}).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good)
    for kind in (["--raw-bytes"], ["--train-tokenizer", 257]):
        command = [tmp_path / "a.jsonl", "--out", tmp_path / "out", *kind, "--min-tokens", 1]
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert "a.jsonl:3: " in error and says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
        assert run(*command, "--skip-bad") == 0
        assert "1 bad line left out" in capsys.readouterr().out
        assert len(decode(tmp_path / "out", "train")) == 2
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 1000])  # characters are cut anywhere
def test_text_that_is_not_utf8(chunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    options = ["--out", tmp_path / "out", "--val-fraction", 0, "--min-tokens", 1]
    for broken, at in ((b"\xff\xe6\xbc", 0), (b"\xe6\xbc!\xe6", 0), (b"\xc3\xa9\xf0\x9f\x99", 2)):
        data = "àé漢".encode() * 40 + broken + "字 \ufffd end".encode()
        (tmp_path / "text.txt").write_bytes(data)
        assert run(tmp_path / "text.txt", *options, "--train-tokenizer", 257, "--force") == 2
        assert f"byte {40 * 7 + at:,} is not UTF-8" in capsys.readouterr().err
        assert run(tmp_path / "text.txt", *options, "--train-tokenizer", 257, "--replace-invalid", "--force") == 0
        plain = data.decode(errors="replace")
        assert decode(tmp_path / "out", "train") == [plain.encode()]
        assert f"{plain.count(chr(0xFFFD)) - 1} undecodable place" in capsys.readouterr().out
        assert run(tmp_path / "text.txt", *options, "--raw-bytes", "--force") == 0
        assert decode(tmp_path / "out", "train") == [data]


def test_errors_are_one_line_with_a_code(gpt2_like, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(prose(40_000).encode())
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(prose(9000).encode())[:-20])
    (tmp_path / "torn.txt.zst").write_bytes(zstandard.compress(prose(9000).encode())[:-20])
    (tmp_path / "plain.txt.gz").write_text("not compressed at all")
    (tmp_path / "plain.txt.zst").write_text("not compressed at all")
    os.mkfifo(tmp_path / "pipe.txt")  # nobody will write to it
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wordpiece.json").write_text('{"model": {"type": "WordPiece"}}')
    made = json.loads(gpt2_like.read_text())
    made["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "prefix.json").write_text(json.dumps(made))
    large = json.loads(gpt2_like.read_text())
    large["added_tokens"].append(dict(large["added_tokens"][0], id=70_000, content="<far>"))
    large["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(large))
    out, raw = ["--out", tmp_path / "out"], ["--raw-bytes"]
    cases = [
        ([tmp_path / "none.txt", *out, *raw], "none.txt: no such file"),
        ([tmp_path / "empty.txt", *out, *raw], "no text in 1 file"),
        ([tmp_path / "folder", *out, *raw], "no files to read"),
        ([tmp_path / "short.txt", *out, *raw], "fewer than --min-tokens 1,025"),
        ([text, *out, *raw, "--val-fraction", 0.001], "val would have"),
        ([tmp_path / "torn.txt.gz", *out, *raw], "torn.txt.gz: cannot be read"),
        ([tmp_path / "torn.txt.zst", *out, *raw], "cut short"),
        ([tmp_path / "plain.txt.gz", *out, *raw], "plain.txt.gz: cannot be read"),
        ([tmp_path / "plain.txt.zst", *out, *raw], "plain.txt.zst: cannot be read"),
        ([tmp_path / "pipe.txt", *out, *raw], "pipe.txt: cannot be read (no regular file)"),
        ([text, *out, "--tokenizer", tmp_path / "pipe"], "pipe: cannot be read (no regular file)"),
        ([tmp_path / "list.json", *out, *raw], "named .jsonl"),
        ([text, *out, "--tokenizer", tmp_path / "none.json"], "none.json: cannot be read (No such file or directory); scripts/download_hf.py"),
        ([text, *out, "--tokenizer", tmp_path / "list.json"], "not a tokenizer.json"),
        ([text, *out, "--tokenizer", tmp_path / "wordpiece.json"], "wordpiece.json: "),
        ([text, *out, "--tokenizer", tmp_path / "prefix.json"], "prefix space"),
        ([text, *out, "--tokenizer", tmp_path / "large.json"], "70,001 tokens"),
        ([text, *out, "--tokenizer", gpt2_like, "--eot-token", "</s>"], '"</s>"'),
        ([text, *out, "--train-tokenizer", 65_537], "65,536"),
        ([text, *out, "--train-tokenizer", 256], "257"),
        ([text, *out, *raw, "--train-tokenizer", 300], "not allowed with"),
        ([text, *out], "choose a tokenizer"),
        ([text, *raw], "--out"),
        ([*out, *raw], "inputs or --recipe"),
        ([text, *out, *raw, "--val-fraction", "nan"], "0 to 0.5"),
        ([text, *out, *raw, "--shard-tokens", 2**31], "whole number"),
        ([text, "--out", text, *raw], "is a file"),
        (["--verify", tmp_path / "folder"], "tokenizer.bin"),
    ]
    for arguments, says in cases:
        code = run(*arguments)
        error = capsys.readouterr().err
        assert code == 2 and says in error and error.startswith("prepare.py: error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists(), arguments
