"""The optimizer's rules, its states' types, weights without a float master and bf16 gradients: what a run's files and log
say of them, that each learns, and that each goes on bit for bit."""

import shutil
import struct
import subprocess
import sys

import pytest

from runs import BAD_INPUT, DONE, ROOT, assert_same_run, checkpoints, complaint, options, peak_memory, trainer, untimed

L, C = 2, 64
# (family, precision, options)
KINDS = [
    ("gpt2", "fp32", {"state": "int8"}),
    ("gpt2", "fp32", {"optimizer": "lion", "state": "int8", "state_embeddings": "int8"}),
    ("gpt2", "fp32", {"optimizer": "lion", "grad": "bf16", "state": "bf16"}),
    ("gpt2", "bf16", {"state": "int8", "master": "none", "grad": "bf16"}),
    ("pythia", "fp32", {"state": "bf16", "grad": "bf16"}),
    ("pythia", "bf16", {"state": "int8", "state_floor": "off", "state_embeddings": "int8", "grad": "bf16"}),
    ("pythia", "bf16", {"state": "bf16", "master": "none"}),
]


def run(family, precision, *args):
    return trainer(*args, program=f"train_{family}", precision=precision)


def tensors(family):
    """(count, is a matrix, is an embedding) of each, in the order of the file."""
    Vp, LC = 128, L * C
    table = (Vp * C, False, True)
    rest = [(LC, False, False)] * 2 + [(LC * 3 * C, True, False), (LC * 3, False, False), (LC * C, True, False),
                                       (LC, False, False)] + [(LC, False, False)] * 2 + [
        (LC * 4 * C, True, False), (LC * 4, False, False), (LC * 4 * C, True, False), (LC, False, False)]
    last = [(C, False, False)] * 2
    return [table, (32 * C, False, True), *rest, *last] if family == "gpt2" else [table, *rest, *last, table]


FP32, BF16, INT8 = 0, 1, 2


def state_types(family, chosen):
    if chosen["state"] != "int8":
        return [{"fp32": FP32, "bf16": BF16}[chosen["state"]]] * 16
    wanted = [matrix or (embedding and chosen.get("state_embeddings") == "int8") for _, matrix, embedding in tensors(family)]
    # A layer's smallest matrix has 4096 elements, wpe 2048.
    return [INT8 if narrow and count != 32 * C else FP32 for narrow, (count, *_) in zip(wanted, tensors(family))]


def state_bytes(family, chosen):
    sizes = [count + 4 * -(-count // 256) if type == INT8 else count * (2 if type == BF16 else 4)
             for (count, *_), type in zip(tensors(family), state_types(family, chosen))]
    return 1024 + (1 if chosen.get("optimizer") == "lion" else 2) * sum(sizes)


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: "-".join([*kind[:2], *kind[2].values()]))
def whole(request, data, tmp_path_factory):
    family, precision, chosen = request.param
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(family, precision, *options(data, sample_every=0, **chosen), "--out", folder)
    assert done.returncode == DONE, done.stderr
    return family, precision, chosen, folder


def test_a_resumed_run_repeats_bit_for_bit(whole, data, tmp_path):
    family, precision, _, reference = whole
    again = tmp_path / "run"
    shutil.copytree(reference, again)
    for name in checkpoints(again):
        if name > "step_00000006":
            shutil.rmtree(again / name)
    done = run(family, precision, "--out", again, "--resume")
    assert done.returncode == DONE and "resumed" in done.stdout, done.stderr
    assert_same_run(reference, again, 12)


def test_what_the_files_hold(whole):
    family, precision, chosen, folder = whole
    step = folder / "step_00000012"
    assert (step / "optimizer.bin").stat().st_size == state_bytes(family, chosen)
    head = struct.unpack("<20i", (step / "optimizer.bin").read_bytes()[:80])
    assert head[1:4] == (2, 16, 1 if chosen.get("optimizer") == "lion" else 0)
    assert list(head[4:]) == state_types(family, chosen)
    # Without a float master the weights are bf16, as they are.
    narrow = precision == "bf16" and chosen.get("master") == "none"
    weights = (step / "model.bin").read_bytes()
    assert struct.unpack("<2i", weights[:8])[1] == (5 if narrow else 3)
    assert len(weights) == 1024 + sum(count for count, *_ in tensors(family)) * (2 if narrow else 4)


