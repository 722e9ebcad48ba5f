"""Signals and standard output, from the outside: what stops a run, what does not, and that none harms it."""

import ctypes
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from runs import (BUILDS, DONE, FAILED, ROOT, STOPPED, assert_same_run, checkpoints, complaint, options, untimed,
                  write_shard)

GUARD = 300  # seconds after which something hangs; nothing else here is measured by the clock
libc = ctypes.CDLL(None)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
LONG = {"steps": 300, "save_every": 100, "val_every": 100, "sample_every": 150}


def start(args, program="train_gpt2", precision="fp32", stdout=subprocess.DEVNULL, **more):
    command = [str(BUILDS[precision] / program), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, **more)


def end(process):
    """Its exit status and what it said on stderr, apart from the warning that a machine of one core always brings."""
    _, stderr = process.communicate(timeout=GUARD)
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: running on one thread")]
    return process.returncode, lines


def wait_until(process, happened):
    deadline = time.monotonic() + GUARD
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_steps(process, run):
    """Until this process has made a step."""
    log = Path(run) / "log.jsonl"
    count = lambda: log.read_text().count('"event":"step"') if log.exists() else 0
    before = count()
    wait_until(process, lambda: count() > before)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert end(start([*options(data, **LONG), "--out", run]))[0] == DONE
    return run


def test_each_signal_stops_a_run_with_a_checkpoint(undisturbed, data, tmp_path):
    run = tmp_path / "run"
    for number in STOPPING:
        process = start([*options(data, **LONG), "--out", run, "--resume"])
        wait_for_steps(process, run)
        process.send_signal(number)
        code, (said, last) = end(process)
        assert code == STOPPED
        assert signal.strsignal(number) in said and "a second signal ends the run at once" in said
        assert signal.strsignal(number) in last and f"--out {run} --resume" in last
    assert end(start(["--out", run, "--resume"]))[0] == DONE
    assert_same_run(undisturbed, run, 300)


