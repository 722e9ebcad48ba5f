"""Every file that a program here reads, harmed in some way, and each program that reads it. Whatever the harm, the reader
ends as it says it does, leaves its inputs as they were and nothing half-written, and takes no harm for health where a
size, a checksum or a number shows it."""

import gzip
import json
import os
import random
import shutil
import struct

import pytest

from runs import BUILDS, ROOT
from trials import PROGRAMS, Trial, changed, covered, hold, snapshot, whole_checkpoints

PYTHON = ROOT / ".venv/bin/python"
NEWEST = "run/step_00000004"
# Sizes and counts that a header may claim.
CLAIMS = [0, 1, -1, 2, 3, 5, 6, 64, 127, 255, 256, 257, 50257, 65535, 65536, 65537, 1 << 20, 1 << 30, (1 << 31) - 1, -1 << 31]
VALUES = [None, True, -1, 0, 1, 2, 3.5, 1e300, 1 << 31, 1 << 62, 1_000_000_000, "", "x", "é漢", "x" * 100_000, [], {}, [[]],
          ["x"], {"x": 1}, float("nan"), float("inf")]


def tool(name):
    folder = "data" if name == "prepare.py" else "scripts"
    # A number in a small file must not become all of the memory.
    return ["sh", "-c", 'ulimit -v 4000000; exec "$0" "$@"', PYTHON, ROOT / folder / name]


class Reader:
    """A call, the files it reads (the first of a glob's matches), and what it may write."""

    def __init__(self, program, words, files, writes="out"):
        self.program, self.words, self.files, self.writes = program, words, files, writes


TOKENS = "prepared/tokenizer.bin"
SHARDS = ["prepared/train_000000.bin", "prepared/val_000000.bin", "prepared/dataset.json"]
CHECKPOINT = [f"{NEWEST}/{part}" for part in ("model.bin", "optimizer.bin", "manifest.json")]
DATA = ["--train", "prepared/train_*.bin", "--val", "prepared/val_*.bin", "--tokenizer", TOKENS]
SHORT = ["--context", 16, "--batch", 2, "--tokens-per-step", 32, "--val-tokens", 64, "--sample-every", 1,
         "--sample-tokens", 4, "--memory", "1GiB", "--host-memory", "1GiB", "--threads", 1]
READERS = {
    "train": Reader("", ["--init", "weights.bin", *DATA, *SHORT, "--steps", 2, "--out", "out"], ["weights.bin", TOKENS, *SHARDS]),
    "config": Reader("", ["--config", "config.toml", "--steps", 2, "--out", "out"], ["config.toml", TOKENS, *SHARDS]),
    "resume": Reader("", ["--resume", "--out", "run", "--steps", 6],
                     [*CHECKPOINT, *CHECKPOINT, "run/options.toml", "run/log.jsonl", TOKENS, *SHARDS], "run"),
    "init run": Reader("", ["--init", "run", *DATA, *SHORT, "--steps", 2, "--out", "out"], CHECKPOINT),
    "eval loss": Reader("", ["--eval", "loss", "--init", "weights.bin", "--val", "prepared/val_*.bin"],
                        ["weights.bin", SHARDS[1], SHARDS[2]]),
    "eval sample": Reader("", ["--eval", "sample", "--init", "run", "--tokenizer", TOKENS], [*CHECKPOINT, TOKENS]),
    "plan": Reader("", ["--plan", "--init", "weights.bin", "--context", 16], ["weights.bin"]),
    "verify": Reader("prepare.py", ["--verify", "prepared"], [TOKENS, "prepared/tokenizer.json", *SHARDS], ""),
    "prepare": Reader("prepare.py", ["corpus.jsonl.gz", "corpus.jsonl", "--out", "out", "--tokenizer", "prepared/tokenizer.json",
                                     "--min-tokens", 64, "--workers", 1],
                      ["corpus.jsonl.gz", "corpus.jsonl", "prepared/tokenizer.json"]),
    "back": Reader("convert_hf.py", ["weights.bin", "--back", "out", "--tokenizer", "prepared/tokenizer.json"],
                   ["weights.bin", "prepared/tokenizer.json"]),
    "back run": Reader("convert_hf.py", ["run", "--back", "out"], [*CHECKPOINT, "run/options.toml", TOKENS]),
    "to": Reader("convert_hf.py", ["hf", "--to", "out"], ["hf/config.json", "hf/config.json", "hf/model.safetensors"]),
    "to tokenizer": Reader("convert_hf.py", ["--tokenizer", "prepared/tokenizer.json", "--to", "out"],
                           ["prepared/tokenizer.json"]),
    "generate": Reader("generate.py", ["run", "the lord said", "--tokens", 4],
                       [*CHECKPOINT, "run/options.toml", TOKENS, "prepared/tokenizer.json"], ""),
    "plot": Reader("plot_loss.py", ["run", "-o", "out.png"], ["run/log.jsonl"], "out.png"),
}
# Python programs take a second each to start, trainers a tenth.
WEIGHTS = [1 if reader.program else 4 for reader in READERS.values()]


