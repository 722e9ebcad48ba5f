"""generate.py against a trainer that only tells how it was called."""

import importlib
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
said = open(sys.argv[sys.argv.index("--init") + 1] + "/options.toml").read()
if "--fail" in said:
    sys.stderr.write("warning: one thread\\ntrain_gpt2: the checkpoint is torn\\n")
    sys.exit(3)
sys.stderr.write("build cpu, 2 threads\\n")
if "--warn" in said:
    sys.stderr.write("warning: the prompt has 9 tokens\\n")
called = sys.argv[1:]
if "--config" in called:
    at = called.index("--config")
    name, value = open(called[at + 1]).read().split(" = ")
    called[at : at + 2] = [name, value]
print(json.dumps(called))
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


def generate(*arguments, **options):
    command = [sys.executable, f"{HERE}/generate.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


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
    return b"".join(table[token] for token in json.loads(tokens))


@pytest.mark.parametrize("prompt", ["In the beginning", "naïve 漢字 🙂", "-5 is a number", "<|endoftext|> spelled"])
def test_calls_the_trainer(prompt, run, data, trainer):
    done = generate(run, prompt, "--tokens", 40, "--temperature", 0.7, "--top-k", 5, "--seed", 9, "--trainer", trainer)
    assert done.returncode == 0 and done.stderr == ""  # the trainer's header does not mix with the text
    called = json.loads(done.stdout)
    options = dict(zip(called[::2], called[1::2], strict=True))
    tokens = options.pop("prompt-tokens")
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
    assert eot not in json.loads(tokens)


def test_a_prompt_of_any_length_from_anywhere(run, data, trainer, tmp_path):
    prompt = TEXT * 40  # above 200 KB, beyond what a command line takes
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    for arguments, given in ((["-f", tmp_path / "prompt.txt"], None), (["-"], prompt), (["--file", "-"], prompt)):
        done = generate(run, *arguments, "--trainer", trainer, input=given)
        assert done.returncode == 0, done.stderr
        called = json.loads(done.stdout)
        assert called[-2] == "prompt-tokens" and decoded(called[-1], data / "tokenizer.bin") == prompt.encode()


def test_options_stand_anywhere(run, data, trainer):
    for arguments in ([run, "--tokens", 5, "text"], ["--tokens", 5, run, "text"], [run, "text", "--tokens", 5]):
        called = json.loads(generate("--trainer", trainer, *arguments).stdout)
        assert decoded(called[-1], data / "tokenizer.bin") == b"text" and called[7] == "5"


def test_a_warning_about_the_prompt_is_heard(run, trainer):
    with open(run / "options.toml", "a") as file:
        file.write("# --warn\n")
    done = generate(run, "x", "--trainer", trainer)
    assert done.returncode == 0 and done.stderr == "warning: the prompt has 9 tokens\n"


def test_a_checkpoint_that_goes_while_it_is_looked_at(tmp_path, monkeypatch):
    """A trainer that saves here removes the oldest one: the next look finds what took its place."""
    generate = importlib.import_module("generate")
    monkeypatch.setattr(generate, "WAIT", 0)
    weights = tmp_path / "step_00000020/model.bin"
    weights.parent.mkdir()
    weights.write_bytes(struct.pack("<i", 20261124))
    found = iter([str(tmp_path / "step_00000010/model.bin"), str(weights)])
    monkeypatch.setattr(generate, "newest_weights", lambda run: next(found))
    assert generate.trainer_of(str(tmp_path)).endswith("train_pythia")
    monkeypatch.setattr(generate, "newest_weights", lambda run: str(tmp_path / "gone"))
    with pytest.raises(generate.Refused, match="was removed"):
        generate.trainer_of(str(tmp_path))


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
    (tmp_path / "latin1.txt").write_bytes(b"na\xefve")
    cases = [
        ([tmp_path / "none", "x"], "no such run folder"),
        ([trainer, "x"], "weights file"),
        ([run, "x", "--tokenizer", tmp_path / "none.bin"], "none.bin: no such file"),
        ([run, "x", "--tokenizer", lonely], "lonely.json: no such file"),
        ([run, "x", "--tokenizer", strange], "do not belong together"),
        ([run, "x", "--tokenizer", tmp_path / "torn.bin"], "not a tokenizer binary"),
        ([run, "x", "--trainer", tmp_path / "none"], "build it with make"),
        ([run, "x", "--tokens", "many"], "invalid int value"),
        ([run, "x", "--file", lonely], "both given"),
        ([run, "--file", tmp_path / "none.txt"], "none.txt: cannot be read"),
        ([run, "--file", tmp_path / "latin1.txt"], "latin1.txt is not valid UTF-8"),
    ]
    for arguments, says in cases:
        assert says in refused(capfd, "--trainer", trainer, *arguments)
    os.mkfifo(tmp_path / "pipe.bin")  # nobody will write to it
    assert "no such file" in refused(capfd, run, "x", "--tokenizer", tmp_path / "pipe.bin", "--trainer", trainer)
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
    assert done.returncode == 3 and done.stderr == "generate.py: error: train_gpt2: the checkpoint is torn\n"


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
