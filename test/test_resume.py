"""What a run goes on from: the newest healthy checkpoint, whatever became of the log, options.toml or the folder's name,
and one process at a time."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from runs import (BAD_INPUT, BUILDS, DONE, FAILED, ROOT, STOPPED, VOCAB, assert_same_run, checkpoints, complaint, options,
                  trainer, untimed)

PARTS = ("manifest.json", "model.bin", "optimizer.bin")


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """Twelve steps, a checkpoint every third; and the same run as it was after nine."""
    folder = tmp_path_factory.mktemp("reference")
    done = trainer(*options(data), "--out", folder / "whole")
    assert done.returncode == DONE, done.stderr
    shutil.copytree(folder / "whole", folder / "nine")
    shutil.rmtree(folder / "nine/step_00000012")
    return folder


def copy(reference, tmp_path, name="nine"):
    run = tmp_path / "run"
    shutil.copytree(reference / name, run)
    return run


def weights(run, step):
    return [(run / f"step_{step:08d}" / part).read_bytes() for part in ("model.bin", "optimizer.bin")]


def steps(run):
    return [event["step"] for event in untimed(run) if event["event"] in ("step", "skip")]


def manifest(run, step):
    return json.loads((run / f"step_{step:08d}/manifest.json").read_text())


@pytest.mark.parametrize("every", [5, 1])
def test_a_run_that_broke_goes_on_from_its_newest_healthy_checkpoint(data, tmp_path, every):
    run = tmp_path / "run"
    chosen = options(data, steps=20, save_every=every, keep=2, val=None, sample_every=0)
    assert trainer(*chosen, "--out", run).returncode == DONE
    broken = trainer("--out", run, "--resume", "--steps", 40, "--lr", 1e12)
    assert broken.returncode == FAILED
    # Step 21 is the update that breaks the weights, and all that was saved after it holds them.
    assert "newest healthy checkpoint is step_00000020" in broken.stderr
    assert {name for name in checkpoints(run) if not manifest(run, int(name[5:]))["fault"]} == {"step_00000020"}
    mended = trainer("--out", run, "--resume", "--steps", 32, "--lr", 1e-4)
    assert mended.returncode == DONE, mended.stderr
    assert "not healthy" in mended.stderr and "step_00000020 is taken" in mended.stderr
    assert steps(run) == list(range(1, 33))
    # The broken ones made room as old ones do; one more is kept than asked, as no loss has proven the last.
    assert len(checkpoints(run)) == 3 and not any(manifest(run, int(name[5:]))["fault"] for name in checkpoints(run))


@pytest.mark.parametrize("val", [True, False])
def test_the_last_update_may_be_the_one_that_breaks_the_weights(data, tmp_path, val):
    run = tmp_path / "run"
    habits = dict(save_every=1, keep=1, sample_every=0) | ({} if val else {"val": None})
    assert trainer(*options(data, steps=3, **habits), "--out", run).returncode == DONE
    broken = trainer("--out", run, "--resume", "--steps", 4, "--lr", 1e30)
    assert broken.returncode == DONE
    assert ("step_00000004 is not healthy: its validation loss is not finite" in broken.stderr) == val
    assert "step_00000003" in checkpoints(run)
    if not val:  # seen by the first step that goes on
        assert trainer("--out", run, "--resume", "--steps", 20, "--lr", 1e-4).returncode == FAILED
    mended = trainer("--out", run, "--resume", "--steps", 6, "--lr", 1e-4)
    assert mended.returncode == DONE and "step_00000003 is taken" in mended.stderr, mended.stderr
    assert steps(run) == list(range(1, 7))


def test_weights_that_are_not_finite_are_refused_by_the_tensors_name(data, reference, tmp_path):
    content = bytearray((reference / "whole/step_00000012/model.bin").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.bin").write_bytes(content)
    for command in (["--eval", "loss", "--val", f"{data}/val_*.bin"],
                    ["--train", f"{data}/train_*.bin", "--steps", 2, "--out", tmp_path / "run"]):
        done = trainer("--init", tmp_path / "nan.bin", *command)
        assert done.returncode == BAD_INPUT and "63 of lnfb is nan" in complaint(done), done
    assert not (tmp_path / "run").exists()
    # Finite, and still nothing to compute with.
    content[1024:1024 + 4 * VOCAB * 64] = np.full(VOCAB * 64, 3e38, "<f4").tobytes()
    content[-4:] = bytes(4)
    (tmp_path / "huge.bin").write_bytes(content)
    done = trainer("--init", tmp_path / "huge.bin", "--eval", "loss", "--val", f"{data}/val_*.bin")
    assert done.returncode == FAILED and "not finite" in complaint(done) and not done.stdout
    for what in ("logits", "sample"):
        done = trainer("--init", tmp_path / "huge.bin", "--eval", what, "--prompt-tokens", 1)
        assert done.returncode == FAILED and "not finite" in complaint(done) and not done.stdout


def test_a_checkpoint_of_weights_that_are_not_finite_says_so(data, reference, tmp_path):
    """A large weight of a position that is not used, which grows by an absurd decay."""
    content = bytearray((reference / "whole/step_00000012/model.bin").read_bytes())
    last = 1024 + 4 * 64 * (128 + 32) - 4
    content[last:last + 4] = np.float32(3e38).tobytes()
    (tmp_path / "in.bin").write_bytes(content)
    run = tmp_path / "run"
    done = trainer(*options(data, model=None, vocab=None, init=tmp_path / "in.bin", context=16, steps=1, warmup=0, lr=1,
                            weight_decay=10, val=None), "--out", run)
    assert done.returncode == DONE, done.stderr
    assert manifest(run, 1)["fault"] == "its weights are not finite, those of wpe first"
    done = trainer("--out", run, "--resume", "--steps", 2)
    assert done.returncode == BAD_INPUT and "2047 of wpe is" in done.stderr


@pytest.mark.parametrize("harm", ["gone", "cut", "torn", "longer", "empty"])
def test_the_log_is_a_record_and_no_state(reference, tmp_path, harm):
    run = copy(reference, tmp_path)
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    kept = {"gone": [], "empty": [], "cut": lines[:8], "torn": [*lines[:8], lines[8][:20]], "longer": lines}[harm]
    log.write_text("".join(kept))
    if harm == "gone":
        log.unlink()
    done = trainer("--out", run, "--resume")
    assert done.returncode == DONE, done.stderr
    assert weights(run, 12) == weights(reference / "whole", 12)
    if harm == "longer":  # as after a kill: what came after the checkpoint is made again
        assert_same_run(reference / "whole", run, 12)
        assert not any("log.jsonl" in line for line in done.stderr.splitlines())
        return
    assert sum("log.jsonl" in line for line in done.stderr.splitlines()) == 1
    assert steps(run)[-3:] == [10, 11, 12]
    if harm in ("cut", "torn"):
        assert log.read_text().startswith("".join(lines[:8]))


def test_without_options_toml_the_checkpoint_knows(data, reference, tmp_path):
    run = copy(reference, tmp_path)
    (run / "options.toml").unlink()
    log = (run / "log.jsonl").read_bytes()
    paths = ["--train", f"{data}/train_*.bin", "--val", f"{data}/val_*.bin", "--threads", 1]  # what no checkpoint records
    for given, word in (([], "--train"), ([*paths, "--model", "2,128,2"], "--model"), ([*paths, "--beta1", 0.5], "--beta1"),
                        ([*paths, "--init", data / "x.bin"], "--init"),
                        (["--train", f"{data}/train_0.bin"], "")):
        done = trainer("--out", run, "--resume", *given)
        assert done.returncode == BAD_INPUT and word in done.stderr.splitlines()[-1], done.stderr
        assert not (run / "options.toml").exists() and (run / "log.jsonl").read_bytes() == log
    done = trainer("--out", run, "--resume", *paths)
    assert done.returncode == DONE and "options.toml is gone" in done.stderr
    assert_same_run(reference / "whole", run, 12)
    written, was = ((folder / "options.toml").read_text() for folder in (run, reference / "whole"))
    assert written == was


def test_a_run_from_weights_goes_on_without_options_toml(data, reference, tmp_path):
    run = tmp_path / "run"
    chosen = options(data, model=None, vocab=None, init=reference / "whole", steps=3)
    assert trainer(*chosen, "--out", run).returncode == DONE
    (run / "options.toml").unlink()
    done = trainer("--out", run, "--resume", "--train", f"{data}/train_*.bin", "--steps", 6)
    assert done.returncode == DONE, done.stderr
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_options_toml_of_another_run_is_refused(reference, tmp_path):
    run = copy(reference, tmp_path)
    text = (run / "options.toml").read_text()
    (run / "options.toml").write_text(text.replace("beta1 = 0.9", "beta1 = 0.8"))
    done = trainer("--out", run, "--resume")
    assert done.returncode == BAD_INPUT
    assert "beta1 = 0.8" in complaint(done) and "step_00000009 was trained with 0.9" in complaint(done)


def test_checkpoints_that_were_moved_away_are_asked_for(reference, tmp_path):
    run = copy(reference, tmp_path)
    log = (run / "log.jsonl").read_bytes()
    for name in checkpoints(run):
        shutil.move(run / name, tmp_path / name)
    done = trainer("--out", run, "--resume")
    assert done.returncode == BAD_INPUT and "step_00000012" in complaint(done)
    assert (run / "log.jsonl").read_bytes() == log


def test_a_longer_run_has_a_longer_schedule(data, tmp_path):
    run = tmp_path / "run"
    chosen = options(data, steps=20, warmup=None, schedule="wsd", save_every=0, val=None, sample_every=0)
    assert trainer(*chosen, "--out", run).returncode == DONE
    done = trainer("--out", run, "--resume", "--steps", 60)
    assert done.returncode == DONE
    assert "learning rate goes from 9.75e-04 at step 20 to 3.00e-03" in done.stderr
    rates = [event["lr"] for event in untimed(run) if event["event"] == "step"]
    assert rates[19] < 1e-3 and set(rates[20:49]) == {3e-3} and 0 < rates[59] < rates[49] < 3e-3  # the last 12 decay
    # The same schedule, or another --lr alone, is no jump.
    shutil.rmtree(run)
    assert trainer(*chosen, "--out", run, "--max-hours", 1e-9).returncode == STOPPED
    assert trainer("--out", run, "--resume", "--lr", 1e-4, "--max-hours", 0).stderr.count("learning rate") == 0


def test_the_same_run_writes_the_same_bytes_anywhere(data, reference, tmp_path):
    shards = tmp_path / "elsewhere/shards"
    shutil.copytree(data, shards)
    done = subprocess.run([str(BUILDS["fp32"] / "train_gpt2"), *options("shards"), "--out", "deep/run", "--memory", "9GiB"],
                          capture_output=True, text=True, timeout=300, cwd=shards.parent)
    assert done.returncode == DONE, done.stderr
    for name in checkpoints(reference / "whole"):
        for part in PARTS:
            ours = (shards.parent / "deep/run" / name / part).read_bytes()
            assert ours == (reference / "whole" / name / part).read_bytes(), (name, part)


class Going:
    """A run that does not end by itself."""

    def __init__(self, data, run, **changes):
        chosen = options(data, **{"steps": 10**6, "val": None, "sample_every": 0, **changes})
        self.log = run / "log.jsonl"
        self.process = subprocess.Popen([str(BUILDS["fp32"] / "train_gpt2"), *chosen, "--out", str(run)], cwd=ROOT,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        deadline = time.monotonic() + 120  # against a hang
        while not (self.log.exists() and b'"step":4' in self.log.read_bytes()):
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def stop(self, number):
        self.process.send_signal(number)
        stderr = self.process.communicate(timeout=120)[1]
        return self.process.returncode, stderr


def test_one_process_trains_in_a_folder(data, tmp_path):
    run = tmp_path / "run"
    with Going(data, run, save_every=2, keep=1) as going:
        for arguments in (["--resume"], options(data)):
            done = trainer("--out", run, *arguments)
            assert done.returncode == BAD_INPUT
        done = trainer("--out", run, "--resume", "--steps", 10**6 + 1)
        assert done.returncode == BAD_INPUT and f"in use by process {going.process.pid} on " in complaint(done)
        assert "steps = 1000000\n" in (run / "options.toml").read_text()
        # To read what it saves is free, however often it removes a checkpoint that is being read.
        for _ in range(6):
            done = trainer("--init", run, "--eval", "sample", "--sample-tokens", 1)
            assert done.returncode == DONE and "harmed" not in done.stderr, done.stderr
        assert going.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    # A kill leaves no lock, and one line a step.
    assert trainer("--out", run, "--resume", "--max-hours", 1e-9).returncode == STOPPED
    assert steps(run) == list(range(1, len(steps(run)) + 1))


def test_of_two_starts_at_once_one_trains(data, tmp_path):
    command = [str(BUILDS["fp32"] / "train_gpt2"), *options(data, val=None, sample_every=0)]
    for round_ in range(3):
        run = tmp_path / str(round_)
        both = [subprocess.Popen([*command, "--out", str(run), *resume], cwd=ROOT, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True) for resume in ([], ["--resume"] if round_ else [])]
        said = [process.communicate(timeout=120)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        # The second may come so late that it finds a run that is done, and with --resume has nothing left to do.
        assert codes == [DONE, BAD_INPUT] or (round_ and codes == [DONE, DONE]), said
        assert steps(run) == list(range(1, 13))


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_goes_during_a_run_is_made_again(data, tmp_path, how):
    run = tmp_path / "run"
    with Going(data, run, save_every=0) as going:
        run.rename(tmp_path / "away")
        if how == "removed":
            shutil.rmtree(tmp_path / "away")
        code, stderr = going.stop(signal.SIGTERM)
    assert code == STOPPED and "removed or renamed" in stderr
    assert len(checkpoints(run)) == 1
    done = trainer("--out", run, "--resume", "--max-hours", 1e-9)
    assert done.returncode == STOPPED, done.stderr


def test_folders_that_cannot_be_are_bad_input(data, reference, tmp_path):
    long = tmp_path / ("x" * 300)
    for command in ([*options(data), "--out", long], ["--out", long, "--resume"],
                    ["--init", long, "--eval", "sample"], [*options(data), "--out", data / "train_0.bin/run"]):
        done = trainer(*command)
        assert done.returncode == BAD_INPUT, done
        assert "too long" in complaint(done) or "Not a directory" in complaint(done)
    gone = tmp_path / "gone"
    gone.mkdir()
    binary = BUILDS["fp32"] / "train_gpt2"
    done = subprocess.run(["sh", "-c", f"rmdir '{gone}'; exec '{binary}' \"$@\"", "sh", *options(data), "--out", "run"],
                          capture_output=True, text=True, cwd=gone, timeout=120)
    assert done.returncode == BAD_INPUT and "working directory is gone" in complaint(done)


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_folders_that_cannot_be_searched_are_bad_input():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(folder) / "closed"  # to all but root, and the trainer is somebody else
        closed.mkdir(mode=0o700)
        binary = shutil.copy(BUILDS["fp32"] / "train_gpt2", folder)
        for command in (["--model", "tiny", "--steps", "0", "--out", closed / "run"],
                        ["--resume", "--out", closed / "run"], ["--eval", "sample", "--init", closed / "run"]):
            done = subprocess.run([binary, *map(str, command)], capture_output=True, text=True, timeout=120, user=65534,
                                  cwd="/")
            assert done.returncode == BAD_INPUT and "Permission denied" in complaint(done), done
