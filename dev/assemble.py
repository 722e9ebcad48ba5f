#!/usr/bin/env python3
"""Assembles every kernel with nvcc, without a GPU, and prints what it needs of one: registers, shared memory, spills,
local memory, occupancy. Exits 1 if a file does not assemble, or if attention spills or keeps an array in local memory.

    dev/assemble.py [--archs "80 90a"] [--launches FILE ...] [--out TABLE] [KERNEL ...]

Threads and shared memory come from FILE, which dev/simt writes while the tests run (SIMT_LAUNCHES); without it the
occupancy is left out. Architectures that this nvcc does not know are skipped and said.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["80", "86", "89", "90a", "120"]
PRECISIONS = {"bf16": ["-DPRECISION_BF16=1"], "fp32": []}
# A multiprocessor, from the compute capability tables of the CUDA programming guide: warps, shared memory in bytes.
# All have 65536 registers, given to warps in pieces of 256, and set 1 KiB of shared memory aside for each block.
MULTIPROCESSOR = {"80": (64, 164 << 10), "86": (48, 100 << 10), "89": (48, 100 << 10), "90a": (64, 228 << 10),
                  "120": (48, 100 << 10)}
REGISTERS, REGISTER_PIECE, RESERVED = 65536, 256, 1024

Kernel = namedtuple("Kernel", "source precision arch name registers static spills stack")


def find_nvcc():
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def known_archs(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [arch for arch in ARCHS if f"sm_{arch.rstrip('a')}" in listed]


def nvcc_flags():
    """Those of `make cuda`."""
    done = subprocess.run(["make", "-s", "--no-print-directory", "nvcc-flags"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split()


def plain_names(mangled):
    """Demangled, without parameters and the words every kernel has."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for name in done.stdout.splitlines():
        name = name.replace("(anonymous namespace)::", "")
        depth, end = 0, len(name)
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        names.append(name[:end].removeprefix("void "))
    return names


ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def assemble(nvcc, flags, source, precision, arch, run, cubin=None):
    """(kernels, "") or ([], what nvcc said). cubin: a path that gets the machine code."""
    with tempfile.TemporaryDirectory(prefix="longhand_nvcc_") as folder:
        done = run([nvcc, *flags, *PRECISIONS[precision], f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
                    "-Xptxas", "-v", "-o", str(cubin or f"{folder}/out.cubin"), str(source)])
    said = done.stdout + done.stderr
    return ([], said[:3000]) if done.returncode else read(said, source, precision, arch)


def read(said, source, precision, arch):
    """The same from what nvcc said."""
    if "warning" in said:
        return [], said[:3000]
    found, stack = [], (0, 0, 0)
    for line in said.splitlines():
        if entry := ENTRY.search(line):
            found.append([entry.group(1)])
        elif numbers := STACK.search(line):
            stack = tuple(map(int, numbers.groups()))
        elif (used := USED.search(line)) and found and len(found[-1]) == 1:
            static = STATIC.search(line)
            found[-1] += [int(used.group(1)), int(static.group(1)) if static else 0, stack[1] + stack[2], stack[0]]
    names = plain_names([kernel[0] for kernel in found])
    return [Kernel(source.name, precision, arch, name, *kernel[1:]) for name, kernel in zip(names, found)], ""


def read_launches(paths):
    """{(source, kernel): {(threads, bytes of shared memory)}}"""
    launches = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            threads, shared, source, name = line.split("\t")
            launches.setdefault((source, name), set()).add((int(threads), int(shared)))
    return launches


