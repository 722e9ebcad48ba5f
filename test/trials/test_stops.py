"""Kills, signals and mishaps at any moment of a run. Whatever they were, what was saved stays, and a run that goes on
afterwards ends with the bytes and the log of the one that nothing befell."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from runs import BUILDS, TIMING
from trials import (ENVIRONMENT, HANG, PROGRAMS, VOCAB, Trial, covered, hold, json_lines,
                    whole_checkpoints, write_data)

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
SAVED = ("model.bin", "optimizer.bin", "manifest.json")
libc = ctypes.CDLL(None)

# ---------------------------------------------------------------------------------------------------------------------
# Runs of all habits, and what becomes of them if nothing befalls them.


def configuration(rng):
    """A run of a fraction of a second: its program, its precision, its options."""
    program, precision = rng.choice(PROGRAMS), rng.choice(list(BUILDS))
    context, batch = rng.choice([16, 32]), rng.choice([1, 2])
    steps = rng.randrange(12, 60)
    o = {
        "model": rng.choice(["1,32,1", "2,64,2", "3,32,1"]), "vocab": VOCAB, "train": "data/train_*.bin",
        "context": context, "batch": batch, "tokens-per-step": context * batch * rng.choice([1, 2, 4, 16]),
        "steps": steps, "lr": 3e-3, "seed": rng.randrange(1000), "threads": rng.choice([1, 1, 2]),
        "save-every": rng.choice([0, 1, 3, 7]), "keep": rng.choice([0, 1, 2, 3]),
        "sample-every": rng.choice([0, 1, 6]), "sample-tokens": rng.choice([4, 40]), "val-every": 0,
        "schedule": rng.choice(["cosine", "wsd", "constant", "linear"]),
        "optimizer": rng.choice(["adamw", "adamw", "lion"]), "state": rng.choice(["fp32", "bf16", "int8"]),
        # What is left open is chosen by the speed of the moment, and two runs may then differ in rounding.
        "recompute": rng.choice(["none", "block", "full"]), "chunk": rng.choice([8, 16, 32]), "offload": "none",
    }
    if o["recompute"] != "none":
        o["head-group"] = 1
    if rng.random() < 0.6:
        o |= {"val": "data/val_*.bin", "val-every": rng.choice([1, 5, 9]), "val-tokens": rng.choice([64, 0])}
    if rng.random() < 0.3:
        o["train"] = "data/train_0.bin:0.75,data/train_1.bin:0.25"
    if rng.random() < 0.3:
        o |= {"skip-z": 1.5, "max-skips": 100}
    if precision == "bf16":
        o |= {"master": rng.choice(["fp32", "none"]), "grad": rng.choice(["fp32", "bf16"])}
    if rng.random() < 0.4:
        waits = ["state"] + ["residual"] * (o["recompute"] != "none") + ["master"] * (o.get("master") == "fp32")
        o["offload"] = ",".join(rng.sample(waits, rng.randrange(1, len(waits) + 1)))
    return program, precision, [str(word) for name, value in o.items() for word in (f"--{name}", value)]


class Undisturbed:
    """Runs that nothing befell, each made once, by whichever trial first needs it."""

    def __init__(self, folder):
        self.folder, self.made, self.lock = folder, {}, threading.Lock()

    def of(self, number):
        with self.lock:
            mine = self.made.setdefault(number, {"lock": threading.Lock()})
        with mine["lock"]:
            if "options" not in mine:
                self.make(number, mine)
        return mine

    def make(self, number, mine):
        folder = self.folder / str(number)
        folder.mkdir()
        write_data(folder / "data")
        trial = Trial(number, folder)
        program, precision, options = configuration(trial.rng)
        begin = time.monotonic()
        code, said = trial.run([trial.binary(program, precision), *options, "--out", "run"], program)
        assert code == 0, "\n".join(trial.story)
        mine.update(program=program, precision=precision, options=options, seconds=time.monotonic() - begin,
                    log=json_lines(folder / "run/log.jsonl"), final=sorted((folder / "run").glob("step_*"))[-1],
                    keep=int(options[options.index("--keep") + 1]))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def course(log):
    """A log without its timing and without the marks of where a run was stopped and taken up again."""
    return [{key: value for key, value in event.items() if key not in TIMING}
            for event in log if event["event"] in ("step", "skip", "val", "sample")]


# ---------------------------------------------------------------------------------------------------------------------
# Moments.


def moment(trial, whole, run):
    """A condition to wait for, and what to call it."""
    rng, log = trial.rng, run / "log.jsonl"
    kind = rng.choice(["delay", "start", "event", "event", "event", "file", "file"])
    if kind == "delay":
        wait = rng.random() * whole["seconds"]
        begin = time.monotonic()
        return "at any time", lambda: time.monotonic() - begin > wait
    if kind == "start":
        wait = rng.random() * 0.06
        begin = time.monotonic()
        return "while it starts", lambda: time.monotonic() - begin > wait
    if kind == "event":
        count = rng.randrange(1, len(whole["log"]))
        name = whole["log"][count - 1]["event"]
        return f"after a {name} event", lambda: (stamp(log) != trial.stamp_before and
                                                 log.read_bytes().count(b"\n") >= count)
    name = rng.choice([".step_*.tmp", ".step_*.tmp/model.bin", ".step_*.tmp/optimizer.bin", ".step_*.tmp/manifest.json",
                       ".step_*.old", "step_*", "options.toml", "log.jsonl"])
    return f"when {name} appears", lambda: next(run.glob(name), None) is not None


def stamp(path):
    """What changes when a file is written."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def bytes_of(path):
    return path.read_bytes() if path.exists() else b""


