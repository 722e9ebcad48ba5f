"""Runs of several ranks against the same run of one."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import ranks as launcher
from runs import DONE, ROOT, STOPPED, checkpoints, options, trainer, untimed

OURS = {"OMP_NUM_THREADS": "1", "SIMT_THREADS": "1"}


def start(count, args, build="cpu", program="train_gpt2", mpirun=True):
    """The processes of a run, of which the first ends with its code: mpirun, or the ranks themselves."""
    command = [str(ROOT / "build" / build / program), *map(str, args)]
    if mpirun:
        if not shutil.which("mpirun"):
            pytest.skip("no mpirun")
        command, environment = launcher.with_mpirun(count, command)
        environments = [environment]
    else:
        environments = launcher.by_environment(count)
    return [subprocess.Popen(command, env=os.environ | OURS | each, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for each in environments]


def finish(processes, code=DONE, timeout=120):
    said = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return "".join(out for out, _ in said), "".join(err for _, err in said)


def run(count, args, code=DONE, **how):
    return finish(start(count, args, **how), code)


def steps(folder, key, event="step"):
    return [each[key] for each in untimed(folder) if each["event"] == event]


def weights(folder, step):
    raw = (Path(folder) / f"step_{step:08d}" / "model.bin").read_bytes()[1024:]
    return np.frombuffer(raw, dtype="<f4")


CASES = [
    (2, "cpu", "train_gpt2", {}), (3, "cpu", "train_gpt2", {"tokens-per-step": 256}),
    (4, "cpu", "train_pythia", {"optimizer": "lion", "lr": 3e-4}),
    (3, "cpu", "train_pythia", {"state": "int8", "tokens-per-step": 192}),
    (2, "cpu", "train_gpt2", {"grad": "bf16", "state": "int8"}),
    (2, "cpu", "train_gpt2", {"batch": 1, "tokens-per-step": 32}), (8, "cpu-bf16", "train_gpt2", {"tokens-per-step": 576}),
    (3, "simt", "train_gpt2", {"steps": 3, "val-every": 2, "sample-every": 0, "tokens-per-step": 256}),
    (2, "simt", "train_pythia", {"steps": 3, "val-every": 2, "sample-every": 0, "grad": "bf16"}),
]


@pytest.mark.parametrize("count, build, program, changes", CASES)
def test_several_ranks_do_what_one_does(data, tmp_path, count, build, program, changes):
    changes = {"eps": None if "optimizer" in changes else 1e-4, **changes}
    for name, ranks in (("one", 1), ("all", count)):
        out, err = run(ranks, ["--out", tmp_path / name, *options(data, **changes)], build=build, program=program,
                       mpirun=ranks > 1)
        assert "done: " in out and not err, err
    last = steps(tmp_path / "all", "step")[-1]
    assert last == changes.get("steps", 12)
    for key in ("loss", "grad_norm"):
        want, got = np.array(steps(tmp_path / "one", key)), np.array(steps(tmp_path / "all", key))
        # From then on rounding turns into other codes or weights, and goes on from there.
        exact = 1 if build == "cpu-bf16" else 2 if changes.get("state") == "int8" else 12
        rounded = key == "grad_norm" and changes.get("grad") == "bf16"  # once for all ranks, where one rank did it twice
        np.testing.assert_allclose(got[:exact], want[:exact], rtol=1e-3 if rounded else 2e-5)
        np.testing.assert_allclose(got, want, rtol=2e-2)
    want, got = (steps(tmp_path / name, "loss", "val") for name in ("one", "all"))
    np.testing.assert_allclose(got, want, rtol=2e-2 if exact < 12 else 2e-5)
    assert checkpoints(tmp_path / "one") == checkpoints(tmp_path / "all")
    assert [e["event"] for e in untimed(tmp_path / "one")] == [e["event"] for e in untimed(tmp_path / "all")]
    if not {"state", "optimizer", "grad"} & set(changes) and build != "cpu-bf16":
        want, got = weights(tmp_path / "one", last), weights(tmp_path / "all", last)
        assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


# What a run of several ranks may be made of, any two of which some case has together.
AXES = {
    "count": [2, 3, 4, 8], "build": ["cpu", "cpu-bf16", "simt", "simt-bf16"], "mpirun": [True, False],
    "program": ["train_gpt2", "train_pythia"], "optimizer": ["adamw", "lion"], "state": ["fp32", "int8", "bf16"],
    "grad": ["fp32", "bf16"], "master": ["fp32", "none"], "batch": [1, 2], "dealt": ["one", "even", "uneven", "three"],
    "recompute": ["none", "block", "full"], "offload": ["none", "residual", "state"],
}


def possible(case):
    """Of a case, or of a part of it."""
    fp32 = case.get("build") in ("cpu", "simt")
    return not (case.get("mpirun") is False and str(case.get("build")).startswith("cpu") or
                fp32 and case.get("master") == "none" or
                case.get("offload") == "residual" and case.get("recompute") == "none")


def in_pairs():
    """Cases that have each possible pair of values: in turn the best of some drawn ones."""
    rng = random.Random(1)
    pairs = {pair for a, b in itertools.combinations(AXES, 2) for x in AXES[a] for y in AXES[b]
             if possible(dict(pair := ((a, x), (b, y))))}
    cases = []
    while pairs:
        first = min(pairs, key=str)
        drawn = [{name: rng.choice(values) for name, values in AXES.items()} | dict(first) for _ in range(400)]
        cases.append(max(filter(possible, drawn), key=lambda case: len(pairs & set(itertools.combinations(case.items(), 2)))))
        pairs -= set(itertools.combinations(cases[-1].items(), 2))
    return cases


@pytest.mark.long
@pytest.mark.parametrize("case", in_pairs(), ids=lambda case: "-".join(map(str, case.values())))
def test_options_in_pairs_do_what_they_do_on_one_rank(data, tmp_path, case):
    how = {name: case[name] for name in ("build", "program")}
    count, lion, bf16 = case["count"], case["optimizer"] == "lion", case["build"].endswith("bf16")
    batches = {"one": 1, "even": count, "uneven": count + 1, "three": 3 * count}[case["dealt"]]
    words = options(data, steps=4, save_every=2, val_every=2, sample_every=4, tokens_per_step=32 * case["batch"] * batches,
                    eps=None if lion else 1e-4, lr=3e-4 if lion else 3e-3, master=case["master"] if bf16 else None,
                    **{name: case[name] for name in ("optimizer", "state", "grad", "batch", "recompute", "offload")})
    for name, ranks in (("one", 1), ("all", count)):
        out, err = run(ranks, ["--out", tmp_path / name, *words], mpirun=case["mpirun"] and ranks > 1, **how)
        assert "done: 4 steps" in out and not err, err
    for key, event in (("loss", "step"), ("grad_norm", "step"), ("loss", "val")):
        want, got = (np.array(steps(tmp_path / name, key, event)) for name in ("one", "all"))
        rounded = bf16 or key == "grad_norm" and case["grad"] == "bf16"
        if event == "step":  # the first: of the same weights
            np.testing.assert_allclose(got[0], want[0], rtol=1e-2 if rounded else 2e-5)
        np.testing.assert_allclose(got, want, rtol=5e-2)
    # A run of all ranks goes on with one, and one of one with all.
    for name, ranks in (("one", count), ("all", 1)):
        run(ranks, ["--out", tmp_path / name, "--resume", "--steps", 5], mpirun=case["mpirun"] and ranks > 1, **how)
        assert steps(tmp_path / name, "step") == [1, 2, 3, 4, 5]
    last = [steps(tmp_path / name, "loss")[-1] for name in ("one", "all")]
    np.testing.assert_allclose(*last, rtol=5e-2)


def test_the_same_run_gives_the_same_bits_and_resumes_on_any_number(data, tmp_path):
    words = options(data, steps=8)
    run(4, ["--out", tmp_path / "a", *words])
    run(4, ["--out", tmp_path / "b", *words])
    assert (weights(tmp_path / "a", 8) == weights(tmp_path / "b", 8)).all()
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    for count in (1, 3):
        out = tmp_path / f"on-{count}"
        run(4, ["--out", out, *options(data, steps=4)])
        run(count, ["--out", out, "--resume", "--steps", 8], mpirun=count > 1) if count > 1 else trainer("--out", out, "--resume", "--steps", 8)
        assert steps(out, "step") == list(range(1, 9))
        np.testing.assert_allclose(steps(out, "loss"), steps(tmp_path / "a", "loss"), rtol=1e-2)


def started(folder, step=2):
    """Waits until a run has logged this step."""
    for _ in range(600):
        with_steps = Path(folder) / "log.jsonl"
        if with_steps.exists() and f'"step":{step}' in with_steps.read_text().replace(" ", ""):
            return
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


def processes_of(folder):
    """The ranks of a run, by rank, whoever started them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"train_" in words[0]:
            rank = next(int(word.split(b"=")[1]) for word in environment
                        if word.startswith((b"OMPI_COMM_WORLD_RANK=", b"RANK=")))
            found[rank] = int(path.name)
    return found


