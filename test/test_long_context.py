"""How memory grows with the context: peaks of whole runs, and the longest step that a test can wait for."""

import subprocess

import numpy as np
import pytest

from runs import BUILDS, DONE, ROOT, VOCAB, peak_memory, write_shard

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.bin"
    write_shard(path, np.random.default_rng(1).integers(0, VOCAB, (1 << 18) + 1))
    return path


def one_step(text, out, **options):
    """Of a model whose memory is its activations, so that what a test sees is the context."""
    chosen = {"vocab": VOCAB, "positions": "tied", "train": text, "out": out, "steps": 1, "val-every": 0, "sample-every": 0,
              "save-every": 0, **options}
    return [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]


def test_twice_the_context_is_at_most_twice_the_memory(text, tmp_path):
    peaks = [peak_memory(one_step(text, tmp_path / str(context), model="2,64,1", context=context, recompute="block",
                                  chunk=4096, offload="none")) for context in (1 << 14, 1 << 15, 1 << 16, 1 << 17)]
    print([f"{peak / 2**20:.0f} MiB" for peak in peaks])
    assert all(after <= 2.05 * before for before, after in zip(peaks, peaks[1:])), peaks
    assert peaks[-1] > 4 * peaks[0], "the context is too small a part of these peaks to tell anything"


def test_a_step_of_262144_tokens(text, tmp_path):
    args = one_step(text, tmp_path / "run", model="1,32,1", context=1 << 18, recompute="full", chunk=8192, offload="residual")
    done = subprocess.run([BUILDS["fp32"] / "train_gpt2", *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == DONE, done.stderr
    assert (tmp_path / "run" / "step_00000001" / "model.bin").exists()