def wait_for(process, reached):
    """Until then, or until the process has ended on its own."""
    give_up = time.monotonic() + 60
    while process.poll() is None and not reached() and time.monotonic() < give_up:
        time.sleep(0.0003)


# ---------------------------------------------------------------------------------------------------------------------
# What befalls a run. Each returns the exit codes that are right then.


def send(trial, process, number):
    """To the process or to any one of its threads."""
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        if trial.chance(0.5):
            libc.tgkill(process.pid, trial.rng.choice(threads), int(number))
        else:
            os.kill(process.pid, number)
    except OSError:
        pass  # it has ended


def kill(trial, process, whole):
    process.kill()
    return {0, -signal.SIGKILL}


def stop(trial, process, whole):
    number = trial.rng.choice(STOPPING)
    run = trial.folder / "run"
    begun = own_events(trial.log_before, run) and not (run / whole["final"].name).exists()
    send(trial, process, number)
    trial.tell(f"  {number.name}")
    covered[f"stops: {number.name}"] += 1
    # Before it trains, or with nothing left to do, it dies like any program.
    return {0, 4} if begun else {0, 4, -number, 128 + number}


def stop_twice(trial, process, whole):
    codes = stop(trial, process, whole)
    time.sleep(trial.rng.choice([0, 0, 0.001, 0.01]))
    number = trial.rng.choice([*STOPPING, signal.SIGKILL])
    send(trial, process, number)
    trial.tell(f"  and {number.name}")
    return codes | {-number, 128 + number}


def pause(trial, process, whole):
    os.kill(process.pid, trial.rng.choice([signal.SIGSTOP, signal.SIGTSTP]))
    time.sleep(trial.rng.random() * 0.05)
    codes = stop(trial, process, whole) if trial.chance(0.3) else {0}
    os.kill(process.pid, signal.SIGCONT)
    return codes


def close_output(trial, process, whole):
    process.stdout.close()
    return stop(trial, process, whole) if trial.chance(0.3) else {0}


def harmless(trial, process, whole):
    for number in trial.rng.choices([signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG, signal.SIGCONT], k=20):
        send(trial, process, number)
    return {0}


def cut_shard(trial, process, whole):
    shard = trial.folder / "data/train_0.bin"
    os.truncate(shard, trial.rng.choice([0, 1024, 3000]))
    return {0, 1, 2, 4}


def spoil_shard(trial, process, whole):
    """Ids that no model of this size knows."""
    with open(trial.folder / "data/train_0.bin", "r+b") as shard:
        shard.seek(1024 + 2 * trial.rng.randrange(3000))
        shard.write(b"\xff\xff" * 20)
    return {0, 1, 2, 4}


