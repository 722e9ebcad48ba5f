"""plot_loss.py: what it reads from a log, and that the picture shows it."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest

import plot_loss

HERE = os.path.dirname(os.path.abspath(__file__))


def write_log(folder, steps=200, tail='{"event":"step","step":201,"lo'):
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {"event": "step", "step": step, "loss": 2 + 5 * math.exp(-step / 40), "tokens": step * 8192, "lr": 1e-3}
        )
        if step % 50 == 0:
            lines.append({"event": "val", "step": step, "loss": 2.5 + 5 * math.exp(-step / 40), "tokens": step * 8192})
            lines.append({"event": "sample", "step": step, "text": "And it came to pass"})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + tail)


def test_curves_of_a_torn_log(tmp_path):
    write_log(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:  # a resumed run goes on after the torn line
        file.write(
            '\n{"event":"skip","step":202,"loss":1e9,"tokens":1654784}\n[1]\n{"event":"step","loss":NaN,"tokens":9}\n'
            '{"event":"val","step":203,"loss":2.25,"tokens":1662976}\n'
        )
    train, val = plot_loss.read_log(str(tmp_path / "log.jsonl"))
    assert len(train[0]) == 200 and train[0][0] == 8192 and train[1][-1] == 2 + 5 * math.exp(-5)
    assert val[0] == [50 * 8192, 100 * 8192, 150 * 8192, 200 * 8192, 1662976] and val[1][-1] == 2.25


def test_lines_that_nobody_wrote(tmp_path):
    """Whatever stands in a log, it is drawn or passed over."""
    odd = [
        '{"event":["step"],"tokens":1,"loss":2}', '{"event":{},"tokens":1,"loss":2}', '{"event":"step","tokens":1e400,"loss":2}',
        '{"event":"step","tokens":null,"loss":2}', '{"event":"step","tokens":NaN,"loss":2}', "[" * 100_000, "null", "7",
        '{"event":"step","tokens":' + "1" * 400 + ',"loss":2}', '{"event":"step","tokens":' + "1" * 5000 + ',"loss":2}',
        '{"event":"step","tokens":{},"loss":2}', '{"event":"val","tokens":1,"loss":"x"}', '{"event":"step","loss":2}', "",
    ]
    (tmp_path / "log.jsonl").write_bytes("\n".join(odd).encode() + b'\n\xff\0\n{"event":"step","tokens":8,"loss":2}\n')
    assert plot_loss.read_log(str(tmp_path / "log.jsonl")) == (([8.0], [2.0]), ([], []))
    with open(tmp_path / "log.jsonl", "a") as file:  # the largest numbers that a run can have, and what none has
        file.write('{"event":"step","tokens":9e18,"loss":3.4e38}\n' * 3 + '{"event":"step","tokens":-9,"loss":1e308}\n')
    assert plot_loss.main([str(tmp_path), "-o", str(tmp_path / "loss.png")]) == 0


def test_smoothing_keeps_lines_and_averages_noise():
    assert plot_loss.smooth([3.0]) == [3.0]
    line = [10 - i / 100 for i in range(800)]
    smoothed = plot_loss.smooth(line)
    assert smoothed[:780] == pytest.approx(line[:780])  # centred: a straight fall stays where it is
    noise = plot_loss.smooth([2 + (-1) ** i for i in range(1600)])
    assert max(abs(value - 2) for value in noise[100:]) < 0.05  # to the last point


def picture(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">2i", data[16:24]), len(data)


@pytest.mark.parametrize("kinds", [("step", "val"), ("step",), ("val",)])
def test_draws_a_picture(kinds, tmp_path):
    from matplotlib import image

    write_log(tmp_path)
    kept = [
        line
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
        if line.startswith('{"event": ') and json.loads(line)["event"] in kinds
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(kept))
    assert plot_loss.main([str(tmp_path), "-o", str(tmp_path / "loss.png")]) == 0
    (width, height), size = picture(tmp_path / "loss.png")
    assert (width, height) == (1200, 750) and size > 10_000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.jsonl", "loss.png"]
    pixels = image.imread(str(tmp_path / "loss.png"))[..., :3]
    for kind, colour in (("step", (31, 119, 180)), ("val", (255, 127, 14))):
        drawn = (abs(pixels - [part / 255 for part in colour]).max(axis=2) < 0.02).sum()
        assert (drawn > 500) == (kind in kinds)  # more than the legend's own stroke


def test_command_line_and_errors(tmp_path, capsys):
    write_log(tmp_path)
    done = subprocess.run(
        [sys.executable, f"{HERE}/plot_loss.py", tmp_path, "-o", tmp_path / "a.svg", "--title", "a run"],
        env={key: value for key, value in os.environ.items() if key != "DISPLAY"},
    )
    assert done.returncode == 0 and "<svg" in (tmp_path / "a.svg").read_text()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "log.jsonl").write_text('{"event":"plan"}\n')
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "log.jsonl")  # nobody will write to it
    for arguments, says in (
        ([tmp_path / "none"], "none: cannot be read"),
        ([tmp_path / "piped"], "log.jsonl: no such file"),
        ([tmp_path / "young"], "no losses"),
        ([tmp_path, "-o", tmp_path / "no" / "a.png"], "a.png: cannot be written"),
        ([tmp_path, "-o", tmp_path / "a.xyz"], "a.xyz"),
    ):
        assert plot_loss.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
        assert not list(tmp_path.glob("*.partial"))
