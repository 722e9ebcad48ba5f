"""The recipes for long context: end to end on a small model (HuggingFace directory -> weights file -> training beyond
the trained window -> checkpoint -> HuggingFace directory), and what they do with their settings, on stand-ins for the
programs that they call."""

import json
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv/bin/python"
FAMILIES = ["gpt2", "pythia"]
SHORT, LONG = 64, 256
LETTERS = "abcdefgh"
SETTINGS = {"RUN", "MODEL", "NAME", "TEXT", "TOKENS", "TRAINER", "OPTIONS", "DEPS", "SETUP", "DRY", "ROPE"}
# A thread more only gets into the way of models as small as these.
BARE = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {"OMP_NUM_THREADS": "1"}


def call(*command, cwd=ROOT, **environment):
    return subprocess.run([str(word) for word in command], cwd=cwd, env=BARE | environment, text=True,
                          capture_output=True, timeout=600)


def run(*command, **options):
    done = call(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(said):
    return [float(line.split()[1]) for line in said.splitlines() if line.startswith("val_loss ")]


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


def test_a_small_model_goes_all_the_way(start, tmp_path):
    family, trainer, source, text = start
    settings = dict(
        RUN=str(tmp_path / "run"), MODEL=str(source), TEXT=str(text), TRAINER=str(trainer), CONTEXT=str(LONG),
        SHORT=str(SHORT), TOKENS_PER_STEP=str(2 * LONG), STEPS="8", LR="3e-3", WARMUP="2", VAL_TOKENS="2048",
        ROPE="yarn", OPTIONS="--sample-tokens 4 --threads 1", SETUP="0",
    )
    said = run(f"scripts/long_{family}.sh", **settings)
    short_before, long_before, long_after, short_after = losses(said)

    def evaluate(*options):
        return losses(run(trainer, "--eval", "loss", "--val", tmp_path / "run_tokens/val_*.bin", "--val-tokens", 2048,
                          "--threads", 1, *options))[0]

    # The model knows its text, in the window and, rightly stretched, beyond. ln 8 = 2.08 would be knowing nothing.
    begin = ["--init", tmp_path / "run_start.bin", "--context", LONG]
    assert short_before < 0.7 and short_before < long_before < short_before + 0.25
    if family == "gpt2":
        for wrong in ("fresh", "interpolate"):
            assert evaluate(*begin, "--positions", wrong) > long_before + 0.8
        # The first tokens of a repeated table see the model that was trained.
        run(trainer, *begin, "--positions", "tile", "--train", tmp_path / "run_tokens/train_*.bin", "--steps", 0,
            "--out", tmp_path / "tiled")
        assert evaluate("--init", tmp_path / "tiled", "--context", SHORT) == short_before
    else:
        assert evaluate(*begin, "--rope", "linear") > long_before + 0.8
        assert evaluate(*begin, "--rope", "none") < long_before - 0.05  # a recipe that drops ROPE would show it
    assert long_after < long_before - 0.02 and short_after < short_before + 0.05

    # A HuggingFace directory for the long context, whose weights are the run's, to the bit.
    config = json.loads((tmp_path / "run_hf/config.json").read_text())
    if family == "gpt2":
        assert config["n_positions"] == LONG
        with safe_open(tmp_path / "run_hf/model.safetensors", "numpy") as file:
            table = [name for name in file.keys() if name.endswith("wpe.weight")]
            assert file.get_slice(table[0]).get_shape() == [LONG, 64]
    else:
        assert config["max_position_embeddings"] == LONG
        rope = config["rope_parameters"]
        assert (rope["rope_type"], rope["factor"]) == ("yarn", LONG / SHORT)
        assert rope["original_max_position_embeddings"] == SHORT
    assert (tmp_path / "run_hf/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    run(PYTHON, "scripts/convert_hf.py", tmp_path / "run_hf", "--to", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "run/step_00000008/model.bin").read_bytes()

    # Started again with more steps it goes on from there.
    settings["STEPS"] = "9"
    said = run(f"scripts/long_{family}.sh", **settings)
    assert f"{tmp_path}/run_start.bin is there" in said and "resumed" in said
    assert (tmp_path / "run/step_00000009").is_dir()


# Programs that write down how they were called and make an empty file of what they would.
STAND_IN = r"""#!/usr/bin/env bash
echo "$@" >>calls
while (($# > 1)); do
    case $1 in
    --to) : >"$2" ;;
    --out) mkdir -p "$2" && : >"$2/dataset.json" ;;
    --back) mkdir -p "$2" ;;
    */convert_hf.py) [[ -e $2 ]] || { echo "convert_hf.py: error: $2: no such folder" >&2 && exit 2; } ;;
    */download_hf.py) mkdir -p "$3" && : >"$3/tokenizer.json" ;;
    esac
    shift
done
"""


@pytest.fixture(params=FAMILIES)
def recipe(request, tmp_path):
    """A recipe in a checkout of stand-ins: recipe(SETTING=...) gives the commands that it ran, or with DRY=1 would
    have, or with `fails`, the exit code, what it said on stderr."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("recipe.sh", "long_gpt2.sh", "long_pythia.sh"):
        shutil.copy(ROOT / "scripts" / name, checkout / "scripts")
    for name in (".venv/bin/python", "dev/setup.sh", "trainer"):
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def start(fails=0, cwd=checkout, **settings):
        settings = {"TRAINER": str(checkout / "trainer")} | settings
        (checkout / "calls").write_text("")
        done = call(checkout / f"scripts/long_{request.param}.sh", cwd=cwd,
                    **{key: str(value) for key, value in settings.items() if value is not None})
        assert done.returncode == fails, done.stdout + done.stderr
        if fails:
            assert done.stderr.count("\n") == 1
            return done.stderr
        if settings.get("DRY"):
            assert not (checkout / "calls").read_text()
            return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("+ ")]
        return [line.split() for line in (checkout / "calls").read_text().splitlines()]

    start.family, start.checkout = request.param, checkout
    return start


def called(commands, part):
    return [command for command in commands if any(part in word for word in command)]


def test_a_dry_run_says_everything_and_does_nothing(recipe):
    before = sorted(recipe.checkout.rglob("*"))
    commands = recipe(DRY="1", TRAINER=None)
    trainer = f"./train_{recipe.family}"
    for part in ("setup.sh", "make", "download_hf.py", "convert_hf.py", "pile", trainer, "loss", "--back"):
        assert called(commands, part), part
    assert sorted({*recipe.checkout.rglob("*")} - {recipe.checkout / "calls"}) == before


def test_options_go_to_training_alone(recipe):
    commands = recipe(DRY="1", OPTIONS="--seed 5")
    assert len(called(commands, "--eval")) == 4
    assert called(commands, "--seed") == called(commands, "--resume") and len(called(commands, "--seed")) == 1


def test_started_again_it_needs_no_network(recipe):
    first = recipe()
    assert called(first, "download_hf.py") and called(first, "pyarrow") and called(first, "--recipe")
    again = recipe()
    assert not called(again, "download_hf.py") and not called(again, "pip") and not called(again, "--recipe")
    assert len(called(again, "--resume")) == 1
    # What is missing is fetched, and nothing else.
    next(recipe.checkout.glob("models/*/*/tokenizer.json")).unlink()
    third = recipe()
    assert called(third, "download_hf.py") and not called(third, "pip")
    (recipe.checkout / f"runs/long_{recipe.family}_tokens/dataset.json").unlink()
    fourth = recipe()
    assert not called(fourth, "download_hf.py") and called(fourth, "pip") and called(fourth, "--recipe")


def test_a_run_keeps_its_model_and_its_text(recipe, tmp_path):
    for name in ("model", "other", "books"):
        (tmp_path / name).mkdir()
    settings = {"MODEL": tmp_path / "model", "RUN": tmp_path / "run"}
    # What failed before anything was made binds nobody.
    assert "no such folder" in recipe(2, MODEL=tmp_path / "none", RUN=tmp_path / "run")
    recipe(**settings)
    recipe(**settings)
    for change, says in (
        ({"MODEL": tmp_path / "other"}, f"run_start.bin is of the model {tmp_path}/model, not of {tmp_path}/other"),
        ({"MODEL": None}, f"run_start.bin is of the model {tmp_path}/model, not of "),
        ({"TEXT": tmp_path / "books"}, f"dataset.json is of the text the Pile, not of {tmp_path}/books"),
    ):
        for dry in ("", "1"):
            assert says in recipe(2, **settings | change, DRY=dry)
        assert (recipe.checkout / "calls").read_text() == ""
        recipe(**settings | change | {"RUN": tmp_path / f"elsewhere_{len(says)}"})
    recipe(**settings)
    if recipe.family == "pythia":
        recipe(NAME="x/small")
        assert "is of the model x/small, not of y/small; choose another RUN" in recipe(2, NAME="y/small")
        assert called(recipe(NAME="y/small", RUN="runs/y"), "download_hf.py")  # the hub has names in two parts


def test_paths_are_those_of_the_caller(recipe, tmp_path):
    caller = tmp_path / "caller"
    caller.mkdir()
    given = {"RUN": "out/run/", "MODEL": "../hf", "TEXT": "books", "TOKENS": "./tokens", "TRAINER": "bin/trainer"}
    commands = recipe(cwd=caller, DRY="1", **given)
    there = {f"{caller}/out/run", f"{caller}/out/run_start.bin", f"{caller}/out/run_hf", f"{caller}/books",
             f"{caller}/tokens/train_*.bin", f"{caller}/bin/trainer", f"{tmp_path}/hf", f"{tmp_path}/hf/tokenizer.json"}
    words = {word for command in commands for word in command}
    assert there <= words, there - words
    assert not any(word.startswith(tuple(given.values())) for word in words)
    # Defaults are the checkout's, and a name without a slash that is no file may be on the PATH.
    training = called(recipe(cwd=caller, DRY="1", TRAINER="some_trainer"), "--resume")[0]
    assert training[0] == "some_trainer" and f"runs/long_{recipe.family}" in training
    recipe(cwd=caller, MODEL="../hf", RUN="out/run", fails=2)
    (tmp_path / "hf").mkdir()
    recipe(cwd=caller, MODEL="../hf", RUN="out/run")
    assert (caller / "out/run_start.bin").exists() and not (recipe.checkout / "out").exists()


def test_machines_without_apt(recipe):
    with_apt = recipe(DRY="1", TRAINER=None)
    assert called(with_apt, "setup.sh") and ["make"] in with_apt
    without = recipe(DRY="1", TRAINER=None, SETUP="0", DEPS="deps")
    assert not called(without, "setup.sh") and ["make", f"DEPS={recipe.checkout}/deps"] in without


def test_a_failure_ends_the_recipe(recipe, tmp_path):
    says = recipe(2, MODEL=tmp_path / "nothing", RUN=tmp_path / "run")
    assert "nothing" in says
    assert not called([(recipe.checkout / "calls").read_text().split()], "--eval")
