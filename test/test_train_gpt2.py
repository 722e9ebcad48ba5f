"""The trainer from the outside: its files, its exit codes, and that nothing that befalls a run changes its result."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from runs import (BAD_INPUT, BUILDS, DONE, FAILED, ROOT, STOPPED, TIMING, VOCAB, assert_same_run, chain, checkpoints,
                  complaint, options, peak_memory, trainer, untimed, write_shard)


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def whole(request, data, tmp_path_factory):
    """A run that nothing befell."""
    run = tmp_path_factory.mktemp(f"whole_{request.param}") / "run"
    done = trainer(*options(data), "--out", run, precision=request.param)
    assert done.returncode == DONE, done.stderr
    return request.param, run


def test_a_run_learns_and_says_what_it_did(data, tmp_path):
    done = trainer(*options(data, steps=150, lr=5e-3, sample_every=50, val_every=50), "--out", tmp_path / "run")
    assert done.returncode == DONE, done.stderr
    events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 151))
    assert set(steps[0]) == {"event", "step", "loss", "lr", "grad_norm", "tokens"} | TIMING
    assert steps[-1]["tokens"] == 150 * 128
    assert steps[1]["lr"] == 5e-3 and abs(steps[-1]["lr"] / 5e-4 - 1) < 1e-2  # warmed up; down to a tenth
    vals = [event for event in events if event["event"] == "val"]
    assert [event["step"] for event in vals] == [0, 50, 100, 150]
    assert abs(vals[0]["loss"] - np.log(VOCAB)) < 0.2
    # The chain's entropy is 0.375 + 0.54 nats; a model that learned nothing stays at ln 64 = 4.16.
    assert 0.8 < vals[-1]["loss"] < 1.6
    assert [event["step"] for event in events if event["event"] == "sample"] == [50, 100, 150]
    assert events[-1] == {"event": "end", "reason": "done", "step": 150}
    first = done.stdout.splitlines()[0]
    assert first.startswith("cpu fp32") and " thread" in first


def start(precision, command):
    return subprocess.Popen([str(BUILDS[precision] / "train_gpt2"), *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def wait_for_progress(process, run):
    """Until a step or more of this process is in the log, or the process has ended."""
    log = Path(run) / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.stat().st_size > before + 300:
            return
        time.sleep(0.0005)


# Long enough to be caught in the middle, over and over.
LONG = {"steps": 300, "save_every": 20, "val_every": 50, "sample_every": 100}


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def long_whole(request, data, tmp_path_factory):
    run = tmp_path_factory.mktemp(f"long_{request.param}") / "run"
    assert trainer(*options(data, **LONG), "--out", run, precision=request.param).returncode == DONE
    return request.param, run


def test_stopped_by_a_signal_and_resumed(long_whole, data, tmp_path):
    precision, reference = long_whole
    run = tmp_path / "run"
    stopped = 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process = start(precision, ["--out", run, "--resume"] if run.exists() else [*options(data, **LONG), "--out", run])
        wait_for_progress(process, run)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
        if process.returncode == DONE:
            break
        assert process.returncode == STOPPED
        assert f"--out {run} --resume" in complaint(stderr)
        stopped += 1
    assert stopped
    assert trainer("--out", run, "--resume", precision=precision).returncode == DONE
    assert_same_run(reference, run, 300)


def kill_loop(precision, data, run, rounds, seed):
    """Kills the trainer at random moments and resumes, `rounds` times or until it is done; then lets it end. Returns
    how often it was killed."""
    rng = random.Random(seed)
    command = [*options(data, **LONG), "--out", run, "--resume"]
    for killed in range(rounds):
        process = start(precision, command)
        wait_for_progress(process, run)
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.communicate()
        if process.returncode == DONE:
            return killed
    done = trainer(*command, precision=precision)
    assert done.returncode == DONE, done.stderr
    return rounds


def test_killed_and_resumed(long_whole, data, tmp_path):
    precision, reference = long_whole
    assert kill_loop(precision, data, tmp_path / "run", 4, seed=1) >= 2
    assert_same_run(reference, tmp_path / "run", 300)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_and_resumed_often(long_whole, data, tmp_path, seed):
    precision, reference = long_whole
    assert kill_loop(precision, data, tmp_path / "run", 12, seed) >= 2
    assert_same_run(reference, tmp_path / "run", 300)


def test_max_hours(data, tmp_path):
    run = tmp_path / "run"
    done = trainer(*options(data, max_hours=1e-9), "--out", run)
    assert done.returncode == STOPPED and "--max-hours" in done.stderr
    assert checkpoints(run) == ["step_00000000"]  # in the validation before the first step


def harm(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["model.bin", "optimizer.bin", "manifest.json"])
def test_a_harmed_checkpoint_is_named_and_passed_over(whole, part, tmp_path):
    precision, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    harm(run / "step_00000012" / part)
    harm(run / "step_00000009" / part)
    done = trainer("--out", run, "--resume", precision=precision)
    assert done.returncode == DONE, done.stderr
    assert "step_00000012" in done.stderr and part in done.stderr
    assert "step_00000009" in done.stderr
    assert "resumed" in done.stdout and "step_00000006" in done.stdout
    assert_same_run(reference, run, 12)


def test_full_disk(whole, data, tmp_path):
    """On a file system with room for two checkpoints and a bit the third fails; the first two stay good."""
    precision, reference = whole
    small = tmp_path / "small"
    small.mkdir()
    one = sum(path.stat().st_size for path in (reference / "step_00000003").iterdir())
    size = int(2.5 * one) + (16 << 20)  # a save wants 16 MiB to spare
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run = small / "run"
        done = trainer(*options(data), "--out", run, precision=precision)
        assert done.returncode == FAILED
        assert "disk" in complaint(done).lower()
        assert checkpoints(run) == ["step_00000003", "step_00000006"]
        # Full to the last byte: even the log cannot grow.
        with open(small / "ballast", "wb") as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 16))
                    ballast.flush()
            except OSError:
                pass
        full = trainer("--out", run, "--resume", precision=precision)
        assert full.returncode == FAILED and str(run) in full.stderr
        assert checkpoints(run) == ["step_00000003", "step_00000006"]
        (small / "ballast").unlink(missing_ok=True)
        moved = tmp_path / "run"
        shutil.copytree(run, moved)
    finally:
        subprocess.run(["umount", small], check=True)
    assert trainer("--out", moved, "--resume", precision=precision).returncode == DONE
    assert_same_run(reference, moved, 12)


def gpt2_file(path, version, L=2, C=64, H=2, V=70, maxT=48, seed=5):
    """An llm.c weights file of random numbers; returns the tensors' values."""
    Vp = (V + 127) // 128 * 128
    rng = np.random.default_rng(seed)
    count = Vp * C + maxT * C + L * (12 * C * C + 13 * C) + 2 * C
    values = (rng.standard_normal(count) * 0.05).astype("<f4")
    values[V * C:Vp * C] = 0
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, version, maxT, V, L, H, C, Vp
    if version == 5:
        halves = (values.view("<u4") >> 16).astype("<u2")
        values = (halves.astype("<u4") << 16).view("<f4")
        path.write_bytes(header.tobytes() + halves.tobytes())
    else:
        path.write_bytes(header.tobytes() + values.tobytes())
    return values


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_and_out_are_the_same_bytes(precision, tmp_path):
    gpt2_file(tmp_path / "in.bin", 3)
    done = trainer("--init", tmp_path / "in.bin", "--steps", 0, "--out", tmp_path / "run", precision=precision)
    assert done.returncode == DONE, done.stderr
    assert checkpoints(tmp_path / "run") == ["step_00000000"]
    assert (tmp_path / "run/step_00000000/model.bin").read_bytes() == (tmp_path / "in.bin").read_bytes()
    # From the run folder and from the checkpoint, too.
    for source in (tmp_path / "run", tmp_path / "run/step_00000000"):
        out = tmp_path / f"again_{source.name}"
        assert trainer("--init", source, "--steps", 0, "--out", out, precision=precision).returncode == DONE
        assert (out / "step_00000000/model.bin").read_bytes() == (tmp_path / "in.bin").read_bytes()


