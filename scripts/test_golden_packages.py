"""What needs PyTorch says so in one line where it is missing, as it is wherever `make test` runs."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "scripts" / f"{name}.py" for name in ("check_bitsandbytes", "check_hf", "check_roundtrip", "golden_gpt2",
                                                        "golden_pythia", "golden_rope")]
BENCHES = [ROOT / "dev" / "bench" / f"{name}.py" for name in ("gpu_torch", "pythia_torch", "vs_torch")]


@pytest.mark.skipif(find_spec("torch") is not None, reason="PyTorch is installed")
@pytest.mark.parametrize("script", SCRIPTS + BENCHES, ids=lambda script: script.stem)
def test_one_line_says_which_package_is_missing(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script.name}: error: the Python package ") and "pip install" in done.stderr
    assert done.stderr.count("\n") == 1
