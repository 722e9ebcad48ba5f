"""What the tests of both trainers share: data, a tiny run, and how two runs are compared."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILDS = {"fp32": ROOT / "build/cpu", "bf16": ROOT / "build/cpu-bf16"}
VOCAB = 64
TIMING = {"ms", "tokens_per_second", "peak_percent"}
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 4


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def chain(count, seed):
    """A text that can be learned: after token t comes 3t+1 or, one time in eight, any token."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, VOCAB, count)
    keep = rng.random(count) > 0.125
    tokens = np.zeros(count, dtype=np.int64)
    for i in range(1, count):
        tokens[i] = (3 * tokens[i - 1] + 1) % VOCAB if keep[i] else noise[i]
    return tokens


def trainer(*args, program="train_gpt2", precision="fp32", **kwargs):
    command = [str(BUILDS[precision] / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, **kwargs)


def complaint(done):
    """What a trainer said on stderr: one line, apart from warnings and from what it says at once when it is stopped."""
    stderr = done if isinstance(done, str) else done.stderr
    lines = [line for line in stderr.strip().splitlines()
             if not line.startswith("warning: ") and "a second signal ends the run" not in line]
    assert len(lines) == 1, stderr
    return lines[0]


def options(data, **changes):
    """A tiny run; --name value pairs, None leaves an option out. Two threads would take twice the processors' time."""
    chosen = {
        "model": "2,64,2", "vocab": VOCAB, "train": f"{data}/train_*.bin", "val": f"{data}/val_*.bin", "context": 32,
        "batch": 2, "tokens-per-step": 128, "steps": 12, "warmup": 2, "lr": 3e-3, "val-every": 4, "val-tokens": 256,
        "sample-every": 6, "sample-tokens": 8, "save-every": 3, "keep": 0,
        "threads": 1,
    }
    chosen.update({name.replace("_", "-"): value for name, value in changes.items()})
    if chosen["val"] is None:
        chosen = {name: value for name, value in chosen.items() if not name.startswith("val")}
    if chosen["sample-every"] == 0:
        del chosen["sample-tokens"]
    return [str(word) for name, value in chosen.items() if value is not None for word in (f"--{name}", value)]


def checkpoints(run):
    return sorted(path.name for path in Path(run).glob("step_*"))


def untimed(run):
    events = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key not in TIMING} for event in events]


def assert_same_run(a, b, step):
    """Weights, optimizer states, the rest of the position, and the log but for its timing."""
    name = f"step_{step:08d}"
    for part in ("model.bin", "optimizer.bin"):
        assert (Path(a) / name / part).read_bytes() == (Path(b) / name / part).read_bytes(), part
    metas = [json.loads((Path(run) / name / "manifest.json").read_text())["meta"] for run in (a, b)]
    assert metas[0] == metas[1]
    assert untimed(a) == untimed(b)


def peak_memory(args):
    """Bytes that the fp32 trainer of GPT-2 had resident at most."""
    process = subprocess.Popen([str(BUILDS["fp32"] / "train_gpt2"), *args], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == DONE
    return usage.ru_maxrss * 1024