def occupancy(kernel, threads, shared):
    """Blocks a multiprocessor holds at once, and the part of its warps that they fill."""
    most_warps, shared_bytes = MULTIPROCESSOR[kernel.arch]
    warps = -(-threads // 32)
    piece = -(-kernel.registers * 32 // REGISTER_PIECE) * REGISTER_PIECE
    by_registers = REGISTERS // piece // 4 * 4 // warps  # each of the four quarters has its own registers
    by_shared = shared_bytes // (shared + kernel.static + RESERVED)
    blocks = min(most_warps // warps, by_registers, by_shared, 32)
    return blocks, blocks * warps / most_warps


def table(kernels, launches):
    head = f"{'source':<24} {'kernel':<44} {'type':<5} {'arch':<5} {'regs':>4} {'spill':>5} {'local':>5} " \
           f"{'threads':>7} {'shared':>7} {'blocks':>6} {'occupancy':>9}"
    lines = [head]
    for kernel in sorted(kernels):
        start = f"{kernel.source:<24} {kernel.name:<44} {kernel.precision:<5} {kernel.arch:<5} {kernel.registers:>4} " \
                f"{kernel.spills:>5} {kernel.stack:>5} "
        known = [launch for launch in sorted(launches.get((kernel.source, kernel.name), []))
                 if occupancy(kernel, *launch)[0]]  # none: never launched on this architecture
        if not known:
            lines.append(start + f"{'-':>7} {'-':>7} {'-':>6} {'-':>9}")
        for threads, shared in known:
            blocks, part = occupancy(kernel, threads, shared)
            lines.append(start + f"{threads:>7} {shared:>7} {blocks:>6} {100 * part:>8.0f}%")
    return "\n".join(lines) + "\n"


def all_sources():
    """The product's kernels, and the slower steps kept in dev/ladder, whose spills are shown but do no harm."""
    return sorted((ROOT / "kernels").glob("*.cu")) + sorted((ROOT / "dev" / "ladder").glob("*.cu"))


def jobs(sources, archs):
    """One launch of nvcc each. fp32 is the same source with less in it: one architecture tells. The ladder has no fp32."""
    return [(source, precision, arch) for source in sources for precision in PRECISIONS for arch in archs
            if precision == "bf16" or (arch == archs[0] and source.parent.name != "ladder")]


def check(nvcc, flags, source, precision, arch, run=run, cubin=None):
    """(kernels, what is wrong): it does not assemble, or attention spills."""
    return spills(source, *assemble(nvcc, flags, source, precision, arch, run, cubin))


def spills(source, kernels, problem):
    for kernel in kernels:
        if source.name.startswith("attention") and (kernel.spills or kernel.stack):
            problem += f"{kernel.name} spills {kernel.spills} bytes, {kernel.stack} bytes of local memory\n"
    return kernels, problem


def check_built(source, precision, arch, build):
    """The same of what make has compiled into the folder `build`, and the path of its machine code."""
    folder = build / "ladder" if source.parent.name == "ladder" else build
    said = (folder / f"{source.stem}.o.said").read_text(encoding="utf-8")
    return *spills(source, *read(said, source, precision, arch)), folder / f"{source.stem}.cubin"


def check_all(nvcc, archs, sources, done):
    """done(name, problem) for every file, architecture and precision; returns all kernels."""
    flags = nvcc_flags()
    kernels = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        work = jobs(sources, archs)
        results = pool.map(lambda job: check(nvcc, flags, *job), work)
        for (source, precision, arch), (found, problem) in zip(work, results):
            kernels += found
            done(f"{source.name} {precision} sm_{arch}", problem)
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="sources by name, without .cu; default: all")
    parser.add_argument("--archs", default=" ".join(ARCHS))
    parser.add_argument("--launches", nargs="*", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if not nvcc:
        parser.error("no nvcc on PATH or in /usr/local/cuda/bin")
    known = known_archs(nvcc)
    for arch in args.archs.split():
        if arch not in known:
            print(f"skipped: sm_{arch}, which this nvcc or this script does not know")
    sources = all_sources()
    if args.kernels:
        sources = [source for source in sources if source.stem in args.kernels]
    problems = []

    def done(name, problem):
        if problem:
            problems.append(name)
            print(f"{name}:\n{problem}")

    kernels = check_all(nvcc, [arch for arch in args.archs.split() if arch in known], sources, done)
    lines = table(kernels, read_launches(args.launches))
    print(lines, end="")
    if args.out:
        Path(args.out).write_text(lines, encoding="utf-8")
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