WAYS = [("cpu", True), ("simt", True), ("simt", False)]


@pytest.mark.parametrize("build, mpirun", WAYS)
@pytest.mark.parametrize("asked", [0, 2])
def test_a_signal_to_any_rank_stops_all_at_one_step(data, tmp_path, build, mpirun, asked):
    out = tmp_path / "run"
    processes = start(3, ["--out", out, *options(data, steps=100000, save_every=0, val=None, sample_every=0)], build, mpirun=mpirun)
    started(out)
    os.kill(processes_of(out)[asked], signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in processes]
    assert {process.returncode for process in processes} == {STOPPED}, said
    err = "".join(err for _, err in said)
    assert err.count("stopped at step") == 1, err
    assert checkpoints(out) == [f"step_{steps(out, 'step')[-1]:08d}"]


def test_usr1_to_mpirun_stops_all(data, tmp_path):
    out = tmp_path / "run"
    processes = start(2, ["--out", out, *options(data, steps=100000, save_every=0, val=None, sample_every=0)])
    started(out)
    processes[0].send_signal(signal.SIGUSR1)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == STOPPED and "stopped at step" in err, err
    assert len(checkpoints(out)) == 1


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_and_ends_all(data, tmp_path, killed, number):
    """Without mpirun, which would end the others by itself."""
    out = tmp_path / "run"
    words = options(data, steps=100000, save_every=5, keep=1, val=None, sample_every=0)
    processes = start(3, ["--out", out, *words, "--timeout", 5], "simt", mpirun=False)
    started(out)
    os.kill(processes_of(out)[killed], number)
    begin = time.monotonic()
    said = [process.communicate(timeout=60)[1] for rank, process in enumerate(processes) if rank != killed]
    assert time.monotonic() - begin < 30
    processes[killed].kill()
    processes[killed].communicate()
    assert all(process.returncode not in (None, 0) for process in processes)
    line = next(err for err in said if err)
    assert sum(map(bool, said)) == 1 and f"rank {killed} (" in line and re.search(r"step [1-9]\d*, (training|save)", line), said
    resumed = trainer("--out", out, "--resume", "--steps", steps(out, "step")[-1], "--threads", 1)
    assert resumed.returncode == DONE, resumed.stderr


