"""What is Pythia's own, from the outside: its weights file, its options, and that a run goes on as if never stopped. The
loop around the model is the same code as GPT-2's (test_train_gpt2.py)."""

import shutil
import struct

import numpy as np
import pytest

from runs import BAD_INPUT, DONE, VOCAB, assert_same_run, checkpoints, complaint, options, trainer, untimed

MAGIC = 20261124
MODES = ["none", "linear", "ntk", "dynamic", "yarn"]


def pythia(*args, precision="fp32"):
    return trainer(*args, program="train_pythia", precision=precision)


def header_of(path):
    """(the first 14 int32, rotary base, rotary scale)"""
    head = path.read_bytes()[:1024]
    return list(struct.unpack("<14i", head[:56])), *struct.unpack("<2d", head[56:72])


def weights_file(path, version=3, L=2, C=64, H=2, V=70, maxT=48, base=10000.0, scale=1.0, seed=5, spread=0.05,
                 **entries):
    """Random weights whose tables have no tail; entries is {"at8": 6, …}. Returns the tensors' values."""
    Vp = (V + 127) // 128 * 128
    rng = np.random.default_rng(seed)
    count = 2 * Vp * C + L * (12 * C * C + 13 * C) + 2 * C
    values = (rng.standard_normal(count) * spread).astype("<f4")
    values[V * C:Vp * C] = 0
    values[count - (Vp - V) * C:] = 0
    words = [MAGIC, version, maxT, V, L, H, C, Vp, C // H // 4, 1, 2, 0, 0, maxT]
    for name, value in entries.items():
        words[int(name[2:])] = value
    head = struct.pack("<14i2d", *words, base, scale)
    if version == 5:
        halves = (values.view("<u4") >> 16).astype("<u2")
        values, stored = (halves.astype("<u4") << 16).view("<f4"), halves
    elif version == 6:
        stored = values.astype("<f2")
        stored[:4] = np.array([0x0001, 0x83FF, 0x7BFF, 0x8000], "<u2").view("<f2")  # the least, the largest, −0
        values = stored.astype("<f4")
    else:
        stored = values
    path.write_bytes(head + bytes(1024 - len(head)) + stored.tobytes())
    return values


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def whole(request, data, tmp_path_factory):
    """A run that nothing befell."""
    run = tmp_path_factory.mktemp(f"pythia_{request.param}") / "run"
    done = pythia(*options(data), "--out", run, precision=request.param)
    assert done.returncode == DONE, done.stderr
    return request.param, run


def test_a_run_learns(data, tmp_path):
    done = pythia(*options(data, steps=150, lr=5e-3, val_every=50), "--out", tmp_path / "run")
    assert done.returncode == DONE, done.stderr
    vals = [event["loss"] for event in untimed(tmp_path / "run") if event["event"] == "val"]
    assert abs(vals[0] - np.log(VOCAB)) < 0.3
    assert 0.8 < vals[-1] < 1.6  # the chain's entropy is 0.375 + 0.54 nats
    assert done.stdout.splitlines()[1].startswith("Pythia, 0.1M parameters: L 2, C 64, H 2, V 64, context 32")


def test_a_resumed_run_repeats_bit_for_bit(whole, data, tmp_path):
    precision, reference = whole
    for kept in ("step_00000003", "step_00000009"):
        run = tmp_path / kept
        shutil.copytree(reference, run)
        for name in checkpoints(run):
            if name > kept:
                shutil.rmtree(run / name)
        done = pythia("--out", run, "--resume", precision=precision)
        assert done.returncode == DONE and f"resumed {run}/{kept}" in done.stdout, done.stderr
        assert_same_run(reference, run, 12)


def test_the_positions_of_a_run_are_in_its_file_and_stay(data, tmp_path):
    weights_file(tmp_path / "in.bin", V=VOCAB, maxT=16, spread=0.3)  # positions count for something
    for number, mode in enumerate(MODES):
        run = tmp_path / mode
        chosen = options(data, model=None, vocab=None, init=tmp_path / "in.bin", rope=mode, rope_base=12345.5, steps=3)
        assert pythia(*chosen, "--out", run).returncode == DONE
        words, base, scale = header_of(run / "step_00000003/model.bin")
        # maxT is the longest context, the original one stays; the scale is their ratio, but for none and dynamic.
        assert words[2] == 32 and words[8] == 8 and words[11:] == [number, 0, 16]
        assert (base, scale) == (12345.5, 1 if mode in ("none", "dynamic") else 2)
        # Evaluated without a word on positions it is the same model; with another mode it is another.
        val = [event["loss"] for event in untimed(run) if event["event"] == "val"][-1]
        evaluate = ["--eval", "loss", "--init", run, "--val", f"{data}/val_*.bin", "--val-tokens", 256, "--batch", 2]
        assert abs(float(pythia(*evaluate).stdout.split()[1]) - val) < 1e-6
        other = pythia(*evaluate, "--rope", "linear" if mode != "linear" else "none", "--rope-base", "500")
        assert abs(float(other.stdout.split()[1]) - val) > 1e-4
        # A resume keeps the mode and refuses another.
        assert pythia("--out", run, "--resume", "--steps", 4).returncode == DONE
        assert header_of(run / "step_00000004/model.bin") == (words, base, scale)
        done = pythia("--out", run, "--resume", "--rope", "ntk" if mode != "ntk" else "yarn")
        assert done.returncode == BAD_INPUT and f"has {mode} and cannot go on with" in complaint(done)
    done = pythia(*options(data, model=None, vocab=None, init=tmp_path / "in.bin", rope="yarn", rope_scale=3,
                           rope_temperature="softmax", gelu="tanh", steps=0), "--out", tmp_path / "softmax")
    assert done.returncode == DONE, done.stderr
    words, _, scale = header_of(tmp_path / "softmax/step_00000000/model.bin")
    assert words[10:13] == [1, 4, 1] and scale == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_and_out_are_the_same_bytes(precision, tmp_path):
    weights_file(tmp_path / "in.bin", at8=16, at9=0, at10=1, at11=4, at12=1, at13=24, base=500.25, scale=3.5)
    done = pythia("--init", tmp_path / "in.bin", "--steps", 0, "--out", tmp_path / "run", precision=precision)
    assert done.returncode == DONE, done.stderr
    assert (tmp_path / "run/step_00000000/model.bin").read_bytes() == (tmp_path / "in.bin").read_bytes()


@pytest.mark.parametrize("version", [5, 6])
def test_narrow_weights_are_widened_exactly(version, tmp_path):
    values = weights_file(tmp_path / "in.bin", version)
    assert pythia("--init", tmp_path / "in.bin", "--steps", 0, "--out", tmp_path / "run").returncode == DONE
    written = (tmp_path / "run/step_00000000/model.bin").read_bytes()
    assert struct.unpack("<2i", written[:8]) == (MAGIC, 3)
    assert written[1024:] == values.tobytes()


def test_the_original_context_of_a_model_from_scratch(data, tmp_path):
    """Its own context, unless --rope stretches it from the published 2048."""
    for name, chosen, original, scale in (("plain", {}, 4096, 1), ("yarn", {"rope": "yarn"}, 2048, 2)):
        done = pythia(*options(data, model="1,32,1", context=4096, batch=1, tokens_per_step=4096, steps=0, val=None, **chosen),
                      "--out", tmp_path / name)
        assert done.returncode == DONE, done.stderr
        words, _, got = header_of(tmp_path / name / "step_00000000/model.bin")
        assert (words[2], words[13], got) == (4096, original, scale)


def test_what_was_left_open_is_written_down(data, tmp_path):
    weights_file(tmp_path / "in.bin", V=VOCAB, maxT=16)
    chosen = options(data, model=None, vocab=None, init=tmp_path / "in.bin", rope="yarn", steps=1)
    assert pythia(*chosen, "--out", tmp_path / "run").returncode == DONE
    written = (tmp_path / "run/options.toml").read_text()
    for line in ('gelu = "erf"', 'rope = "yarn"', "rope-scale = 2.0", "rope-base = 10000.0", 'rope-temperature = "rotary"'):
        assert line in written
    assert pythia("--out", tmp_path / "run", "--resume", "--rope-scale", 2, "--steps", 2).returncode == DONE
    done = trainer("--out", tmp_path / "run", "--resume")
    assert done.returncode == BAD_INPUT and "a run of Pythia, and train_gpt2 trains GPT-2" in complaint(done)


def test_logits(whole):
    precision, run = whole
    prompt = "1,4,13,40,57"

    def printed(*args):
        done = pythia("--init", run, *args, precision=precision)
        assert done.returncode == DONE, done.stderr
        return done.stdout

    rows = np.loadtxt(printed("--eval", "logits", "--prompt-tokens", prompt).splitlines())
    assert rows.shape == (5, VOCAB)
    likeliest = printed("--eval", "sample", "--prompt-tokens", prompt, "--sample-tokens", 1, "--temperature", 0).split()
    assert int(likeliest[-1]) == rows[-1].argmax()
    shorter = np.loadtxt(printed("--eval", "logits", "--prompt-tokens", "1,4").splitlines())
    assert np.array_equal(shorter, rows[:2])


def test_bad_input_is_refused_in_one_line(data, tmp_path):
    good = tmp_path / "good.bin"
    weights_file(good, V=VOCAB)
    (tmp_path / "gpt2.bin").write_bytes(struct.pack("<i", 20240326) + good.read_bytes()[4:])
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2000) + b"{" + b" " * 3999)
    torn = tmp_path / "torn.bin"
    torn.write_bytes(good.read_bytes()[:-2])

    def harmed(**entries):
        weights_file(tmp_path / "harmed.bin", V=VOCAB, **entries)
        return {"init": tmp_path / "harmed.bin"}

    cases = [
        ({"init": tmp_path / "gpt2.bin"}, "not a Pythia weights file (magic 20240326)"),
        ({"init": tmp_path / "model.safetensors"}, "scripts/convert_hf.py makes one of a HuggingFace model"),
        ({"init": torn}, "the file is torn or not of this model"),
        (lambda: harmed(version=4), "version 4; 3 (fp32), 5 (bf16) and 6 (fp16) are read"),
        (lambda: harmed(at8=7), "7 rotated dimensions of a head of 32"),
        (lambda: harmed(at8=34), "34 rotated dimensions of a head of 32"),
        (lambda: harmed(at9=2), "residual form 2"),
        (lambda: harmed(at10=0), "GELU 0"),
        (lambda: harmed(at11=5), "rotary mode 5"),
        (lambda: harmed(at12=-1), "temperature form -1"),
        (lambda: harmed(at13=0), "an original context of 0"),
        (lambda: harmed(base=float("nan")), "the rotary base must be above 1 and at most 1e+30, not nan"),
        (lambda: harmed(scale=0.5), "the rotary scale must be at least 1 and at most 1e+12, not 0.5"),
        (lambda: harmed(H=4), "head dim 16"),
        ({"init": good, "rope": "alibi"}, "--rope: 'alibi' is not one of none, linear, ntk, dynamic, yarn"),
        ({"init": good, "rope_scale": 2}, "--rope-scale needs --rope"),
        (lambda: harmed(base=1.0), "harmed.bin: the rotary base must be above 1"),
        (lambda: harmed(at8=2, at11=2), "harmed.bin: the base of 2 rotated dimensions cannot be stretched"),
        ({"init": good, "rope": "linear", "rope_scale": 0.5}, "--rope: the rotary scale must be at least 1"),
        ({"init": good, "context": 2**31 - 1, "batch": 2**20}, "are more than any machine holds"),
        ({"init": good, "rope": "linear", "rope_temperature": "softmax"}, "only --rope yarn has a temperature"),
        ({"init": good, "positions": "tile"}, "unknown option --positions"),
        ({"init": good, "vocab": 65}, "--vocab 65, but"),
        ({"model": "124M"}, "'124M' is none of 14m, 31m, 70m, 160m, 410m, 1b, 1.4b, 2.8b, 6.9b, 12b, tiny"),
    ]
    for changes, said in cases:
        changes = changes() if callable(changes) else changes
        chosen = options(data, **{"model": None, "vocab": None, **changes})
        done = pythia(*chosen, "--out", tmp_path / "run")
        assert done.returncode == BAD_INPUT, (changes, done.stderr)
        assert said in complaint(done), changes
        assert not (tmp_path / "run").exists()


def test_a_run_of_the_other_family_is_named_as_such(data, tmp_path):
    run = tmp_path / "run"
    assert trainer(*options(data, steps=1, sample_every=0), "--out", run).returncode == DONE
    done = trainer("--resume", "--out", run, program="train_pythia")
    assert done.returncode == BAD_INPUT
    assert f"{run}: a run of GPT-2, and train_pythia trains Pythia" in complaint(done)


def test_the_help_is_pythias_own():
    done = pythia("--help")
    assert done.returncode == DONE and "14m, 31m, 70m, 160m, 410m, 1b, 1.4b, 2.8b, 6.9b, 12b" in " ".join(done.stdout.split())
    assert "--rope " in done.stdout and "--positions" not in done.stdout
