"""dataset.json: what prepare.py writes there, what --verify finds out with it, and the hashes that the trainer checks."""

import json
import struct

import numpy as np

import dataset
import vocabulary
from testing import prose, run


def test_the_hashes_are_the_trainers(tmp_path):
    # The values are in test/dataset.cpp and test/tokenizer.cpp too.
    for count, says in ((100, "7746a78fbe0813cb"), (100_000, "e0ef125ca6f33a98")):
        header = struct.pack("<3i", 20240520, 1, count) + bytes(1012)
        (tmp_path / "a.bin").write_bytes(header + (np.arange(count) % 65536).astype("<u2").tobytes())
        assert dataset.shard_hash(str(tmp_path / "a.bin"), count) == says
    assert dataset.tokenizer_hash([b"a", b"", b"bc"]) == "3f466c3d6a4b04ca"


def test_what_it_says_and_what_verify_makes_of_it(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(prose(100_000).encode())
    out = tmp_path / "out"
    assert run(tmp_path / "text.txt", "--out", out, "--raw-bytes", "--shard-tokens", 40_000) == 0
    summary = out / "dataset.json"
    good = json.loads(summary.read_text())
    tokens, eot = vocabulary.read_binary(str(out / "tokenizer.bin"))
    assert good["version"] == 2
    assert good["tokenizer"] == {
        "from": "raw bytes",
        "tokens": 257,
        "end_of_text": 256,
        "hash": dataset.tokenizer_hash(tokens),
    }
    for side in ("train", "val"):
        paths = sorted(out.glob(f"{side}_*.bin"))
        assert [file["name"] for file in good[side]["files"]] == [path.name for path in paths]
        assert sum(file["tokens"] for file in good[side]["files"]) == good[side]["tokens"]
        assert [file["hash"] for file in good[side]["files"]] == [
            dataset.shard_hash(str(path), (path.stat().st_size - 1024) // 2) for path in paths
        ]

    def verify(record):
        summary.write_text(record if isinstance(record, str) else json.dumps(record))
        code = run("--verify", out)
        return code, capsys.readouterr().err

    assert verify(good) == (0, "")
    files = good["train"]["files"]
    for changes, says in (
        ({"version": 3}, "version 3"),
        ({"tokenizer": good["tokenizer"] | {"hash": "0" * 16}}, "tokenizer.bin is not the one"),
        ({"tokenizer": good["tokenizer"] | {"end_of_text": 0}}, "tokenizer.bin is not the one"),
        ({"train": good["train"] | {"tokens": 5}}, "says 5"),
        ({"train": good["train"] | {"files": files[:-1]}}, f"{files[-1]['name']} is not the shard"),
        ({"train": good["train"] | {"files": files + [files[0] | {"name": "x"}]}}, "x is not the shard"),
        ({"train": good["train"] | {"files": [files[0] | {"hash": "0"}, *files[1:]]}}, "train_000000.bin is not"),
        ({"train": good["train"] | {"files": 3}}, "damaged"),
        ({"train": {"tokens": good["train"]["tokens"]}}, "damaged"),
        ({"tokenizer": None}, "damaged"),
        ({"version": None}, "damaged"),
    ):
        code, error = verify(good | changes)
        assert code == 2 and says in error and len(error.splitlines()) == 1, (changes, error)
    for text in ("", "3", "[]", "{}"):
        code, error = verify(text)
        assert code == 2 and "damaged" in error, text
    # Before it had a version it had no hashes either.
    assert verify({side: {"tokens": good[side]["tokens"]} for side in ("train", "val")}) == (0, "")

    # Another text's shard, as long: valid tokens, and not what was written here.
    summary.write_text(json.dumps(good))
    shard = out / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[1024:] = bytes(2) * (len(data[1024:]) // 2)
    shard.write_bytes(data)
    code, error = verify(good)
    assert code == 2 and "train_000000.bin is not the shard" in error
