"""Values that no one should give to an option, alone and beside another option's, in every kind of call. Whatever they
are, the program ends as it says it does, a refusal leaves everything as it was, and weights that were numbers stay."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runs import BUILDS
from trials import (CODES, HANG, PROGRAMS, VOCAB, Trial, changed, covered, hold, is_finite, is_number,
                    snapshot, whole_checkpoints, write_data)

LONG_ENOUGH = 3  # seconds of a processor, after which a run that was asked to be endless is asked to stop
OPTION = re.compile(r"^([* ]) --([a-z0-9-]+)(?: (\S+))?  ((?:.*\n)(?:   .*\n)*)", re.M)
COUNTS = ["0", "1", "2", "3", "4", "5", "7", "8", "16", "32", "64", "127", "1000", "65536", "2147483647", "2147483648",
          "4294967296", "1000000000000", "9223372036854775807"]
FLOATS = ["0", "1", "2", "0.5", "0.9", "0.99999", "0.9999999999", "1e-3", "1e-8", "1e-30", "1e-44", "1e-46", "1e-50",
          "1e-300", "1e3", "1e12", "1e30", "1e38", "1e39", "1e100", "1e300"]
NO_NUMBERS = ["-0", "-1", "-1e-50", "1e400", "nan", "inf", "-inf", "-nan", "9223372036854775808",
              "18446744073709551615", "18446744073709551616", "-2147483649", "-9223372036854775808", "1e3", "0x10",
              "1_000", "1,000", "+5", " 5", "5 ", "05", ".5", "5.", "1e", "٣"]
SIZES = ["1GiB", "1", "0GiB", "1e3MiB", "16 GiB", "0.5MiB", "-1GiB", "9999999TiB", "16gib", "GiB", "40MiB", "64MiB", "300MB", "1GB", "16TiB",
         "1152921504606846976"]
TEXTS = ["", " ", "-", "--", "--help", "none", "None", "NONE", "true", "a" * 300, "a" * 100_000, "é漢🙂", "\x01", "\n",
         "a\nb", "'", '"', "\\", "%s%n", "$(x)", "*", "**", "[", "{a,b}", "~", ",", ",,", ":", "a:b:c", "0,0", "-1,2",
         "1,2,3,4", "1,1,1", "0,0,0", "2,64,3", "1048576,1,1", "1,48,1", "1,1048576,1048576"]
PATHS = ["nowhere", "nowhere/at/all", "/", ".", "..", "data", "data/train_0.bin", "data/*", "data/*.bin", "empty.bin",
         "/dev/null", "/dev/full", "/dev/zero", "loop", "fifo", "secret", "/proc/self/mem", "run", "run/log.jsonl",
         "run/options.toml", "run/step_00000004", "run/step_00000004/model.bin", "data/train_0.bin/x", "a/" * 3000,
         "data/train_0.bin,data/train_0.bin", "data/train_0.bin:0", "data/train_0.bin:nan", "data/train_0.bin:1e308,"
         "data/train_1.bin:1e308", "data/train_0.bin:-1", "data/train_0.bin:"]
# By what --help calls a value, the ones that come near to what it takes.
KINDS = {"COUNTS": "N V T B TOKENS STEPS HEADS K LIST", "FLOATS": "RATE X Z PART NORM HOURS S", "SIZES": "SIZE",
         "PATHS": "PATH FILE GLOB GLOBS DIR"}
# --plan looks at nothing that only a run needs.
ONLY_RUNS = {"train", "val", "tokenizer", "prompt-tokens", "out", "resume", "eval", "config", "plan", "plan-json",
             "plan-for", "gpu", "help", "init"}


def option_table(trial, program):
    """Of each option of a program's --help: what it calls the value ("" for a flag), the words of its description, some
    of which are values, and whether a resumed run may change it."""
    text = subprocess.run([trial.binary(program), "--help"], capture_output=True, text=True).stdout
    found = {name: (value or "", re.findall(r"[a-z0-9][a-z0-9.,-]*[a-z0-9]", description), star == "*")
             for star, name, value, description in OPTION.findall(text)}
    assert len(found) > 40 and found["resume"][0] == "" and found["lr"][0] == "RATE" and "full" in found["recompute"][1]
    return found


def base(eval_=""):
    """A run of a tenth of a second. It may not take much, whatever it is asked for."""
    o = {"vocab": VOCAB, "context": 16, "batch": 2, "memory": "1GiB", "host-memory": "1GiB", "threads": 1,
         "val": "data/val_0.bin", "val-tokens": 64, "sample-tokens": 4}
    if eval_:
        return o | {"eval": eval_, "init": "run", "vocab": None, "prompt-tokens": "1,2,3"}
    return o | {"model": "1,32,1", "train": "data/train_*.bin", "tokens-per-step": 64, "steps": 8, "val-every": 4,
                "sample-every": 4, "save-every": 2, "keep": 2, "warmup": 1, "out": "new"}


def hostile(trial, named, described):
    """Most values are of the kind that the option takes, so that they come as far as the kernels."""
    near = next((globals()[kind] for kind, names in KINDS.items() if named in names.split()), described)
    any_kind = trial.rng.choice([COUNTS, FLOATS, NO_NUMBERS, SIZES, TEXTS, PATHS, described])
    return trial.rng.choice(near if trial.chance(0.7) else any_kind)


def line(trial, o):
    words = []
    for name, value in o.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and trial.chance(0.2):
            words.append(f"--{name}={value}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def write_ground(folder):
    write_data(folder / "data")
    (folder / "empty.bin").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "secret").write_bytes(b"x")
    (folder / "secret").chmod(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder for each program and precision that holds a run of four steps."""
    made = {}
    for program in PROGRAMS:
        for precision in BUILDS:
            folder = tmp_path_factory.mktemp(f"{program}_{precision}")
            write_ground(folder)
            trial = Trial(0, folder)
            o = base() | {"out": "run", "steps": 4}
            code, said = trial.run([trial.binary(program, precision), *line(trial, o)], program)
            assert code == 0, "\n".join(trial.story)
            (folder / "stderr.txt").unlink()
            made[program, precision] = folder
    return made


