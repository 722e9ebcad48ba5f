"""The recipes for long context, end to end on a small random model: HuggingFace directory -> weights file -> training
beyond the trained window -> checkpoint -> HuggingFace directory."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv/bin/python"
SHORT, LONG, VOCAB = 64, 256, 300
SENTENCES = ["The river runs past the mill and down to the sea.", "Nobody had seen the lighthouse keeper since March.",
             "She counted the ships twice, and then once more.", "In the morning the snow had gone from the roofs."]


def run(*command, **environment):
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | environment, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        lines = [SENTENCES[(i * 7 + j * j) % 4] for j in range(60)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session", params=["gpt2", "pythia"])
def start(request, text, tmp_path_factory):
    """(family, trainer, HuggingFace directory of a random model trained at SHORT tokens)."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = ROOT / f"build/cpu/train_{request.param}"
    run(PYTHON, "data/prepare.py", text, "--out", folder / "tokens", "--train-tokenizer", VOCAB, "--min-tokens", 100)
    run(trainer, "--model", "2,64,2", "--vocab", VOCAB, "--context", SHORT, "--steps", 0, "--out", folder / "made")
    run(PYTHON, "scripts/convert_hf.py", folder / "made", "--back", folder / "hf", "--dtype", "fp16", "--tokenizer",
        folder / "tokens/tokenizer.json")
    return request.param, trainer, folder / "hf"


def recipe(family, out, **settings):
    return run(f"scripts/long_{family}.sh", RUN=str(out), CONTEXT=str(LONG), SHORT=str(SHORT), TOKENS_PER_STEP=str(2 * LONG),
               LR="3e-3", WARMUP="2", VAL_TOKENS="2048", OPTIONS="--sample-tokens 4 --threads 1", **settings)


def losses(said):
    return [float(line.split()[1]) for line in said.splitlines() if line.startswith("val_loss ")]


def test_a_small_model_goes_all_the_way(start, text, tmp_path):
    family, trainer, source = start
    settings = {"MODEL": str(source), "TEXT": str(text), "TRAINER": str(trainer), "STEPS": "8", "ROPE": "yarn"}
    said = recipe(family, tmp_path / "run", **settings)
    short_before, long_before, long_after, short_after = losses(said)
    assert abs(short_before - long_before) < 0.2 and 5.4 < short_before < 6.2  # ln 300 = 5.70
    assert long_after < long_before - 0.5 and short_after < short_before - 0.5

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
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", LONG / SHORT, SHORT)
    assert (tmp_path / "run_hf/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    run(PYTHON, "scripts/convert_hf.py", tmp_path / "run_hf", "--to", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "run/step_00000008/model.bin").read_bytes()

    # Started again with more steps it goes on from there.
    settings["STEPS"] = "9"
    said = recipe(family, tmp_path / "run", **settings)
    assert f"{tmp_path}/run_start.bin is there" in said and "resumed" in said
    assert (tmp_path / "run/step_00000009").is_dir()


def test_a_dry_run_says_everything_and_does_nothing(start, tmp_path):
    family, _, _ = start
    said = recipe(family, tmp_path / "run", DRY="1")
    commands = [line for line in said.splitlines() if line.startswith("+ ")]
    for part in ("setup.sh", " make", "download_hf.py", "convert_hf.py", "--recipe pile", f"train_{family} --init",
                 "--eval loss", "--back"):
        assert any(part in command for command in commands), part
    assert not list(tmp_path.iterdir())


def test_a_failure_ends_the_recipe(start, text, tmp_path):
    family, trainer, _ = start
    done = subprocess.run([f"scripts/long_{family}.sh"], cwd=ROOT, text=True, capture_output=True, timeout=60,
                          env=os.environ | {"MODEL": str(tmp_path / "nothing"), "TEXT": str(text), "RUN": str(tmp_path / "run"),
                                            "TRAINER": str(trainer)})
    assert done.returncode == 2
    assert "nothing" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "--eval" not in done.stdout
