"""8-bit optimizer states learn what fp32 ones do, on a real text: dev/bench/int8_states.py, the whole of it."""

import json
import subprocess
import sys

import pytest

from runs import ROOT


@pytest.mark.long
def test_a_thousand_steps_end_within_half_a_percent(tmp_path):
    text = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters = {}
    for line in text.splitlines():
        chapters.setdefault(line.split(":")[0], []).append(line)
    (tmp_path / "bible.txt").write_text("\n\n".join("\n".join(lines) for lines in chapters.values()))
    tokens = tmp_path / "tokens"
    commands = [
        [ROOT / "data/prepare.py", tmp_path / "bible.txt", "--out", tokens, "--train-tokenizer", "1024", "--split-on",
         "\n\n", "--val-fraction", "0.02"],
        [ROOT / "dev/bench/int8_states.py", tmp_path / "out", "--train", f"{tokens}/train_*.bin", "--val",
         f"{tokens}/val_*.bin", "--tokenizer", tokens / "tokenizer.bin"],
    ]
    for command in commands:
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = json.loads((tmp_path / "out/losses.json").read_text())
    assert len(rows) == 6
    for row in rows:
        assert row["fp32"] < 4 and abs(row["ratio"] - 1) <= 0.005, row
    assert (tmp_path / "out/int8_states.png").stat().st_size > 10_000
