"""The recipes for long context: end to end on a small model (HuggingFace directory -> weights file -> training beyond
the trained window -> checkpoint -> HuggingFace directory), and what they do with their settings, on stand-ins for the
programs that they call."""

import json
import struct

import pytest
from recipe_testing import FAMILIES, LONG, PYTHON, SHORT, StandIns, called, losses, run, start, table_of  # noqa: F401
from safetensors import safe_open


def test_a_small_model_goes_all_the_way(start, tmp_path):
    family, trainer, source, text = start
    settings = dict(
        RUN=str(tmp_path / "run"), MODEL=str(source), TEXT=str(text), TRAINER=str(trainer), CONTEXT=str(LONG),
        SHORT=str(SHORT), TOKENS_PER_STEP=str(2 * LONG), STEPS="8", LR="3e-3", WARMUP="2", VAL_TOKENS="2048",
        ROPE="yarn", OPTIONS="--sample-tokens 4 --threads 1", SETUP="0",
    )
    said = run(f"scripts/long_{family}.sh", **settings)
    (short_before, long_before), (long_after, short_after) = losses(said)[:2], losses(said)[-2:]

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
        # Beside it the same training at the trained window: both losses on the same text.
        rows = table_of(said)
        assert list(rows.values()) == losses(said)
        compared = ["--init", tmp_path / f"run_{SHORT}", "--context"]
        assert rows[f"trained at {SHORT}, at {SHORT}"] == evaluate(*compared, SHORT) < short_before
        assert rows[f"trained at {SHORT}, at {LONG}"] == evaluate(*compared, LONG, "--rope", "yarn")
        assert rows[f"trained at {LONG}, at {LONG}"] == long_after
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


@pytest.fixture(params=FAMILIES)
def recipe(request, tmp_path):
    """A recipe in a checkout of stand-ins, see StandIns.start."""
    stand_ins = StandIns(tmp_path)

    def start(fails=0, **settings):
        said = stand_ins.start(f"long_{request.param}.sh", fails, **settings)
        assert not fails or said.count("\n") == 1
        assert not settings.get("DRY") or not stand_ins.calls()
        return said

    start.family, start.checkout = request.param, stand_ins.root
    return start


def test_a_dry_run_says_everything_and_does_nothing(recipe):
    before = sorted(recipe.checkout.rglob("*"))
    commands = recipe(DRY="1", TRAINER=None)
    trainer = f"./train_{recipe.family}"
    for part in ("setup.sh", "make", "download_hf.py", "convert_hf.py", "pile", trainer, "loss", "--back"):
        assert called(commands, part), part
    assert sorted({*recipe.checkout.rglob("*")} - {recipe.checkout / "calls"}) == before


def test_options_go_to_training_alone(recipe):
    commands = recipe(DRY="1", OPTIONS="--seed 5")
    trainings = 2 if recipe.family == "pythia" else 1
    assert len(called(commands, "--eval")) == 2 + 2 * trainings
    assert called(commands, "--seed") == called(commands, "--resume") and len(called(commands, "--seed")) == trainings


def test_pythia_is_compared_with_its_own_window(tmp_path):
    stand_ins = StandIns(tmp_path)
    short, long = called(stand_ins.start("long_pythia.sh", DRY="1", ROPE="yarn"), "--resume")
    differ = [(a, b) for a, b in zip(short, long) if a != b]
    assert differ[:2] == [("2048", "8192"), ("runs/long_pythia_2048", "runs/long_pythia")]
    assert "--rope" not in short and "--rope" in long
    assert len(called(stand_ins.start("long_pythia.sh", DRY="1", COMPARE="0"), "--resume")) == 1


def test_started_again_it_needs_no_network(recipe):
    first = recipe()
    assert called(first, "download_hf.py") and called(first, "pyarrow") and called(first, "--recipe")
    again = recipe()
    assert not called(again, "download_hf.py") and not called(again, "pip") and not called(again, "--recipe")
    assert len(called(again, "--resume")) == len(called(first, "--resume"))
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
    training = called(recipe(cwd=caller, DRY="1", TRAINER="some_trainer"), "--resume")[-1]
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


@pytest.mark.parametrize("have, contexts, tokens", [
    (10**8, (64, 256), 524288), (1001, (64, 256), 768), (1024, (64, 256), 768), (1025, (64, 256), 1024),
    (1001, (64, 96), 960), (200, (64, 256), None),
])
def test_losses_at_all_contexts_are_of_the_same_tokens(recipe, tmp_path, have, contexts, tokens):
    """Windows end where their shard does: of a short split each context would see another part."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "dataset.json").touch()
    (folder / "val_000000.bin").write_bytes(struct.pack("<3i", 20240520, 1, have).ljust(1024, b"\0"))
    commands = recipe(TOKENS=folder, SHORT=contexts[0], CONTEXT=contexts[1])
    given = {command[command.index("--val-tokens") + 1] for command in called(commands, "--val-tokens")}
    assert given == {str(tokens or 524288)}
