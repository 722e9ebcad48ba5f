"""What the tests of the recipes share: small models with texts that show what they know, and stand-ins for the programs
that recipes call."""

import hashlib
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv/bin/python"
FAMILIES = ["gpt2", "pythia"]
SHORT, LONG = 64, 256
LETTERS = "abcdefgh"
SETTINGS = {"RUN", "MODEL", "NAME", "TEXT", "CORPUS", "CORPUS_FILES", "TOKENS", "CONTEXT", "SHORT", "STAGES", "STEPS",
            "TOKENS_PER_STEP", "LR", "WARMUP", "VAL_TOKENS", "TRAINER", "OPTIONS", "DEPS", "SETUP", "DRY", "ROPE",
            "SIZE", "VOCAB", "MEMORY", "HOST_MEMORY", "PLAN_FOR", "GPU", "COMPARE", "STATE", "MASTER", "GRAD"}
# A thread more only gets into the way of models as small as these.
BARE = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {"OMP_NUM_THREADS": "1"}


def call(*command, cwd=ROOT, **environment):
    return subprocess.run([str(word) for word in command], cwd=cwd, env=BARE | environment, text=True,
                          capture_output=True, timeout=600)


def run(*command, **options):
    done = call(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hub_entry(path, body):
    """A file in the hub's listing: large ones have a SHA-256 beside git's name for what git holds."""
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return {"type": "file", "path": path, "size": len(body)} | (
        {"oid": "0" * 40, "lfs": lfs} if path.endswith(".safetensors") else {"oid": blob})


def losses(said):
    return [float(line.split()[1]) for line in said.splitlines() if line.startswith("val_loss ")]


def table_of(said):
    """The rows of the table that ends a recipe."""
    rows = said.split("== validation loss\n")[1].split("\n\n")[0].splitlines()
    return {" ".join(words[:-1]): float(words[-1]) for words in map(str.split, rows)}


# Texts that only the right positions can tell. A token is a byte, and a document with its end is a whole number of
# windows. Every tenth letter is any letter.


def by_place(draw, bytes_):
    """The place in the window decides the letter: what a table of positions learns first."""
    line = random.Random("the same in all texts").choices(LETTERS, k=SHORT)
    return "".join(line[i % SHORT] if draw.random() < 0.9 else draw.choice(LETTERS) for i in range(bytes_))


def by_distance(draw, bytes_):
    """The letter but one before decides: rotary positions find it by its distance."""
    text = draw.choices(LETTERS, k=2)
    following = dict(zip(LETTERS, "cehagbdf"))
    while len(text) < bytes_:
        text.append(following[text[-2]] if draw.random() < 0.9 else draw.choice(LETTERS))
    return "".join(text)


@pytest.fixture(scope="session", params=FAMILIES)
def start(request, tmp_path_factory):
    """(family, trainer, HuggingFace directory of a model trained at SHORT tokens, its text)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    trainer, text = ROOT / f"build/cpu/train_{family}", folder / "text"
    text.mkdir()
    for i in range(200):
        make = by_place if family == "gpt2" else by_distance
        (text / f"{i}.txt").write_text(make(random.Random(i), 8 * SHORT - 1))
    run(PYTHON, "data/prepare.py", text, "--out", folder / "tokens", "--raw-bytes")
    run(trainer, "--model", "2,64,2", "--vocab", 257, "--context", SHORT, "--batch", 8, "--train",
        folder / "tokens/train_*.bin", "--steps", 50, "--lr", 1e-2, "--warmup", 5, "--val-every", 0, "--sample-every",
        0, "--threads", 1, "--out", folder / "made")
    run(PYTHON, "scripts/convert_hf.py", folder / "made", "--back", folder / "hf", "--dtype", "fp16", "--tokenizer",
        folder / "tokens/tokenizer.json")
    return family, trainer, folder / "hf", text


# Programs that write down how they were called and make an empty file of what they would.
STAND_IN = r"""#!/usr/bin/env bash
echo "$@" >>calls
while (($# > 1)); do
    case $1 in
    --to) : >"$2" ;;
    --out) mkdir -p "$2" && : >"$2/dataset.json" ;;
    --back) mkdir -p "$2" ;;
    --eval) echo "val_loss 2.5" ;;
    --plan) exit "$(cat plan_code 2>/dev/null || echo 0)" ;;
    */convert_hf.py) [[ -e $2 ]] || { echo "convert_hf.py: error: $2: no such folder" >&2 && exit 2; } ;;
    */download_hf.py) mkdir -p "$3" && : >"$3/tokenizer.json" ;;
    esac
    shift
done
"""


class StandIns:
    """A checkout of the recipes where every program is a stand-in."""

    def __init__(self, folder):
        self.root = folder / "checkout"
        (self.root / "scripts").mkdir(parents=True)
        for path in (ROOT / "scripts").glob("*.sh"):
            shutil.copy(path, self.root / "scripts")
        for name in (".venv/bin/python", "dev/setup.sh", "trainer"):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STAND_IN)
            path.chmod(0o755)

    def calls(self):
        return [line.split() for line in (self.root / "calls").read_text().splitlines()]

    def start(self, recipe, fails=0, cwd=None, **settings):
        """The commands that it ran, or with DRY=1 would have, or with `fails`, the exit code, its on stderr."""
        settings = {"TRAINER": str(self.root / "trainer")} | settings
        (self.root / "calls").write_text("")
        done = call(self.root / "scripts" / recipe, cwd=cwd or self.root,
                    **{key: str(value) for key, value in settings.items() if value is not None})
        assert done.returncode == fails, done.stdout + done.stderr
        if fails:
            return done.stderr
        if settings.get("DRY"):
            assert all("--plan" in command for command in self.calls())
            return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("+ ")]
        return self.calls()


def called(commands, part):
    return [command for command in commands if any(part in word for word in command)]
