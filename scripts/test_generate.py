"""generate.py against a trainer that only tells how it was called."""

import json
import os
import struct
import subprocess
import sys

import pytest

from generate import main

HERE = os.path.dirname(os.path.abspath(__file__))
PREPARE = os.path.join(os.path.dirname(HERE), "data", "prepare.py")
TEXT = "And it came to pass, that the king's men went up; and there were 120 of them, naïve 漢字.\n" * 60

TRAINER = """#!/usr/bin/env python3
import json, sys
if "--fail" in open(sys.argv[sys.argv.index("--init") + 1] + "/options.toml").read():
    sys.stderr.write("the checkpoint is torn\\n")
    sys.exit(3)
sys.stderr.write("build cpu, 2 threads\\n")
print(json.dumps(sys.argv[1:]))
"""


@pytest.fixture(scope="module", params=["trained", "raw"])
def data(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT)
    kind = ["--raw-bytes"] if request.param == "raw" else ["--train-tokenizer", "300"]
    subprocess.run(
        [sys.executable, PREPARE, folder / "text.txt", "--out", folder / "data", *kind, "--min-tokens", "1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "data"


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "fake_trainer"
    path.write_text(TRAINER)
    path.chmod(0o755)
    return path


@pytest.fixture
def run(tmp_path, data):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "options.toml").write_text(
        f'context=1024\nlr=0.0003\ntokenizer="{data}/tokenizer.bin"\ntrain=["a","b"]\n'
    )
    return folder


def generate(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, f"{HERE}/generate.py", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def refused(capfd, *arguments):
    """What generate.py says on stderr when it exits with 2 and prints nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith("generate.py: error: ") and printed.err.count("\n") == 1
    return printed.err


def decoded(tokens, binary):
    with open(binary, "rb") as file:
        size = struct.unpack("<256i", file.read(1024))[2]
        table = [file.read(file.read(1)[0]) for _ in range(size)]
    return b"".join(table[int(token)] for token in tokens.split(","))


@pytest.mark.parametrize("prompt", ["In the beginning", "naïve 漢字 🙂", "-5 is a number", "<|endoftext|> spelled"])
def test_calls_the_trainer(prompt, run, data, trainer):
    done = generate(run, prompt, "--tokens", 40, "--temperature", 0.7, "--top-k", 5, "--seed", 9, "--trainer", trainer)
    assert done.returncode == 0 and done.stderr == ""  # the trainer's header does not mix with the text
    called = json.loads(done.stdout)
    options = dict(zip(called[::2], called[1::2], strict=True))
    tokens = options.pop("--prompt-tokens")
    assert options == {
        "--eval": "sample",
        "--init": str(run),
        "--tokenizer": f"{data}/tokenizer.bin",
        "--sample-tokens": "40",
        "--temperature": "0.7",
        "--top-k": "5",
        "--seed": "9",
    }
    assert decoded(tokens, data / "tokenizer.bin") == prompt.encode()
    eot = struct.unpack("<4i", (data / "tokenizer.bin").read_bytes()[:16])[3]
    assert str(eot) not in tokens.split(",")


def test_what_is_not_said_is_left_to_the_trainer(run, data, trainer):
    assert json.loads(generate(run, "--trainer", trainer).stdout) == [
        "--eval",
        "sample",
        "--init",
        str(run),
        "--tokenizer",
        f"{data}/tokenizer.bin",
        "--sample-tokens",
        "256",
    ]


def test_tokenizer_beside_the_checkout_or_named(run, data, trainer, tmp_path):
    (run / "options.toml").write_text('tokenizer="data/tokenizer.bin"\n')
    done = generate(run, "x", "--trainer", trainer, cwd=data.parent)  # relative to where one stands
    assert json.loads(done.stdout)[5] == "data/tokenizer.bin"
    (run / "options.toml").unlink()
    done = generate(run, "x", "--trainer", trainer)
    assert done.returncode == 2 and "--tokenizer" in done.stderr
    (run / "options.toml").write_text("")
    done = generate(run, "x", "--trainer", trainer, "--tokenizer", data / "tokenizer.bin")
    assert done.returncode == 0 and json.loads(done.stdout)[5] == f"{data}/tokenizer.bin"


def test_errors_are_one_line(run, data, trainer, tmp_path, capfd):
    lonely = tmp_path / "lonely.bin"
    lonely.write_bytes((data / "tokenizer.bin").read_bytes())
    strange = tmp_path / "strange.bin"
    strange.write_bytes(struct.pack("<4i", 20240328, 3, 999, 0) + bytes(1008))
    (tmp_path / "strange.json").write_text((data / "tokenizer.json").read_text())
    (tmp_path / "torn.bin").write_bytes(b"\0" * 7)
    cases = [
        ([tmp_path / "none", "x"], "no such run folder"),
        ([trainer, "x"], "weights file"),
        ([run, "x", "--tokenizer", tmp_path / "none.bin"], "none.bin: cannot be read"),
        ([run, "x", "--tokenizer", lonely], "lonely.json: no such file"),
        ([run, "x", "--tokenizer", strange], "do not belong together"),
        ([run, "x", "--tokenizer", tmp_path / "torn.bin"], "not a tokenizer binary"),
        ([run, "x", "--trainer", tmp_path / "none"], "build it with make"),
        ([run, "x", "--tokens", "many"], "invalid int value"),
        ([run, "漢" * 40_000], "cannot be started"),  # its tokens do not fit into one argument
    ]
    for arguments, says in cases:
        assert says in refused(capfd, "--trainer", trainer, *arguments)
    for text, says in (
        ('tokenizer="none/t.bin"', "not there"),
        ("context=1", "without --tokenizer"),
        ("a=[", "not TOML"),
    ):
        (run / "options.toml").write_text(text)
        assert says in refused(capfd, run, "x", "--trainer", trainer)
    assert generate(run, "x").returncode == 2  # main's answer is the exit code


def test_a_failing_trainer_is_heard(run, trainer):
    with open(run / "options.toml", "a") as file:
        file.write("# --fail\n")
    done = generate(run, "x", "--trainer", trainer)
    assert done.returncode == 3 and done.stderr == "the checkpoint is torn\n"


def test_the_weights_choose_the_trainer(tmp_path):
    from generate import HOUSE, Refused, trainer_of

    for magic, name in ((20240326, "train_gpt2"), (20261124, "train_pythia")):
        folder = tmp_path / name
        (folder / "step_00000010").mkdir(parents=True)
        weights = folder / "step_00000010" / "model.bin"
        weights.write_bytes(struct.pack("<i", magic) + bytes(1020))
        for path in (folder, folder / "step_00000010", weights):
            assert trainer_of(str(path)) == os.path.join(HOUSE, name)
    weights.write_bytes(bytes(1024))
    (tmp_path / "empty").mkdir()
    for path in (weights, tmp_path / "empty"):
        with pytest.raises(Refused):
            trainer_of(str(path))