@pytest.fixture(scope="session")
def grounds(tmp_path_factory):
    """For each program and precision a folder with one of each file."""
    made = {}
    draw = random.Random(1)
    words = "the of and that lord's shall unto naïve 漢字 12 1611 said ( ) ; : . , \n".split(" ")
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(60)]
    first = tmp_path_factory.mktemp("ground")
    (first / "text.txt").write_text("\n".join(texts))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (first / "corpus.jsonl").write_text(lines)
    (first / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    trial = Trial(0, first)
    trial.run([*tool("prepare.py"), "text.txt", "--out", "prepared", "--train-tokenizer", 300, "--min-tokens", 64,
               "--val-fraction", "0.2", "--workers", 1], "prepare.py", codes={0})
    for program in PROGRAMS:
        for precision in BUILDS:
            folder = tmp_path_factory.mktemp("ground") / "all"
            shutil.copytree(first, folder)
            trial = Trial(0, folder)
            config = ["--model", "1,32,1", *DATA, *SHORT]
            trial.run([trial.binary(program, precision), *config, "--steps", 4, "--save-every", 2, "--out", "run"], program,
                      codes={0})
            shutil.copy(folder / NEWEST / "model.bin", folder / "weights.bin")
            (folder / "config.toml").write_text("".join(
                f"{name[2:]} = {value if isinstance(value, int) else json.dumps(value)}\n"
                for name, value in zip(config[::2], config[1::2])))
            trial.run([*tool("convert_hf.py"), "run", "--back", "hf", "--tokenizer", "prepared/tokenizer.json"],
                      "convert_hf.py", codes={0})
            (folder / "stderr.txt").unlink()
            made[program, precision] = folder
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Harm. Each takes bytes to bytes, or works on the path itself and returns None.


def cut(trial, content):
    ends = [0, 1, 4, 7, 8, 1023, 1024, 1025, 1026, len(content) // 2, len(content) - 1, len(content) - 2]
    return content[: trial.rng.choice([end for end in ends if 0 <= end < len(content)] + [trial.rng.randrange(len(content))])]


def longer(trial, content):
    return content + trial.rng.choice([b"\0", b"\n", b"\xff" * 7, b"x" * 4096, content])


def flip(trial, content):
    at = trial.rng.randrange(min(80, len(content)) if trial.chance(0.5) else len(content))
    return content[:at] + bytes([content[at] ^ 1 << trial.rng.randrange(8)]) + content[at + 1 :]


def claim(trial, content):
    at = 4 * trial.rng.randrange(min(18, len(content) // 4))
    return content[:at] + struct.pack("<i", trial.rng.choice(CLAIMS)) + content[at + 4 :]


def no_numbers(trial, content):
    at = (max(1024, trial.rng.randrange(len(content))) & ~3) if len(content) > 1100 else 0
    return content[:at] + struct.pack("<f", trial.rng.choice([float("nan"), float("inf"), -float("inf")])) + content[at + 4 :]


def blank(trial, content):
    at = trial.rng.randrange(len(content))
    return content[:at] + bytes(min(200, len(content) - at)) + content[at + 200 :]


def noise(trial, content):
    return trial.rng.randbytes(trial.rng.choice([1, 100, 1024, 5000]))


def other_file(trial, content):
    files = [path for path in trial.folder.rglob("*") if path.is_file()]
    return trial.rng.choice(sorted(files)).read_bytes()


def other_value(trial, content):
    """One value of a JSON file, or of one line of it, is another, or is gone."""
    lines = content.decode(errors="replace").splitlines()
    which = trial.rng.randrange(len(lines) or 1)
    try:
        whole, value = True, json.loads(content)
    except ValueError:
        try:
            whole, value = False, json.loads(lines[which])
        except (ValueError, IndexError):
            return flip(trial, content)
    places = list(walk(value))
    if not places:
        return b"null"
    inside, key = trial.rng.choice(places)
    if trial.chance(0.2):
        del inside[key]
    else:
        inside[key] = trial.rng.choice(VALUES)
    text = json.dumps(value)
    if trial.chance(0.05):
        text = "[" * 100_000 + text
    if not whole:
        text = "\n".join([*lines[:which], text, *lines[which + 1 :], ""])
    return text.encode()


def walk(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items)[:50]:
        yield value, key
        yield from walk(inside)


def other_line(trial, content):
    lines = content.split(b"\n")
    at = trial.rng.randrange(len(lines))
    new = trial.rng.choice([b"", b"x", b"= 3", b"seed = 99999999999999999999", lines[at] + lines[at], b'model = "2,64', b"\xff\xfe",
                            b"[table]", b"steps = 1e3", b"\0" * 50, lines[at].replace(b"=", b"= -"), b"[" * 5000])
    return b"\n".join(lines[:at] + [new] + lines[at + trial.rng.choice([0, 1, 1, 1]) :])


def gone(trial, path):
    path.unlink()


def folder_there(trial, path):
    path.unlink()
    path.mkdir()


def loop_there(trial, path):
    path.unlink()
    path.symlink_to(path.name)


def pipe_there(trial, path):
    path.unlink()
    os.mkfifo(path)


def link_there(trial, path):
    """A link to the very file: no harm."""
    moved = path.with_name(path.name + ".kept")
    path.rename(moved)
    path.symlink_to(moved.name)


BYTES = [cut, cut, cut, longer, flip, flip, claim, claim, no_numbers, blank, noise, other_file]
TEXT = [cut, flip, other_value, other_value, other_value, other_value, other_line, noise, other_file, longer]
TOML = [cut, flip, other_line, other_line, other_line, noise, other_file]
THERE = [gone, gone, folder_there, loop_there, pipe_there, link_there]


def harm(trial, path):
    rng = trial.rng
    if trial.chance(0.12):
        how = rng.choice(THERE)
        how(trial, path)
        return how
    kinds = {".json": TEXT, ".jsonl": TEXT, ".toml": TOML}.get(path.suffix, BYTES)
    how = rng.choice(kinds)
    path.write_bytes(how(trial, path.read_bytes()))
    return how


# ---------------------------------------------------------------------------------------------------------------------


def harmed_files(trial, grounds):
    rng = trial.rng
    family, precision = rng.choice(list(grounds))
    shutil.copytree(grounds[family, precision], trial.folder, dirs_exist_ok=True)
    name = rng.choices(list(READERS), WEIGHTS)[0]
    reader = READERS[name]
    victim = rng.choice(reader.files)
    path = trial.folder / victim
    whole = path.read_bytes()
    how = harm(trial, path)
    trial.tell(f"{how.__name__} {victim}" + (f", now {path.stat().st_size} bytes of {len(whole)}" if path.is_file() else ""))
    same = path.is_file() and path.read_bytes() == whole
    covered[f"harmed files: {name}"] += 1
    covered[f"harmed files: {how.__name__}"] += 1
    before = snapshot(trial.folder)
    program = reader.program or family
    words = [*tool(program)] if reader.program else [trial.binary(program, precision)]
    words += reader.words
    if name == "generate":
        words += ["--trainer", trial.binary(family, precision)]
    code, said = trial.run(words, program)
    after = snapshot(trial.folder)
    after.pop("stderr.txt", None)
    different = changed(before, after)
    written = [name for name in different if reader.writes and name.split("/")[0] == reader.writes]
    trial.check(len(written) == len(different), f"inputs changed: {different[:5]}")
    if code:
        saved = whole_checkpoints(trial.folder / reader.writes) if not reader.program else []
        fresh = reader.writes == "out" and saved
        trial.check(not written or fresh, f"exit code {code}, and written all the same: {written[:5]}")
    if same:
        trial.check(code == 0, "refused, and there was no harm")
        return
    if how in (gone, folder_there, loop_there, pipe_there) and victim in ("run/options.toml", "run/log.jsonl") and name == "resume":
        if how == gone:
            if victim == "run/options.toml":  # a checkpoint records the options, but no paths
                trial.check(code == 2 and "--train" in said, "the paths of the data are not asked for")
                code, _ = trial.run([*words, *DATA], program)
            trial.check(code == 0, "a run cannot go on without a record that is no part of its state")
        return
    if how is link_there:
        trial.check(code == 0, "a link to a file is refused")
        return
    # An export holds nothing of the optimizer: its size alone is looked at.
    if victim.startswith(NEWEST) and not (name == "back run" and victim.endswith("/optimizer.bin")):
        trial.check(code or "step_00000004" in said or name == "generate", "a harmed checkpoint passes for a whole one")
    if code == 0 and victim.endswith(".bin") or victim.endswith(".safetensors"):
        trial.check(code or how not in (cut, longer, noise, gone, folder_there, loop_there, pipe_there) or
                    victim.startswith(NEWEST) or path.name in said, f"{how.__name__}, and taken without a word")
    if how is no_numbers and victim == "weights.bin" and name in ("train", "eval loss"):
        trial.check(code, "weights that are no numbers are taken without a word")


def test_some(grounds, tmp_path):
    hold(lambda trial: harmed_files(trial, grounds), "harmed_files", 10, tmp_path, many=False)


@pytest.mark.long
def test_many(grounds, tmp_path):
    hold(lambda trial: harmed_files(trial, grounds), "harmed_files", 1000, tmp_path, many=True)
