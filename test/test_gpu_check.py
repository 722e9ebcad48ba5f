"""dev/gpu_check.sh where it cannot run: one line, and nothing else done."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n"


def visit(tmp_path, *words, tools=()):
    """With `tools` of these contents in front of what every machine has."""
    path = tmp_path / "bin"
    path.mkdir()
    for name, text in tools:
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    for name in ("bash", "dirname", "grep", "env"):
        (path / name).symlink_to(f"/usr/bin/{name}")
    return subprocess.run(["bash", str(ROOT / "dev/gpu_check.sh"), *words], capture_output=True, text=True,
                          env={**os.environ, "PATH": str(path)})


@pytest.mark.parametrize("tools, why", [
    ([], "no nvidia-smi on PATH"),
    ([("nvidia-smi", NO_GPU)], "no nvcc on PATH"),
    ([("nvidia-smi", NO_GPU), ("nvcc", "#!/bin/sh\n")], "nvidia-smi finds no GPU here"),
])
@pytest.mark.parametrize("words", [["--quick"], ["--rest"], []])
def test_without_a_gpu_it_ends_with_one_line(tmp_path, tools, why, words):
    done = visit(tmp_path, *words, str(tmp_path / "out"), tools=tools)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"gpu_check.sh: {why}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--quick"], ["--fast", "dir"], ["a", "b", "c"]])
def test_wrong_words_show_its_usage(tmp_path, words):
    done = visit(tmp_path, *words)
    assert done.returncode == 2 and done.stderr.startswith("usage: dev/gpu_check.sh") and done.stdout == ""