def seconds_used(process):
    """Of a processor, so that a busy machine changes nothing."""
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def call(trial, program, command, endless):
    """Ends a run that would never end, as it is meant to be ended."""
    process = trial.start(command)
    begin = time.monotonic()
    while process.poll() is None and seconds_used(process) < LONG_ENOUGH and time.monotonic() - begin < HANG:
        time.sleep(0.005)
    if process.poll() is not None:
        return trial.end(process, program)
    trial.tell("  SIGTERM")
    process.send_signal(signal.SIGTERM)
    return trial.end(process, program, CODES | endless)


def option_values(trial, runs):
    rng = trial.rng
    program, precision = rng.choice(list(runs))
    shutil.copytree(runs[program, precision], trial.folder, symlinks=True, dirs_exist_ok=True)
    subprocess.run(["mkfifo", trial.folder / "fifo"], check=True)
    binary = trial.binary(program, precision)
    table = option_table(trial, program)
    kind = rng.choice(["run", "run", "run", "resume", "resume", "loss", "sample", "logits"])
    if kind == "run":
        o = base()
    elif kind == "resume":
        o = {"resume": True, "out": "run", "steps": 20, "threads": 1}
        if trial.chance(0.5):
            o |= {"save-every": 1, "keep": rng.choice([1, 2])}
    else:
        o = base(kind)
    useful = [name for name in sorted(table) if kind != "resume" or table[name][2] or trial.chance(0.1)]
    if trial.chance(0.3):  # the optimizer's numbers, which no range can judge each by itself
        useful = [name for name in useful if table[name][0] in ("RATE", "X", "PART", "NORM")]
    names = rng.sample(useful, rng.choice([1, 1, 2]))
    for name in names:
        o[name] = hostile(trial, *table[name][:2]) if table[name][0] else True
        if name in ("model", "init"):
            o.pop("init" if name == "model" else "model", None)
    covered[f"option values: {kind}"] += 1
    before = snapshot_of(trial)
    compare = kind == "run" and not set(names) & ONLY_RUNS
    if compare:
        planned, _ = trial.run([binary, *line(trial, o), "--plan", "--plan-for", "cpu"],
                               program)
    code, said = call(trial, program, [binary, *line(trial, o)],
                      set() if kind in ("run", "resume") else {-signal.SIGTERM, 128 + signal.SIGTERM})
    covered[f"option values: exit code {code}"] += 1
    after = snapshot_of(trial)
    difference = changed(before, after)
    if code in (2, 3) or kind in ("loss", "sample", "logits"):
        trial.check(not difference, f"exit code {code} and yet other files: {difference[:5]}")
    if compare:
        trial.check((planned if planned in (2, 3) else 0) == (code if code in (2, 3) else 0),
                    f"--plan ended with {planned}, the run with {code}")
    lost = [name for name in difference if name in before and not name.startswith(("run", "stderr.txt"))]
    trial.check(not lost, f"inputs changed: {lost[:5]}")
    folder = o.get("out", "") if "help" not in o else ""
    if kind == "resume" and folder == "run":
        check_health(trial, binary, trial.folder / "run", code, said)
        go_on(trial, program, binary, code)
    elif kind == "run" and folder == "new" and code in (0, 1, 4):
        check_health(trial, binary, trial.folder / "new", code, said)


def snapshot_of(trial):
    found = snapshot(trial.folder)
    found.pop("stderr.txt", None)
    return found


def is_healthy(trial, binary, checkpoint):
    """Whether its weights are numbers and give a loss that is one."""
    if not is_finite(checkpoint / "model.bin"):
        return False
    done = subprocess.run([binary, "--eval", "loss", "--init", checkpoint, "--val", "data/val_0.bin", "--val-tokens", "64",
                           "--memory", "1GiB", "--threads", "1"], cwd=trial.folder, capture_output=True, text=True)
    return done.returncode == 0 and is_number(done.stdout.split()[1])


def check_health(trial, binary, run, code, said):
    """What is recommended to go on from has to be of numbers."""
    whole = whole_checkpoints(run)
    if code == 0:
        trial.check(whole and is_healthy(trial, binary, run / whole[-1]), "done with weights that give no loss")
    advice = " ".join(line for line in said.splitlines() if not line.startswith("warning"))
    for name in re.findall(r"step_\d{8}", advice):
        trial.check(name not in whole or is_healthy(trial, binary, run / name), f"advises {name}, which gives no loss")


def go_on(trial, program, binary, code):
    """A run that could go on before can do so whatever has failed since."""
    run = trial.folder / "run"
    trial.check(any(is_healthy(trial, binary, run / name) for name in whole_checkpoints(run)),
                "the checkpoints gave a loss before, none does now")
    if code == 1:
        again, _ = trial.run([binary, "--resume", "--out", "run", "--steps", 22, "--lr", "1e-4", "--warmup", 1], program)
        trial.check(again == 0, "with good options, too, it cannot go on")


def test_some(runs, tmp_path):
    hold(lambda trial: option_values(trial, runs), "option_values", 20, tmp_path, many=False)


@pytest.mark.long
def test_many(runs, tmp_path):
    hold(lambda trial: option_values(trial, runs), "option_values", 1500, tmp_path, many=True)