def test_bf16_weights_are_widened_exactly(tmp_path):
    values = gpt2_file(tmp_path / "in.bin", 5)
    assert trainer("--init", tmp_path / "in.bin", "--steps", 0, "--out", tmp_path / "run").returncode == DONE
    written = (tmp_path / "run/step_00000000/model.bin").read_bytes()
    assert struct.unpack("<2i", written[:8]) == (20240326, 3)
    assert written[1024:] == values.tobytes()


@pytest.mark.parametrize("how", ["tile", "tied", "interpolate", "fresh"])
def test_positions_grow_once_and_stay(data, tmp_path, how):
    gpt2_file(tmp_path / "in.bin", 3, V=VOCAB, maxT=16)
    chosen = options(data, model=None, vocab=None, init=tmp_path / "in.bin")
    done = trainer(*chosen, "--out", tmp_path / "refused")
    assert done.returncode == BAD_INPUT and "--positions tile, tied, interpolate or fresh" in complaint(done)
    run = tmp_path / "run"
    assert trainer(*chosen, "--positions", how, "--out", run).returncode == DONE
    head = struct.unpack("<10i", (run / "step_00000012/model.bin").read_bytes()[:40])
    assert head[2] == (16 if how == "tied" else 32) and head[8:] == ((1, 32) if how == "tied" else (0, 0))
    # Evaluated without a word on positions, at the context that it has: the run's own last validation loss.
    val = [event["loss"] for event in untimed(run) if event["event"] == "val"][-1]
    done = trainer("--eval", "loss", "--init", run, "--val", f"{data}/val_*.bin", "--batch", 2, "--val-tokens", 256)
    assert abs(float(done.stdout.split()[1]) - val) < 1e-6
    # A resume repeats the run, and keeps how its positions grew.
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in checkpoints(again)[3:]:
        shutil.rmtree(again / name)
    assert trainer("--out", again, "--resume").returncode == DONE
    assert_same_run(run, again, 12)
    done = trainer("--out", run, "--resume", "--positions", "tile" if how != "tile" else "tied")
    assert done.returncode == BAD_INPUT and f"has {how} and cannot go on with" in complaint(done)