def beside(trial, whole, *options):
    command = [str(trial.binary(whole["program"], whole["precision"])), *options]
    second = subprocess.run(command, cwd=trial.folder, capture_output=True, text=True, timeout=HANG, env=ENVIRONMENT)
    trial.tell(f"  beside it {' '.join(options[:2])}: {second.returncode} {second.stderr.strip()}")
    return second


def rival(trial, process, whole):
    """Another process that goes on with the same run; one of the two is to be refused."""
    second = beside(trial, whole, "--resume", "--out", "run")
    trial.check(second.returncode in (0, 2), "a second process on the same run neither refused nor done")
    return {0} if second.returncode == 2 else {0, 2}


def reader(trial, process, whole):
    """An evaluation of the run while it saves."""
    for _ in range(3):
        begun = whole_checkpoints(trial.folder / "run")
        second = beside(trial, whole, "--eval", "loss", "--init", "run", "--val", "data/val_0.bin", "--val-tokens", "64")
        trial.check(second.returncode == 0 or (second.returncode == 2 and not begun),
                    "a run with a checkpoint cannot be evaluated while it goes on")
    return {0}


def remove_folder(trial, process, whole):
    """Set aside first, so that nothing arrives in it while it goes."""
    run, aside = trial.folder / "run", trial.folder / "aside"
    if run.exists():
        run.rename(aside)
        trial.removed = (aside / whole["final"].name).exists()
        shutil.rmtree(aside, ignore_errors=True)
    return {0, 1, 2}


MISHAPS = {action.__name__.replace("_", " "): action
           for action in (kill, kill, stop, stop, stop, stop_twice, pause, close_output, harmless, cut_shard,
                          spoil_shard, rival, reader, remove_folder)}
WEIGHTS = [4 if name in ("kill", "stop") else 2 if name == "stop twice" else 1 for name in MISHAPS]


def own_events(before, run):
    """Of the log what the present process, or the last one, has trained. `before`: the log that it found, of which it may
    have kept less; steps that it repeats took other times."""
    mine = json_lines(run / "log.jsonl")
    kept = next((i for i, (now, then) in enumerate(zip(mine, before)) if now != then), min(len(mine), len(before)))
    return [event for event in mine[kept:] if event["event"] in ("step", "skip", "val", "sample")]


def limits(trial):
    """Of a process from its start, as a shell sets them: little space for files or for addresses."""
    return trial.rng.choice([f"ulimit -f {trial.rng.randrange(1, 800)}", f"ulimit -v {trial.rng.randrange(100, 1000) << 10}"])


def between(trial, whole, run):
    """What may happen to a run's folder while nothing runs. Returns whether its log is still its whole course."""
    have = whole_checkpoints(run)
    what = trial.rng.choice(["nothing"] * 4 + ["log gone", "log shorter", "options gone", "newest harmed"])
    trial.tell(f"between: {what}")
    log = run / "log.jsonl"
    if what == "log gone" and have and log.exists():
        log.unlink()
        return False
    if what == "log shorter" and have and log.exists():
        os.truncate(log, trial.rng.randrange(log.stat().st_size + 1))
        return False
    if what == "options gone" and have:
        (run / "options.toml").unlink(missing_ok=True)
    if what == "newest harmed" and len(have) > 1:
        part = run / have[-1] / trial.rng.choice(SAVED)
        content = bytearray(part.read_bytes())
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
        part.write_bytes(content)
    return True


# ---------------------------------------------------------------------------------------------------------------------


