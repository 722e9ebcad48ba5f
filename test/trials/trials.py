"""What hostile trials share. A trial draws all that it does from its seed, and then asks for what must hold of any run,
whatever befell it; what it did is told only if that does not hold.

    make test-long                                                        # hundreds of each kind, other ones each day
    SEED=17 TRIALS=1 .venv/bin/python -m pytest test/trials/test_stops.py # one of them again
"""

import concurrent.futures
import functools
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from runs import BUILDS, ROOT, chain, write_shard

PROGRAMS = ["train_gpt2", "train_pythia"]
VOCAB = 64
CODES = {0, 1, 2, 3, 4}  # done, failed, bad input, does not fit, stopped with a checkpoint
HANG = 120  # seconds after which a process that should have ended hangs
DEATHS = ("terminate called", "Traceback", "Sanitizer", "Assertion", "what():")
# One thread is right for models as small as these; what a caller's shell has set must not change what is tried.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1"}

covered = Counter()  # of all trials of this session, for the summary


class Broken(Exception):
    """What must hold of every run does not hold of this one."""


class Trial:
    def __init__(self, seed, folder):
        self.rng = random.Random(seed)
        self.folder = Path(folder)
        self.story = []

    def tell(self, text):
        self.story.append(text)

    def check(self, holds, why):
        if not holds:
            raise Broken("\n    ".join([why, *self.story]))

    def chance(self, share):
        return self.rng.random() < share

    def binary(self, program, precision="fp32"):
        return BUILDS[precision] / program

    def start(self, command, stdout=subprocess.DEVNULL, **how):
        """In the trial's folder, with standard error in a file there."""
        command = [str(word) for word in command]
        self.tell(shown(command))
        with open(self.folder / "stderr.txt", "wb") as stderr:
            return subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                                    env=ENVIRONMENT, start_new_session=True, **how)

    def end(self, process, program, codes=CODES, complains=True, patience=HANG):
        """Waits for a process that has to end, and checks how it did."""
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.check(False, f"still running after {patience} s")
        said = (self.folder / "stderr.txt").read_text(errors="replace")
        self.tell(f"  ended with {code}" + "".join("\n  | " + line[:500] for line in said.splitlines()[:8]))
        self.check(not any(death in said for death in DEATHS), "died of an error that nobody caught")
        self.check(code in codes, f"exit code {code}, expected one of {sorted(codes)}")
        if code > 0 and complains:
            lines = complaints(said)
            self.check(len(lines) == 1, f"{len(lines)} lines of complaint where one is due")
            self.check(lines[0].startswith(f"{program}: "), "the complaint does not begin with the program's name")
            self.check(len(lines[0]) > len(program) + 10, "the complaint says nothing")
        return code, said

    def run(self, command, program, **how):
        codes = how.pop("codes", CODES)
        return self.end(self.start(command, **how), program, codes)


def shown(command):
    words = [word if len(word) < 300 else f"{word[:40]}…({len(word)} characters)" for word in command]
    return " ".join(shlex.quote(word) for word in words).replace(f"{ROOT}/", "")


def complaints(said):
    """The lines that say why a program failed; warnings and the word that a stop has been heard come before."""
    return [line for line in said.splitlines() if line and not line.startswith("warning: ") and ": stopping " not in line]


def first_seed(many):
    """The long suite tries other seeds each day, so that it goes on finding; a failure names its own."""
    return int(os.environ.get("SEED", 1000 * int(time.time() // 86400) if many else 1))


def hold(trial, kind, count, folder, many):
    """Runs trials side by side, keeps count of what they covered, and fails with the story of each that broke."""
    first, count = first_seed(many), int(os.environ.get("TRIALS", count))
    broken = []

    def one(seed):
        ground = folder / str(seed)
        ground.mkdir()
        attempt = Trial(seed, ground)
        try:
            trial(attempt)
        except Broken as why:
            told = str(why)
        except Exception:  # the trial itself met what it had not thought of
            told = "\n    ".join([traceback.format_exc().splitlines()[-1], *attempt.story])
        else:
            told = ""
        if told:
            broken.append(f"{kind}, seed {seed}: {told}\n    again: SEED={seed} TRIALS=1 .venv/bin/python -m pytest "
                          f"test/trials/test_{kind}.py -m 'not long'")
        shutil.rmtree(ground, ignore_errors=True)

    workers = len(os.sched_getaffinity(0)) if many else 1  # the short suite has other tests for the other cores
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(first, first + count)))
    covered[f"{kind}: trials"] += count
    if broken:
        pytest.fail(f"{len(broken)} of {count} trials broke\n\n" + "\n\n".join(sorted(broken)), pytrace=False)


# ---------------------------------------------------------------------------------------------------------------------
# Data, and what is looked at of a run.


def write_data(folder):
    """Shards for models of 64 tokens."""
    folder.mkdir()
    write_shard(folder / "train_0.bin", chain(3000, 1))
    write_shard(folder / "train_1.bin", chain(1001, 2))
    write_shard(folder / "val_0.bin", chain(600, 3))
    return folder


@functools.cache
def snapshot(folder):
    """Every file and link below a folder by its name and bytes; but for locks, which only say who is at work."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root) / name
            if name == ".lock":
                continue
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.readlink(path)
            elif path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
            else:
                found[str(path.relative_to(folder))] = None
    return found


def changed(before, after):
    return sorted(name for name in before.keys() | after.keys()
                  if before.get(name, ...) != after.get(name, ...))


def is_whole(checkpoint):
    """By its manifest and the sizes there; hashes are the trainer's to check."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        return all((checkpoint / part["name"]).stat().st_size == part["bytes"] for part in manifest["parts"])
    except (OSError, ValueError, KeyError):
        return False


def whole_checkpoints(run):
    return sorted(path.name for path in Path(run).glob("step_*") if is_whole(path))


def is_finite(weights):
    """Whether a weights file of floats or bf16 holds numbers only."""
    content = Path(weights).read_bytes()
    if int.from_bytes(content[4:8], "little") == 3:
        return bool(np.isfinite(np.frombuffer(content[1024:], "<f4")).all())
    return bool(((np.frombuffer(content[1024:], "<u2") & 0x7F80) != 0x7F80).all())


def json_lines(path):
    """The whole lines of a log. What a kill left of a last one is no line."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