def test_the_weights_go_to_huggingface_and_back(whole, tmp_path):
    """Of whatever type they are, to the bit."""
    _, _, _, folder = whole
    convert = [sys.executable, ROOT / "scripts/convert_hf.py"]
    for command in ([*convert, folder, "--back", tmp_path / "hf"], [*convert, tmp_path / "hf", "--to", tmp_path / "again.bin"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.bin").read_bytes() == (folder / "step_00000012/model.bin").read_bytes()


def test_what_the_log_says(whole):
    _, _, chosen, folder = whole
    steps = [event for event in untimed(folder) if event["event"] == "step"]
    assert len(steps) == 12
    if chosen["state"] == "int8":
        assert all({"vanished", "saturated", "non_finite"} <= set(event) for event in steps)
        assert all(event["non_finite"] == 0 for event in steps)
        if chosen.get("optimizer") == "lion":
            assert all(event["vanished"] == 0 for event in steps)
        else:
            assert any(event["vanished"] > 0 for event in steps)
    else:
        assert not any("vanished" in event or "non_finite" in event for event in steps)


def test_broken_gradients_are_counted(data, tmp_path):
    done = run("gpt2", "fp32", *options(data, state="int8", lr=1e4, clip=0, steps=40, warmup=0, max_skips=2, val=None,
                                        sample_every=0), "--out", tmp_path / "run")
    assert done.returncode == 1 and "updates in a row were skipped" in complaint(done)
    skips = [event for event in untimed(tmp_path / "run") if event["event"] == "skip"]
    assert len(skips) >= 2 and all(event["non_finite"] > 0 for event in skips if event["grad_norm"] is None)
    assert any(event["grad_norm"] is None for event in skips)


def test_a_resume_keeps_its_kind(whole):
    family, precision, chosen, folder = whole
    other = {"optimizer": "adamw" if chosen.get("optimizer") == "lion" else "lion",
             "state": "fp32", "grad": "fp32" if chosen.get("grad") == "bf16" else "bf16"}
    for name, value in other.items():
        done = run(family, precision, "--out", folder, "--resume", f"--{name}", value)
        assert done.returncode == BAD_INPUT and f"--{name}: the run in {folder} has" in complaint(done)


def last_loss(data, folder, family, precision, **chosen):
    chosen = {"steps": 150, "lr": 5e-3, "val_every": 150, "sample_every": 0, "save_every": 0, **chosen}
    done = run(family, precision, *options(data, **chosen), "--out", folder)
    assert done.returncode == DONE, done.stderr
    return [event["loss"] for event in untimed(folder) if event["event"] == "val"][-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_each_kind_learns_what_fp32_learns(data, tmp_path, family, precision):
    # Short runs of a tiny model differ by some hundredths between seeds.
    want = last_loss(data, tmp_path / "fp32", family, precision)
    assert want < 1.6
    none = {"master": "none"} if precision == "bf16" else {}
    kinds = [{"state": "int8"}, {"state": "int8", "state_embeddings": "int8", "grad": "bf16", **none}, {"state": "bf16", **none}]
    for i, chosen in enumerate(kinds):
        assert abs(last_loss(data, tmp_path / str(i), family, precision, **chosen) - want) < 0.06, chosen
    lion = {"optimizer": "lion", "lr": 1e-3}
    fp32 = last_loss(data, tmp_path / "lion", family, precision, **lion)
    assert fp32 < 1.7
    assert abs(last_loss(data, tmp_path / "lion8", family, precision, **lion, state="int8") - fp32) < 0.06


def test_the_bytes_of_a_parameter(data, tmp_path):
    """Of 12 million parameters in matrices, by what the process keeps resident."""
    count = 12 * 4 * 512**2
    others = (13 * 4 + 2 + 128 + 32) * 512  # vectors, and embeddings of a padded vocabulary
    peaks = {}
    for rule in ("adamw", "lion"):
        for state in ("fp32", "bf16", "int8"):
            args = options(data, model="4,512,8", steps=1, batch=1, tokens_per_step=32, val=None, sample_every=0, save_every=0,
                           optimizer=rule, state=state)
            peaks[rule, state] = peak_memory([*args, "--out", str(tmp_path / f"{rule}_{state}")]) / count
            shutil.rmtree(tmp_path / f"{rule}_{state}")
    for rule, states in (("adamw", 2), ("lion", 1)):
        for state, each in (("bf16", 2), ("int8", 1 + 4 / 256)):
            saved = peaks[rule, "fp32"] - peaks[rule, state]
            params = 1 + (others if state == "bf16" else 0) / count  # int8 leaves the others' states in fp32
            assert abs(saved - states * (4 - each) * params) < 0.15, peaks