def disturb(trial, whole, run, command):
    """One process of the run and what befalls it. Returns whether the run's log is still its whole course."""
    name = trial.rng.choices([*MISHAPS, "limits"], [*WEIGHTS, 1])[0]
    output = trial.rng.choice(["", "", "", ">/dev/full", ">&-", "| :"]) if name != "close output" else "| :"
    begin = limits(trial) + "; " if name == "limits" else ""
    if output == "| :":
        output, stdout = "", subprocess.PIPE
    else:
        stdout = subprocess.DEVNULL
    trial.removed = False  # whether the last checkpoint was made, and then removed
    trial.stamp_before, trial.log_before = stamp(run / "log.jsonl"), json_lines(run / "log.jsonl")
    found = bytes_of(run / "log.jsonl")
    at, reached = moment(trial, whole, run)
    data = {path: path.read_bytes() for path in (trial.folder / "data").iterdir()}
    process = trial.start(["sh", "-c", f'{begin}exec "$0" "$@" {output}', *command], stdout)
    if name != "limits":
        wait_for(process, reached)
    alive = process.poll() is None
    trial.tell(f"{name}, {at}" + ("" if alive else ", where it had ended"))
    before = whole_checkpoints(run)
    if name == "limits":
        codes = {0, 1, 3}
    elif alive:
        codes = MISHAPS[name](trial, process, whole)
        covered[f"stops: {at}"] += 1
    else:
        codes = {0}
    covered[f"stops: {name if alive else 'too late'}"] += 1
    code, said = trial.end(process, whole["program"], codes)
    if process.stdout:
        process.stdout.close()
    for path, content in data.items():
        path.write_bytes(content)
    after = whole_checkpoints(run)
    if name == "remove folder":
        trial.check(code or trial.removed or whole["final"].name in after, "done, and nothing is there")
        return not alive
    least = min(len(before), whole["keep"]) if whole["keep"] else len(before)
    trial.check(len(after) >= least, f"{len(before)} whole checkpoints before, {len(after)} after")
    trial.check(not before or after[-1] >= before[-1], "the newest checkpoint is gone")
    if code and name not in ("kill", "stop twice", "limits"):
        last = max((event["step"] for event in own_events(trial.log_before, run)), default=0)
        trial.check(last == 0 or (after and after[-1] >= f"step_{last:08d}"), f"step {last} is lost")
    if code == 4:
        trial.check(after, "stopped with exit code 4 and no checkpoint")
        trial.check("--resume" in said, "stopped without saying how to go on")
    if code == 0:
        trial.check(whole["final"].name in after, "done without its last checkpoint")
    for line in bytes_of(run / "log.jsonl").splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            torn = not line.endswith(b"\n") and (code < 0 or found.endswith(line))  # by a kill now, or before it began
            trial.check(torn, f"no line of a log: {line[:80]}")
    return True


def stops(trial, undisturbed):
    rng = trial.rng
    whole = undisturbed.of(rng.randrange(1 << 30) % 40)
    write_data(trial.folder / "data")
    run = trial.folder / "run"
    first = [trial.binary(whole["program"], whole["precision"]), *whole["options"], "--out", "run", "--resume"]
    log_whole = True

    def command():
        known = (run / "options.toml").exists()
        return first if not known or rng.random() < 0.5 else [first[0], "--out", "run", "--resume"]

    for _ in range(rng.randrange(1, 4)):
        log_whole = disturb(trial, whole, run, command()) and log_whole
        log_whole = between(trial, whole, run) and log_whole
    code, _ = trial.run(command(), whole["program"])
    trial.check(code == 0, "it cannot go on to its end")
    mine, theirs = course(json_lines(run / "log.jsonl")), course(whole["log"])
    if not log_whole:  # what was lost is lost; what there is has to be right
        theirs = [event for event in theirs if event in mine]
    trial.check(mine == theirs, "the log is not that of the undisturbed run: " + difference(mine, theirs))
    final = run / whole["final"].name
    for part in SAVED:
        trial.check((final / part).exists() and (final / part).read_bytes() == (whole["final"] / part).read_bytes(),
                    f"{part} is not that of the undisturbed run")
    left = [path.name for path in run.iterdir() if path.name.endswith((".tmp", ".old"))]
    trial.check(not left, f"left behind: {left}")


def difference(mine, theirs):
    for i, (a, b) in enumerate(zip(mine, theirs)):
        if a != b:
            return f"line {i}: {a} for {b}"
    return f"{len(mine)} lines for {len(theirs)}"


def test_some(undisturbed, tmp_path):
    hold(lambda trial: stops(trial, undisturbed), "stops", 4, tmp_path, many=False)


@pytest.mark.long
def test_many(undisturbed, tmp_path):
    hold(lambda trial: stops(trial, undisturbed), "stops", 600, tmp_path, many=True)