def test_eval_loss_is_the_runs_own(whole, data):
    precision, run = whole
    want = [event["loss"] for event in untimed(run) if event["event"] == "val"][-1]
    done = trainer("--eval", "loss", "--init", run, "--val", f"{data}/val_*.bin", "--context", 32, "--batch", 2,
                   "--val-tokens", 256, precision=precision)
    assert done.returncode == DONE, done.stderr
    word, value = done.stdout.split()
    assert word == "val_loss" and abs(float(value) / want - 1) < (1e-6 if precision == "fp32" else 2e-2)
    assert len(value.split(".")[1]) == 6


def test_samples(whole):
    precision, run = whole

    def sample(*args):
        done = trainer("--eval", "sample", "--init", run, *args, precision=precision)
        assert done.returncode == DONE, done.stderr
        return [int(token) for token in done.stdout.split()]

    prompt = ["--prompt-tokens", "1,4,13", "--sample-tokens", 20]
    first = sample(*prompt)
    assert first[:3] == [1, 4, 13] and len(first) == 23
    assert sample(*prompt) == first
    assert sample(*prompt, "--seed", 2) != first
    assert sample(*prompt, "--temperature", 0) == sample(*prompt, "--top-k", 1)
    # Longer than the context: the window moves on.
    assert len(sample("--sample-tokens", 100)) == 100


