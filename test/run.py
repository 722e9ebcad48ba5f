#!/usr/bin/env python3
"""Runs every test that this machine can, prints the time of each part, says what it skipped and why, and closes with
`N passed, N failed, N skipped`. Exits 1 if anything failed.

    test/run.py [--long] [PART ...]      parts: cpu, cpu-bf16, asan, simt, nvcc, cuda, python (default: all)
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "dev"))
import assemble  # noqa: E402

PARTS = ["cpu", "cpu-bf16", "asan", "simt", "nvcc", "cuda", "python"]
TRAINERS = ["train_gpt2", "train_pythia"]
LONG_SUITE = "long"
TIMEOUT = 1800  # seconds for one program: a hang is a failure and not an endless test
SIMT_SEEDS = ["1", "2", "3"]  # of the order in which a block's threads run
LAUNCHES = ROOT / "build" / "launches.txt"
KERNEL_TESTS = {"attention_huge", "gpt2", "pythia", "positions", "recording", "host_store", "host_update",
                "optimizer_bf16", "optimizer_codes"}
DEVICE_ONLY = {"attention_backends"}  # compares kernels that only a GPU has
# Readers of files and the code around them, under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED = ["fuzz", "shards", "tokenizer", "options", "sampler", "outliers", "log", "attention", "layernorm", "embedding",
             "rotary", "rope"]
DOCTEST = re.compile(r"test cases:\s*(\d+)\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed\s*\|\s*(\d+) skipped")


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.reasons = []

    def add(self, passed, failed, skipped):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped

    def skip(self, reason):
        self.skipped += 1
        self.reasons.append(reason)


def run(command, **environment):
    """`timeout` also ends what the program started, and exits with 124. Threads that wait sleep: on a busy machine
    tiny models otherwise spend minutes where seconds are right."""
    return subprocess.run(["timeout", str(TIMEOUT), *command], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "passive"} | os.environ | environment)


def report(name, seconds, outcome):
    print(f"  {name:<32} {seconds:7.1f} s   {outcome}", flush=True)


def run_doctest(binary, long, **environment):
    """One test program: its name, seconds and outcome, for `count`."""
    command = [f"./{binary}"] + ([] if long else [f"--test-suite-exclude={LONG_SUITE}"])
    start = time.monotonic()
    done = run(command, **environment)
    name = binary + "".join(f" {key.lower()}={value}" for key, value in environment.items() if key == "SIMT_SEED")
    return name, time.monotonic() - start, done


def count(tally, name, seconds, done):
    """What a test program prints appears only if it fails."""
    counts = DOCTEST.search(done.stdout)
    if counts:
        _, passed, failed, skipped = map(int, counts.groups())
    else:
        passed, failed, skipped = 0, 1, 0
    if done.returncode and not failed:  # died after its last test, in a sanitizer's check at exit for instance
        failed = 1
    tally.add(passed, failed, skipped)
    if skipped:
        why = "too large for the simulator, long, or of the other precision" if "simt" in name else "long ones (make test-long runs them)"
        tally.reasons.append(f"{name}: {skipped} {why}")
    report(name, seconds, f"{passed} passed" + (f", {failed} FAILED (exit {done.returncode})" if failed else ""))
    if failed:
        print(done.stdout[-6000:] + done.stderr[-6000:], flush=True)


def tests():
    """Names of test programs: those of dev/simt, those that run kernels, and all others."""
    names = sorted(path.stem for path in (ROOT / "test").glob("*.cpp") if path.stem != "main")
    simulator = [n for n in names if n.startswith("simt")]
    kernels = [n for n in names if n in KERNEL_TESTS or n in DEVICE_ONLY or (ROOT / "kernels" / f"{n}.cu").exists()]
    return simulator, kernels, [n for n in names if n not in simulator and n not in kernels]


def build(tally, part, targets):
    start = time.monotonic()
    done = subprocess.run(["make", f"-j{os.cpu_count()}", "--no-print-directory", *targets], capture_output=True,
                          text=True)
    if done.returncode:
        tally.add(0, 1, 0)
        report(f"build {part}", time.monotonic() - start, "FAILED")
        print((done.stdout + done.stderr)[-6000:], flush=True)
        return False
    report(f"build {part}", time.monotonic() - start, "built")
    return True


def run_native(tally, build_name, names, long, extra=()):
    binaries = [f"build/{build_name}/test_{name}" for name in names]
    if build(tally, build_name, [*binaries, *extra]):
        for binary in binaries:
            count(tally, *run_doctest(binary, long))


def run_simt(tally, simulator, kernels, long):
    """The simulator's own tests, then the layers' under several orders of their threads; a program a core."""
    LAUNCHES.unlink(missing_ok=True)
    for name in ("simt", "simt-bf16"):
        if not build(tally, name, [f"build/{name}/test_{test}" for test in simulator + kernels]):
            continue
        for test in simulator:
            count(tally, *run_doctest(f"build/{name}/test_{test}", long, SIMT_LAUNCHES=str(LAUNCHES)))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            work = [(test, seed) for test in kernels for seed in SIMT_SEEDS]
            for outcome in pool.map(
                    lambda job: run_doctest(f"build/{name}/test_{job[0]}", long, SIMT_SEED=job[1], SIMT_THREADS="1",
                                            SIMT_LAUNCHES=str(LAUNCHES), OMP_NUM_THREADS="1"), work):
                count(tally, *outcome)


def run_nvcc(tally, long):
    nvcc = assemble.find_nvcc()
    if not nvcc:
        tally.skip("nvcc is not installed: no kernel was assembled")
        return
    known = assemble.known_archs(nvcc)
    archs = [arch for arch in assemble.ARCHS if long or arch in ("80", "90a")]
    for arch in archs:
        if arch not in known:
            tally.skip(f"this nvcc does not know sm_{arch}")
    if not long:
        tally.reasons.append("sm_86, sm_89 and sm_120 (make test-long assembles for them)")

    def done(name, problem):
        tally.add(0, 1, 0) if problem else tally.add(1, 0, 0)
        if problem:
            report(f"nvcc {name}", 0, f"FAILED\n{problem}")

    kernels = assemble.check_all(nvcc, [arch for arch in archs if arch in known], assemble.all_sources(), done)
    (ROOT / "build" / "assembly.txt").write_text(
        assemble.table(kernels, assemble.read_launches([LAUNCHES] if LAUNCHES.exists() else [])), encoding="utf-8")
    worst = sum(kernel.spills > 0 for kernel in kernels)
    print(f"  {len(kernels)} kernels, {worst} with spills: build/assembly.txt", flush=True)


def run_cuda(tally, kernels, long):
    if not assemble.find_nvcc() or run(["nvidia-smi", "-L"]).returncode:
        tally.skip("no GPU here: CUDA kernels ran under dev/simt only")
        return
    for name in ("cuda", "cuda-fp32"):
        run_native(tally, name, kernels, long)


def run_python(tally, long):
    """pytest for the tools, the scripts and the trainer's command line, each test beside what it tests."""
    if not build(tally, "trainers", [f"build/{name}/{trainer}" for name in ("cpu", "cpu-bf16", "simt", "simt-bf16") for trainer in TRAINERS]):
        return
    python = ROOT / ".venv" / "bin" / "python"
    for folder in ("data", "scripts", "test", "test/trials"):
        files = sorted(str(path) for path in (ROOT / folder).glob("test_*.py"))
        for file in files:
            start = time.monotonic()
            command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", file]
            done = run(command + ([] if long else ["-m", "not long"]))
            seconds = time.monotonic() - start
            last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
            found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", last)}
            failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
            skipped = found.get("skipped", 0) + found.get("deselected", 0)
            if done.returncode not in (0, 5) and not failed:
                failed = 1
            tally.add(found.get("passed", 0), failed, skipped)
            name = str(Path(file).relative_to(ROOT))
            if found.get("deselected"):
                tally.reasons.append(f"{name}: {found['deselected']} long ones (make test-long runs them)")
            tally.reasons += [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
            report(name, seconds, f"{found.get('passed', 0)} passed" + (f", {failed} FAILED" if failed else ""))
            for line in done.stdout.splitlines():
                if line.startswith("covered "):
                    print(f"    {line}", flush=True)
            if failed:
                print((done.stdout + done.stderr)[-8000:], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--long", action="store_true", help="also what takes long: many seeds, kill loops, 2^31 elements")
    args = parser.parse_args()
    parts = args.parts or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    tally, begin = Tally(), time.monotonic()
    simulator, kernels, others = tests()
    for part in parts:
        print(f"{part}:", flush=True)
        start = time.monotonic()
        if part in ("cpu", "cpu-bf16"):
            native = [name for name in kernels if name not in DEVICE_ONLY]
            run_native(tally, part, native + others, args.long, [f"build/{part}/{trainer}" for trainer in TRAINERS])
        elif part == "asan":
            run_native(tally, "cpu-asan", SANITIZED, args.long)
        elif part == "simt":
            run_simt(tally, simulator, kernels, args.long)
        elif part == "nvcc":
            run_nvcc(tally, args.long)
        elif part == "cuda":
            run_cuda(tally, kernels, args.long)
        else:
            run_python(tally, args.long)
        report(f"{part} in all", time.monotonic() - start, "")
    for reason in tally.reasons:
        print(f"skipped: {reason}")
    print(f"all parts: {time.monotonic() - begin:.0f} s")
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
