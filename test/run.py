#!/usr/bin/env python3
"""Runs every test that this machine can, prints the time of each part, says what it skipped and why, and closes with
`N passed, N failed, N skipped`. Exits 1 if anything failed.

    test/run.py [--long] [PART ...]      parts: cpu, cpu-bf16, asan, simt, python (default: all)
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
LONG_SUITE = "long"
TIMEOUT = 1800  # seconds for one program: a hang is a failure and not an endless test
# Readers of files and the code around them, under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED = ["fuzz", "shards", "tokenizer", "options", "sampler", "outliers", "log", "attention", "layernorm", "embedding"]
DOCTEST = re.compile(r"test cases:\s*(\d+)\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed\s*\|\s*(\d+) skipped")


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.reasons = []

    def add(self, passed, failed, skipped):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped


def run(command):
    """`timeout` also ends what the program started, and exits with 124."""
    return subprocess.run(["timeout", str(TIMEOUT), *command], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL)


def report(name, seconds, outcome):
    print(f"  {name:<32} {seconds:7.1f} s   {outcome}", flush=True)


def run_doctest(tally, binary, long):
    """One test program; what it prints appears only if it fails."""
    command = [f"./{binary}"] + ([] if long else [f"--test-suite-exclude={LONG_SUITE}"])
    start = time.monotonic()
    done = run(command)
    seconds = time.monotonic() - start
    counts = DOCTEST.search(done.stdout)
    if counts:
        _, passed, failed, skipped = map(int, counts.groups())
    else:
        passed, failed, skipped = 0, 1, 0
    if done.returncode and not failed:  # died after its last test, in a sanitizer's check at exit for instance
        failed = 1
    tally.add(passed, failed, skipped)
    if skipped:
        tally.reasons.append(f"{binary}: {skipped} long ones (make test-long runs them)")
    report(binary, seconds, f"{passed} passed" + (f", {failed} FAILED (exit {done.returncode})" if failed else ""))
    if failed:
        print(done.stdout[-6000:] + done.stderr[-6000:], flush=True)


def tests():
    """Test programs: those of dev/simt, and all others."""
    names = sorted(path.stem for path in (ROOT / "test").glob("*.cpp") if path.stem != "main")
    return [n for n in names if n.startswith("simt")], [n for n in names if not n.startswith("simt")]


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


def run_cpu(tally, build_name, names, long, extra=()):
    binaries = [f"build/{build_name}/test_{name}" for name in names]
    if build(tally, build_name, [*binaries, *extra]):
        for binary in binaries:
            run_doctest(tally, binary, long)


def run_python(tally, long):
    """pytest for the tools, the scripts and the trainer's command line, each test beside what it tests."""
    if not build(tally, "trainers", ["build/cpu/train_gpt2", "build/cpu-bf16/train_gpt2"]):
        return
    python = ROOT / ".venv" / "bin" / "python"
    for folder in ("data", "scripts", "test"):
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
            if failed:
                print((done.stdout + done.stderr)[-8000:], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--long", action="store_true", help="also what takes long: many seeds, kill loops, 2^31 elements")
    args = parser.parse_args()
    known = ["cpu", "cpu-bf16", "asan", "simt", "python"]
    parts = args.parts or known
    unknown = set(parts) - set(known)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    tally, begin = Tally(), time.monotonic()
    simt_tests, layer_tests = tests()
    for part in parts:
        print(f"{part}:", flush=True)
        start = time.monotonic()
        if part in ("cpu", "cpu-bf16"):
            run_cpu(tally, part, layer_tests, args.long, [f"build/{part}/train_gpt2"])
        elif part == "asan":
            run_cpu(tally, "cpu-asan", SANITIZED, args.long)
        elif part == "simt":
            for name in ("simt", "simt-bf16"):
                run_cpu(tally, name, simt_tests, args.long)
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