def test_options_from_a_file(data, tmp_path):
    (tmp_path / "options.toml").write_text("batch = 4\nsteps = 2\n")
    done = trainer(*options(data, batch=None, steps=None), "--config", tmp_path / "options.toml", "--out",
                   tmp_path / "run")
    assert done.returncode == DONE, done.stderr
    written = (tmp_path / "run/options.toml").read_text()
    assert "batch = 4" in written and "steps = 2" in written


def test_resume_takes_free_options_and_refuses_others(whole, tmp_path):
    precision, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    done = trainer("--out", run, "--resume", "--steps", 14, "--lr", 1e-3, precision=precision)
    assert done.returncode == DONE, done.stderr
    assert "step_00000014" in checkpoints(run)
    before = [(run / name).read_bytes() for name in ("options.toml", "log.jsonl")]
    for name, value in (("--seed", 3), ("--context", 16), ("--tokens-per-step", 256), ("--beta1", 0.5)):
        refused = trainer("--out", run, "--resume", name, value, precision=precision)
        assert refused.returncode == BAD_INPUT and name in refused.stderr
    other = trainer("--out", run, "--resume", "--steps", 15, precision="bf16" if precision == "fp32" else "fp32")
    assert other.returncode == BAD_INPUT and "build" in other.stderr
    assert before == [(run / name).read_bytes() for name in ("options.toml", "log.jsonl")]


def test_weights_written_without_data_can_be_trained(data, tmp_path):
    run = tmp_path / "run"
    assert trainer("--model", "2,64,2", "--vocab", VOCAB, "--context", 32, "--steps", 0, "--out", run).returncode == DONE
    done = trainer("--out", run, "--resume", "--train", f"{data}/train_*.bin", "--steps", 200)
    assert done.returncode == DONE, done.stderr
    rates = [event["lr"] for event in untimed(run) if event["event"] == "step"]
    assert rates[1] == max(rates) and rates[0] == rates[1] / 2  # warmup is a hundredth of these steps


def test_a_run_that_failed_before_its_first_checkpoint_can_be_mended(data, tmp_path):
    write_shard(tmp_path / "big.bin", np.full(5000, VOCAB))
    run = tmp_path / "run"
    assert trainer(*options(data, train=tmp_path / "big.bin"), "--out", run).returncode == BAD_INPUT
    assert trainer(*options(data), "--out", run, "--resume").returncode == DONE


def test_resume_refuses_harmed_runs_and_other_data(whole, data, tmp_path):
    precision, reference = whole
    run = tmp_path / "harmed"
    shutil.copytree(reference, run)
    log = (run / "log.jsonl").read_bytes()
    for checkpoint in run.glob("step_*"):
        harm(checkpoint / "model.bin")
    done = trainer("--out", run, "--resume", precision=precision)
    assert done.returncode == BAD_INPUT and "none of its checkpoints is whole" in done.stderr
    assert (run / "log.jsonl").read_bytes() == log
    # A shard more under the same glob is another order of windows.
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    run = tmp_path / "run"
    assert trainer(*options(shards, steps=3), "--out", run).returncode == DONE
    write_shard(shards / "train_2.bin", chain(5000, 9))
    done = trainer("--out", run, "--resume", "--steps", 6)
    assert done.returncode == BAD_INPUT and '"train_2.bin", is new' in complaint(done)


def test_resume_without_a_run_starts_one(data, tmp_path):
    assert trainer(*options(data, steps=1), "--out", tmp_path / "run", "--resume").returncode == DONE


def test_old_checkpoints_are_removed(data, tmp_path):
    assert trainer(*options(data, keep=2), "--out", tmp_path / "run").returncode == DONE
    assert checkpoints(tmp_path / "run") == ["step_00000009", "step_00000012"]