def test_long_work_is_progress(data, tmp_path):
    words = options(data, steps=1, tokens_per_step=4096, val_tokens=8192, sample_every=1, sample_tokens=20)
    processes = start(2, ["--out", tmp_path / "run", *words, "--timeout", 3], "simt", mpirun=False)
    finish(processes)


def test_a_shard_that_is_cut_on_all_ranks_leaves_a_checkpoint(data, tmp_path):
    shard, out = tmp_path / "train_0.bin", tmp_path / "run"
    shutil.copy(data / "train_0.bin", shard)
    processes = start(3, ["--out", out, *options(data, train=shard, steps=100000, save_every=0, val=None, sample_every=0)],
                      "simt", mpirun=False)
    started(out)
    os.truncate(shard, 1500)
    _, err = finish(processes, code=1)
    assert err.count("was cut from") == 1, err
    assert checkpoints(out) == [f"step_{steps(out, 'step')[-1]:08d}"]


def test_other_options_on_a_rank_are_refused(data, tmp_path):
    environments = launcher.by_environment(2)
    words = options(data, steps=2)
    processes = [subprocess.Popen([ROOT / "build/simt/train_gpt2", "--out", tmp_path / "run", *words, *more], text=True,
                                  env=os.environ | OURS | each, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for each, more in zip(environments, ([], ["--seed", "7"]))]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert all("options" in err and "rank 1" in err for err in said), said
    assert not (tmp_path / "run").exists()


def test_an_evaluation_is_for_one_process(data, tmp_path):
    done = trainer("--out", tmp_path / "run", *options(data, steps=0))
    assert done.returncode == DONE, done.stderr
    _, err = run(2, ["--init", tmp_path / "run", "--eval", "loss", "--val", data / "val_*.bin", "--context", 32], code=2)
    assert err.count("--eval are for one process") == 1, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("mpirun, program", [(True, "build/cpu/train_gpt2"), (False, "build/simt/train_gpt2")])
def test_the_script_turns_a_stop_into_one_with_a_checkpoint(data, tmp_path, mpirun, program, number):
    out = tmp_path / "run"
    environment = os.environ | OURS | ({} if mpirun else {"MPIRUN": ""})
    if mpirun and not shutil.which("mpirun"):
        pytest.skip("no mpirun")
    words = map(str, options(data, steps=100000, save_every=0, val=None, sample_every=0))
    script = subprocess.Popen(["scripts/multi_gpu.sh", "2", program, "--out", out, *words], cwd=ROOT, env=environment,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    started(out)
    os.killpg(script.pid, number)  # as a terminal does
    _, err = script.communicate(timeout=60)
    assert script.returncode == STOPPED and err.count("stopped at step") == 1, err
    assert len(checkpoints(out)) == 1


@pytest.mark.parametrize("words", [[], ["2"], ["none", "true"], ["0", "true"], ["2", "no/such/program"]])
def test_the_script_refuses_what_it_cannot_start(words):
    done = subprocess.run(["scripts/multi_gpu.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("multi_gpu.sh: ") and done.stderr.count("\n") == 1


def test_the_scripts_say_what_they_would_run():
    for script, words in (("multi_gpu.sh", ["4"]), ("multi_node.sbatch", [])):
        done = subprocess.run([f"scripts/{script}", *words, "true", "--out", "a b"], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"DRY": "1"})
        assert done.returncode == 0 and "true --out a\\ b" in done.stdout, done


def start_in(folders, words):
    """A rank in each folder, without mpirun: the same relative paths are files of each rank's own."""
    return [subprocess.Popen([ROOT / "build/simt/train_gpt2", *map(str, words)], cwd=folder, text=True,
                             env=os.environ | OURS | each, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for each, folder in zip(launcher.by_environment(len(folders)), folders)]


def test_rank_0_alone_reads_and_writes_all_but_shards(data, tmp_path):
    folders = [tmp_path / "zero", tmp_path / "one"]
    words = options(data, steps=0, val=None, sample_every=0)
    assert trainer("--out", tmp_path / "made", *words).returncode == DONE
    for folder in folders:
        folder.mkdir()
        shutil.copy(data / "train_0.bin", folder)
    shutil.copy(tmp_path / "made/step_00000000/model.bin", folders[0] / "init.bin")
    words = options(data, model=None, init="init.bin", train="train_0.bin", steps=4, save_every=2, val=None, sample_every=0)
    finish(start_in(folders, ["--out", "run", *words]))
    shutil.rmtree(folders[0] / "run/step_00000004")
    (folders[0] / "init.bin").unlink()
    finish(start_in(folders, ["--out", "run", "--resume"]))
    assert [path.name for path in folders[1].iterdir()] == ["train_0.bin"]
    assert steps(folders[0] / "run", "step") == [1, 2, 3, 4]


def test_other_shards_on_a_rank_are_named(data, tmp_path):
    folders = [tmp_path / "zero", tmp_path / "one"]
    for folder, shard in zip(folders, ("train_0.bin", "train_1.bin")):
        folder.mkdir()
        shutil.copy(data / shard, folder / "train.bin")
    processes = start_in(folders, ["--out", "run", *options(data, train="train.bin", steps=2, val=None, sample_every=0)])
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "rank 1" in errors[0] and "other shards for --train than rank 0" in errors[0] and not errors[1], errors
    assert not (folders[0] / "run").exists()


def test_files_do_not_know_how_many_ranks_wrote_them(data, tmp_path):
    words = options(data, steps=0)
    assert trainer("--out", tmp_path / "one", *words).returncode == DONE
    run(3, ["--out", tmp_path / "three", *words])
    for part in ("model.bin", "optimizer.bin", "manifest.json"):
        one, three = (tmp_path / name / "step_00000000" / part for name in ("one", "three"))
        assert one.read_bytes() == three.read_bytes(), part


TIMEOUT = 5  # seconds without a sign of progress
GRACE = 10  # Control::kGrace


def lose_one(data, folder, number):
    """Kills or stops a random rank at a random moment; what is wrong with what the others did, or nothing."""
    rng = random.Random(number)
    count, killed = rng.choice([2, 3, 4]), rng.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
    build, mpirun = rng.choice([("cpu", True), ("simt", False)])
    words = options(data, steps=100000, save_every=rng.choice([1, 3]), keep=2, val_every=5, sample_every=4)
    processes = start(count, ["--out", folder, *words, "--timeout", TIMEOUT], build, mpirun=mpirun)
    end = time.monotonic() + rng.choice([1, 4]) * rng.random()
    found = {}
    while time.monotonic() < end or len(found) < count:
        found = processes_of(folder)
        time.sleep(0.01)
    lost = rng.randrange(count)
    os.kill(found[lost], killed)
    begin = time.monotonic()
    said = [p.communicate(timeout=120)[1] for rank, p in enumerate(processes) if mpirun or rank != lost]
    took = time.monotonic() - begin
    if not mpirun:
        processes[lost].kill()
        processes[lost].communicate()
    what = f"number {number}: {killed.name} to rank {lost} of {count}, {build}, after {took:.1f} s: {said}"
    if any(process.returncode == 0 for process in processes):
        return f"exit 0; {what}"
    if took > 2 * TIMEOUT + GRACE:
        return f"waited too long; {what}"
    if not any(f"rank {lost}" in err for err in said):
        return f"not named; {what}"
    if list(Path(folder).glob("step_*")):
        last = max(int(name[5:]) for name in checkpoints(folder))
        resumed = trainer("--out", folder, "--resume", "--steps", last + 2, "--threads", 1)
        if resumed.returncode != DONE:
            return f"not resumed: {resumed.stderr}; {what}"
    return None


@pytest.mark.long
def test_ranks_that_are_lost_at_any_moment(data, tmp_path):
    first = int(os.environ.get("SEED", "0"))
    wrong = [lose_one(data, tmp_path / str(number), number) for number in range(first, first + int(os.environ.get("TRIALS", 40)))]
    assert not any(wrong), "\n".join(filter(None, wrong))