def test_a_cpu_time_limit_stops_a_run(data, tmp_path):
    """The system sends XCPU again every second: that is no second wish to stop."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (1, 100))
    process = start([*options(data, steps=10**6), "--out", tmp_path / "run"], preexec_fn=limit)
    code, lines = end(process)
    assert code == STOPPED and "CPU time limit exceeded" in lines[0]


def test_one_stop_that_arrives_as_two_signals(data, tmp_path):
    """timeout(1) sends its signal to the process and to the group that it is in."""
    process = start([*options(data, steps=10**6), "--out", tmp_path / "run"])
    wait_for_steps(process, tmp_path / "run")
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    assert end(process)[0] == STOPPED


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    """A library to preload that sends signals; what it reads from the environment is in its source."""
    library = tmp_path_factory.mktemp("storm") / "storm.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-pthread", "-o", library, ROOT / "test/signal_storm.c"], check=True)

    def environment(**settings):
        return os.environ | {"LD_PRELOAD": str(library)} | {f"SIGNAL_STORM_{k}": str(v) for k, v in settings.items()}

    return environment


def test_a_second_signal_ends_a_run_that_hangs_in_its_save(data, tmp_path, storm):
    run = tmp_path / "run"
    process = start([*options(data, steps=10**6), "--out", run], env=storm(HANG="step_"))
    wait_for_steps(process, run)
    deadline = time.monotonic() + GUARD
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    code, lines = end(process)
    assert code == -signal.SIGINT
    assert len(lines) == 1 and "a second signal" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_an_evaluation(undisturbed, number):
    process = start(["--eval", "sample", "--init", undisturbed, "--sample-tokens", 10**7])
    wait_until(process, lambda: len(os.listdir(f"/proc/{process.pid}/task")) > 1)
    process.send_signal(number)
    assert end(process) == (-number, [])


def test_an_ignored_interrupt_stays_ignored(data, tmp_path):
    """As nohup and a script's background jobs leave it."""
    run = tmp_path / "run"
    ignore = lambda: (signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process = start([*options(data, steps=10**6), "--out", run], preexec_fn=ignore)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        wait_for_steps(process, run)
        process.send_signal(number)
    assert end(process)[0] == STOPPED
    assert untimed(run)[-1]["reason"] == "signal Terminated"


def test_job_control(data, tmp_path):
    run = tmp_path / "run"
    process = start([*options(data, steps=10**6), "--out", run], preexec_fn=os.setpgrp)
    state = lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    wait_for_steps(process, run)
    process.send_signal(signal.SIGTSTP)
    wait_until(process, lambda: state() == "T")
    process.send_signal(signal.SIGCONT)
    wait_for_steps(process, run)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == STOPPED


def test_output_that_fails_ends_no_training(data, tmp_path):
    assert end(start([*options(data), "--out", tmp_path / "whole"]))[0] == DONE

    def outputs():
        reader, writer = os.pipe()
        os.close(reader)
        yield "closed pipe", {"stdout": writer}
        os.close(writer)
        yield "full disk", {"stdout": os.open("/dev/full", os.O_WRONLY)}
        yield "closed", {"preexec_fn": lambda: os.close(1)}
        yield "all closed", {"preexec_fn": lambda: os.closerange(0, 3)}

    for name, how in outputs():
        run = tmp_path / name
        assert end(start([*options(data), "--out", run], **how)) == (DONE, []), name
        assert_same_run(tmp_path / "whole", run, 12)


def test_a_run_stops_though_its_reader_has_gone(data, tmp_path):
    reader, writer = os.pipe()
    process = start([*options(data, steps=10**6), "--out", tmp_path / "run"], stdout=writer)
    os.close(writer)
    os.read(reader, 1)  # as `| head -1` does
    os.close(reader)
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == STOPPED


def test_a_run_stops_though_its_reader_sleeps(data, tmp_path):
    """As `| less` does at the end of its page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = start([*options(data, steps=10**6), "--out", tmp_path / "run"], stdout=writer)
    log = tmp_path / "run/log.jsonl"
    wait_until(process, lambda: log.exists() and '"val"' in log.read_text())  # now its line waits for room
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == STOPPED
    os.close(reader), os.close(writer)


@pytest.mark.parametrize("what", ["loss", "sample", "logits"])
def test_an_evaluation_whose_output_fails_has_failed(undisturbed, data, what):
    args = ["--eval", what, "--init", undisturbed, "--val", f"{data}/val_*.bin", "--val-tokens", 64, "--sample-tokens", 4]
    args += ["--prompt-tokens", "1,2"] if what == "logits" else []
    full = os.open("/dev/full", os.O_WRONLY)
    for how in ({"stdout": full}, {"preexec_fn": lambda: os.close(1)}):
        code, lines = end(start(args, **how))
        assert code == FAILED and "standard output" in lines[-1], how
    os.close(full)


def wide(shard, width, **changes):
    """Products wide enough for every kernel of oneDNN's."""
    shape = {"model": f"1,{width},{width // 64}", "vocab": 512, "context": 1024, "batch": 1, "tokens_per_step": 2048}
    quiet = {"val": None, "val_every": 0, "sample_every": 0, "save_every": 0}
    # What is left open is chosen by the speed of the moment, and two runs may then differ in rounding.
    chosen = {"recompute": "none", "chunk": 64, "offload": "none"}
    return options(shard, **shape | quiet | chosen | changes)


@pytest.fixture(scope="module")
def long_shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    write_shard(folder / "train_0.bin", np.random.default_rng(7).integers(0, 512, 100000))
    return folder


def same_weights(a, b, step):
    name = f"step_{step:08d}"
    return all((a / name / part).read_bytes() == (b / name / part).read_bytes() for part in ("model.bin", "optimizer.bin"))


def check_storm(storm, shard, tmp_path, **case):
    width, threads = case.pop("width"), case.pop("threads")
    args = wide(shard, width, steps=3, threads=threads)
    assert end(start([*args, "--out", tmp_path / "calm"], **case))[0] == DONE
    report = tmp_path / "report"
    environment = storm(MICROSECONDS=1000, REPORT=report)
    assert end(start([*args, "--out", tmp_path / "storm"], env=environment, **case)) == (DONE, [])
    _, sent, _, handled = report.read_text().split()
    assert int(sent) > 50 and int(handled) == 0
    assert same_weights(tmp_path / "calm", tmp_path / "storm", 3)


@pytest.mark.parametrize("program, threads", [("train_gpt2", 2), ("train_pythia", 1)])
def test_signals_to_every_thread_change_nothing(long_shard, tmp_path, storm, program, threads):
    check_storm(storm, long_shard, tmp_path, width=256, threads=threads, program=program)


def signal_a_thread(process, number, rng):
    """Any but the storm's own, of which the trainer knows nothing; none if the process has ended."""
    try:
        tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
        threads = [int(task.name) for task in tasks if (task / "comm").read_text() != "storm\n"]
    except OSError:
        return
    if threads:
        libc.tgkill(process.pid, int(rng.choice(threads)), int(number))


STEPS = {128: 100, 256: 60, 512: 30, 1024: 15, 2048: 10}  # enough for a run to be stopped several times
STOPS = 5  # in each case, two hundred in all


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("program", ["train_gpt2", "train_pythia"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", STEPS)
def test_stopped_by_a_signal_to_any_thread_in_a_storm(long_shard, tmp_path, storm, width, threads, program, precision):
    """No crash, no lost checkpoint, the same weights."""
    case, steps, context = {"program": program, "precision": precision}, STEPS[width], 64 if width < 512 else 16
    small = {"context": context, "tokens_per_step": 2 * context, "optimizer": "lion", "state": "bf16", "keep": 1}
    args = wide(long_shard, width, steps=steps, threads=threads, **small)
    assert end(start([*args, "--out", tmp_path / "calm"], **case))[0] == DONE
    run, log = tmp_path / "storm", tmp_path / "storm/log.jsonl"
    step_times = lambda: re.findall('"event":"step".*"ms":([0-9.]+)', log.read_text()) if log.exists() else []
    rng = np.random.default_rng(width + threads)
    stopped = 0
    for attempt in range(10 * STOPS):
        number, before, known = (signal.SIGTERM, signal.SIGUSR1)[attempt % 2], checkpoints(run), len(step_times())
        process = start([*args, "--out", run, "--resume"], env=storm(MICROSECONDS=1000), **case)
        if stopped < STOPS:
            while process.poll() is None and len(step_times()) <= known:
                time.sleep(0.001)
            time.sleep(rng.random() * float((step_times() or [0])[-1]) / 1000)  # somewhere in a step
            signal_a_thread(process, number, rng)
        code, lines = end(process)
        if code == STOPPED:
            assert signal.strsignal(number) in lines[-1] and max(checkpoints(run)) > max(before, default="")
            stopped += 1
            continue
        # It came after the last step or, announced, in it; or all five have been.
        announced = stopped < STOPS and len(lines) == 1 and "stopping after this" in lines[0]
        assert code == DONE and (lines == [] or announced) and same_weights(tmp_path / "calm", run, steps)
        if stopped == STOPS:
            break
        shutil.rmtree(run)
    print(f"{stopped} stops in {attempt + 1} processes")
    assert stopped == STOPS
    shutil.rmtree(tmp_path)  # up to a gigabyte


@pytest.mark.parametrize("own, spins", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_waiting_threads_spin_briefly_unless_told_otherwise(own, spins):
    """A busy neighbour otherwise makes a step several times as long."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code, lines = end(start(["--help"], env=clean | own | {"OMP_DISPLAY_ENV": "verbose"}))
    assert code == DONE and f"GOMP_SPINCOUNT = '{spins}'" in " ".join(lines)


def test_help_that_cannot_be_printed_has_failed():
    with open("/dev/full", "w") as full:
        code, lines = end(start(["--help"], stdout=full))
    assert code == FAILED and "standard output" in lines[-1]