def test_batches_of_any_size_follow_the_same_course(data, tmp_path):
    """--batch changes memory, not mathematics: the same windows in the same steps."""
    losses = []
    for batch in (1, 4):
        run = tmp_path / str(batch)
        assert trainer(*options(data, batch=batch, sample_every=0), "--out", run).returncode == DONE
        losses.append([event["loss"] for event in untimed(run) if event["event"] == "step"])
    assert np.allclose(*losses, rtol=1e-5, atol=0)


def test_mixed_sources(data, tmp_path):
    sources = f"{data}/train_0.bin:0.75,{data}/train_1.bin:0.25"
    run = tmp_path / "run"
    assert trainer(*options(data, train=sources, steps=10), "--out", run).returncode == DONE
    meta = json.loads((run / "step_00000010/manifest.json").read_text())["meta"]
    assert meta["loader"]["drawn"] == [30, 10]


def test_a_diverging_run_skips_updates_and_stops(data, tmp_path):
    run = tmp_path / "run"
    done = trainer(*options(data, lr=1e30, warmup=0, steps=50, max_skips=4, sample_every=0, save_every=1), "--out", run)
    assert done.returncode == FAILED
    assert "4 updates in a row" in done.stderr and "there is no healthy checkpoint" in done.stderr
    events = untimed(run)
    skips = [event for event in events if event["event"] == "skip"]
    assert len(skips) == 4 and all("non-finite" in event["reason"] for event in skips)
    # The update after which the loss was no number is the last one that was made: skipping leaves all as it was.
    numbers = [event["step"] for event in skips]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    first, last = (run / f"step_{n:08d}/optimizer.bin" for n in (numbers[0], numbers[2]))
    assert first.read_bytes() == last.read_bytes()


def test_outliers_are_skipped_and_their_window_survives_a_resume(data, tmp_path):
    def common(steps):
        return options(data, model="1,32,1", context=16, batch=1, tokens_per_step=16, steps=steps, schedule="constant",
                       skip_z=1.5, val_every=0, sample_every=0, save_every=0, max_skips=100)

    assert trainer(*common(190), "--out", tmp_path / "whole").returncode == DONE
    skips = [event for event in untimed(tmp_path / "whole") if event["event"] == "skip"]
    assert skips and all(event["step"] > 128 and event["z"] > 1.5 for event in skips)
    # In two parts, the second of which begins with a full window.
    run = tmp_path / "parts"
    assert trainer(*common(150), "--out", run).returncode == DONE
    assert trainer("--out", run, "--resume", "--steps", 190).returncode == DONE
    assert_same_run(tmp_path / "whole", run, 190)


def refusals(data, tmp_path):
    """What is asked for, and what the answer must name."""
    good = tmp_path / "good.bin"
    gpt2_file(good, 3)
    short, lying, magic, big = (tmp_path / f"{name}.bin" for name in ("short", "lying", "magic", "big"))
    write_shard(short, chain(20, 1))
    write_shard(big, np.full(5000, VOCAB))
    lying.write_bytes((data / "val_0.bin").read_bytes()[:-2])
    magic.write_bytes(struct.pack("<3i", 7, 1, 3000) + (data / "val_0.bin").read_bytes()[12:])
    torn, shape, bits = (tmp_path / f"{name}.bin" for name in ("torn", "shape", "bits"))
    torn.write_bytes(good.read_bytes()[:-4])
    shape.write_bytes(struct.pack("<8i", 20240326, 3, 48, 70, 2, 3, 64, 128) + good.read_bytes()[32:])
    bits.write_bytes(struct.pack("<8i", 20240326, 9, 48, 70, 2, 2, 64, 128) + good.read_bytes()[32:])

    def run(**changes):
        return [*options(data, **changes), "--out", tmp_path / f"run_{random.random()}"]

    return {
        "unknown option": ([*run(), "--no-such-option"], "--no-such-option"),
        "no number": (run(steps="many"), "--steps"),
        "negative": (run(batch=-1), "--batch"),
        "model": (run(model="125M"), "125M"),
        "heads": (run(model="2,65,2"), "2,65,2"),
        "head dim": (run(model="2,96,2"), "48"),
        "no model": (run(model=None), "--model"),
        "no train": (run(train=None), "--train"),
        "no out": (options(data), "--out"),
        "empty glob": (run(train=f"{data}/nothing_*.bin"), "nothing_*.bin"),
        "short shard": (run(train=short), "short.bin"),
        "lying shard": (run(train=lying), "lying.bin"),
        "wrong magic": (run(train=magic), "magic.bin"),
        "large token": (run(train=big), "big.bin"),
        "large token in val": (run(val=big), "big.bin"),
        "tokens per step": (run(tokens_per_step=100), "--tokens-per-step 100"),
        "no weights": (run(model=None, init=tmp_path / "nothing.bin"), "nothing.bin"),
        "torn weights": (run(model=None, vocab=None, init=torn), "torn.bin"),
        "weights' shape": (run(model=None, vocab=None, init=shape), "shape.bin"),
        "weights' version": (run(model=None, vocab=None, init=bits), "bits.bin"),
        "weights' vocabulary": (run(model=None, init=good), "--vocab"),
        "long context": (run(model=None, vocab=None, init=good, context=64), "--context 64"),
        "no checkpoint": (run(model=None, init=data), str(data)),
        "tokenizer": (run(tokenizer=good), "good.bin"),
        "short of one step": (run(steps=-1, tokens_per_step=1 << 20), "fewer than one step"),
        "prompt in training": ([*run(), "--prompt-tokens", "64"], "64"),
        "prompt": (["--eval", "sample", "--init", good, "--prompt-tokens", "1,70"], "70"),
        "eval without val": (["--eval", "loss", "--init", good], "--val"),
        "resume without out": (["--resume"], "--out"),
        "config": ([*run(), "--config", tmp_path / "nothing.toml"], "nothing.toml"),
    }


def test_bad_input_is_refused_in_one_line(data, tmp_path):
    for name, (args, word) in refusals(data, tmp_path).items():
        done = trainer(*args)
        assert done.returncode == BAD_INPUT, (name, done)
        assert word in complaint(done), name
        assert not list(tmp_path.glob("run_*/step_*")), name


def test_an_existing_run_is_not_overwritten(whole, data):
    precision, run = whole
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    done = trainer(*options(data), "--out", run, precision=precision)
    assert done.returncode == BAD_INPUT and "--resume" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_help_names_every_option(whole):
    _, run = whole
    done = trainer("--help")
    assert done.returncode == DONE
    names = [line.split(" = ")[0] for line in (run / "options.toml").read_text().splitlines() if " = " in line]
    assert len(names) > 30
    for name in [*names, "out", "resume", "eval", "config"]:
        assert f"--{name} " in done.stdout, name


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread")
def test_one_thread_is_warned_of_unless_it_was_asked_for(data, tmp_path):
    for name, chosen, warned in (("inherited", {"threads": None}, True), ("asked", {"threads": 1}, False)):
        done = trainer(*options(data, steps=1, **chosen), "--out", tmp_path / name,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == DONE and ("one thread" in done.stderr) == warned, done.stderr


@pytest.mark.long
def test_memory_grows_with_the_context_and_not_with_its_square(data, tmp_path):
    write_shard(tmp_path / "long.bin", np.tile(chain(7000, 4), 20))
    peaks = []
    for context in (16384, 32768, 65536):
        args = options(data, model="2,64,2", train=tmp_path / "long.bin", val=None, context=context, batch=1,
                       tokens_per_step=context, steps=1, sample_every=0)
        peaks.append(peak_memory([*args, "--out", str(tmp_path / str(context))]))
    print("peak bytes at 16k, 32k, 64k:", peaks)
    assert peaks[1] <= 2.05 * peaks[0] and peaks[2] <= 2.05 * peaks[1]
