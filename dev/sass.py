#!/usr/bin/env python3
"""What the machine code of attention's kernels asks of a multiprocessor, without a GPU: registers, spills inside and
outside the inner loop, and that loop's instructions for each mma, from NVIDIA's disassembler.

    dev/sass.py [--archs "80 90a"] [--beside FILE] [--name PART] [--write] [KERNEL ...]

The inner loop is the smallest that has all of a kernel's mma. Counted is one turn of it on an unmasked tile: of all ways
through the loop the one with the most copies to shared memory and then the fewest instructions. Loops within it count
as often as they go round, where the code tells.

--beside prints the same for the kernels in FILE, a library or a cubin, whose mangled name has PART.
--write puts the counts of attention's kernels into dev/sass.json, to which `make test` holds them.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import assemble  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = ROOT / "dev" / "sass.json"
# More instructions for each mma than dev/sass.json has, by this part, are a failure: compilers differ by a few.
ALLOWANCE = 0.03

# Opcodes of a kind, by their first word.
KINDS = {
    "mma": {"HMMA"},
    "ldmatrix": {"LDSM"},
    "shared": {"LDS", "STS", "ATOMS", "LDGSTS"},
    "mufu": {"MUFU"},
    "float": {"FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FCHK", "F2FP", "HADD2", "HMUL2", "HFMA2"},
    "integer": {"IADD3", "IADD", "IMAD", "LEA", "LOP3", "SHF", "ISETP", "IMNMX", "VIMNMX", "SEL", "PRMT", "MOV", "CS2R",
                "VIADD", "PLOP3", "IABS"},
}
LOCAL = {"LDL", "STL"}

Instruction = namedtuple("Instruction", "opcode text")
Block = namedtuple("Block", "instructions next")  # next: blocks that may follow
Loop = namedtuple("Loop", "mix instructions")  # Counter by kind of one turn
Found = namedtuple("Found", "name loop inside outside")  # spill instructions in and outside of the inner loop


def find_tool(name):
    """On PATH, beside nvcc, or from PyPI in the project's own environment."""
    nvcc = assemble.find_nvcc()
    places = [Path(nvcc).resolve().parent / name] if nvcc else []
    places += sorted((ROOT / ".venv").glob(f"lib/python3*/site-packages/nvidia/cu*/bin/{name}"))
    return shutil.which(name) or next((str(place) for place in places if place.exists()), None)


def functions(listing):
    """{mangled name: [label or Instruction]} of what nvdisasm prints."""
    found, lines = {}, None
    for line in listing.splitlines():
        if match := re.match(r"\s*\.text\.(\S+):", line):
            lines = found.setdefault(match[1], [])
        elif lines is None:
            continue
        elif match := re.match(r"\s*(\.L_\w+):", line):
            lines.append(match[1])
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            text = match[1].strip()
            opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
            lines.append(Instruction(opcode.split(".")[0], text))
    return found


def target_of(instruction):
    match = re.search(r"`\((\.L_\w+)\)", instruction.text)
    return match[1] if match and instruction.opcode == "BRA" else None


def trips_of(body):
    """How often a loop goes round whose counter grows by a constant until it is one; 1 where the code does not tell."""
    steps = {}
    for instruction in body:
        if match := re.search(r"^U?IADD3 (U?R\d+), (?:U?PT, )*\1, (0x[0-9a-f]+),", instruction.text):
            steps[match[1]] = int(match[2], 16)
    for instruction in body:
        if match := re.search(r"^U?ISETP\.NE\S* U?P\d, U?PT, (U?R\d+), (0x[0-9a-f]+)", instruction.text):
            if match[1] in steps and int(match[2], 16) % steps[match[1]] == 0:
                return int(match[2], 16) // steps[match[1]]
    return 1


def inner_loop(lines):
    """(first, last, loops within) as places in `lines`; None where no loop has an mma."""
    labels = {line: i for i, line in enumerate(lines) if isinstance(line, str)}
    back = []
    for i, line in enumerate(lines):
        if isinstance(line, Instruction) and (target := target_of(line)) in labels and labels[target] < i:
            back.append((labels[target], i))
    def products(loop):
        return sum(isinstance(x, Instruction) and x.opcode == "HMMA" for x in lines[loop[0]:loop[1]])
    most = max(back, key=lambda loop: (products(loop), loop[0] - loop[1]), default=None)
    if most is None or not products(most):
        return None
    return most, [loop for loop in back if most[0] <= loop[0] and loop[1] <= most[1] and loop != most]


def blocks_of(lines, first, last):
    """The loop's basic blocks in the order of the code; edges forward only."""
    starts = {first}
    for i in range(first, last + 1):
        if isinstance(lines[i], str):
            starts.add(i)
        elif lines[i].opcode in ("BRA", "EXIT", "RET"):
            starts.add(i + 1)
    starts = sorted(s for s in starts if s <= last)
    ends = starts[1:] + [last + 1]
    at = {lines[s]: n for n, s in enumerate(starts) if isinstance(lines[s], str)}
    blocks = []
    for n, (start, end) in enumerate(zip(starts, ends)):
        body = [x for x in lines[start:end] if isinstance(x, Instruction)]
        final = body[-1] if body else None
        following = set()
        if final and (target := target_of(final)):
            if at.get(target, -1) > n:
                following.add(at[target])
        goes_on = not (final and final.opcode in ("BRA", "EXIT", "RET") and not final.text.startswith("@"))
        if goes_on and n + 1 < len(starts):
            following.add(n + 1)
        blocks.append(Block((start, body), following))
    return blocks


def loop_of(lines):
    """One turn of a kernel's inner loop, or None."""
    found = inner_loop(lines)
    if not found:
        return None
    (first, last), within = found
    turns = [(a, b, trips_of([x for x in lines[a:b] if isinstance(x, Instruction)])) for a, b in within]
    blocks = blocks_of(lines, first, last)
    best = {len(blocks) - 1: None}

    def weigh(n):
        start, body = blocks[n].instructions
        times = 1
        for a, b, trips in turns:
            if a <= start <= b:
                times *= trips
        counts = Counter()
        for x in body:
            counts[x.opcode] += times
        return counts

    def worth(counts):
        return (counts["HMMA"], counts["LDGSTS"], -sum(counts.values()))

    for n in range(len(blocks) - 1, -1, -1):
        ways = [best[m] for m in blocks[n].next if best.get(m) is not None]
        if n == len(blocks) - 1:
            best[n] = weigh(n)
        elif ways:
            best[n] = max(ways, key=worth) + weigh(n)
        else:
            best[n] = None  # leaves the loop
    counts = best[0]
    if not counts:
        return None
    mix = Counter({kind: sum(counts[op] for op in ops) for kind, ops in KINDS.items()})
    mix["other"] = sum(counts.values()) - sum(mix.values())
    return Loop(mix, sum(counts.values()))


def disassemble(tool, cubin):
    """What is found in each kernel of a cubin that has an mma in a loop."""
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr.strip()}")
    kernels = functions(done.stdout)
    found = []
    for name, lines in zip(assemble.plain_names(list(kernels)), kernels.values()):
        loop = loop_of(lines)
        if not loop:
            continue
        (first, last), _ = inner_loop(lines)
        local = [i for i, x in enumerate(lines) if isinstance(x, Instruction) and x.opcode in LOCAL]
        inside = sum(first <= i <= last for i in local)
        found.append(Found(name, loop, inside, len(local) - inside))
    return found


def per_mma(loop):
    """What dev/sass.json keeps of a kernel."""
    others = loop.instructions - loop.mix["mma"] - loop.mix["ldmatrix"]
    return {"others": round(others / loop.mix["mma"], 3), "ldmatrix": round(loop.mix["ldmatrix"] / loop.mix["mma"], 3)}


def compare(found, expected):
    """What is worse than expected: {name: per mma}; the kernels of one source and architecture."""
    problems = []
    for kernel in found:
        if kernel.inside:
            problems.append(f"{kernel.name} spills in its inner loop: {kernel.inside} instructions")
        if kernel.name not in expected:
            problems.append(f"{kernel.name} is not in dev/sass.json (dev/sass.py --write)")
            continue
        now = per_mma(kernel.loop)
        for what, want in expected[kernel.name].items():
            if now[what] > want * (1 + ALLOWANCE):
                problems.append(f"{kernel.name}: {now[what]} {what} per mma, and dev/sass.json has {want}")
    missing = set(expected) - {kernel.name for kernel in found}
    return problems + [f"{name} is in dev/sass.json and was not found" for name in sorted(missing)]


def check(tool, cubin, source, arch):
    """For test/run.py: what is wrong with a source's kernels, as text. Empty where there is no disassembler."""
    expected = json.loads(EXPECTED.read_text(encoding="utf-8")).get(f"{source.name} sm_{arch}")
    if not tool or expected is None:
        return ""
    return "".join(f"{problem}\n" for problem in compare(disassemble(tool, cubin), expected))


def table(rows):
    head = f"{'kernel':<62} {'arch':<6} {'regs':>4} {'spill':>7} {'mma':>4} " + \
           " ".join(f"{kind:>8}" for kind in [*KINDS, "other"] if kind != "mma")
    lines = [head + "   (for each mma; spills: instructions in the loop + outside)"]
    for arch, registers, kernel in rows:
        mma = kernel.loop.mix["mma"]
        mix = " ".join(f"{kernel.loop.mix[kind] / mma:8.3f}" for kind in [*KINDS, "other"] if kind != "mma")
        lines.append(f"{kernel.name:<62} {arch:<6} {registers:>4} {kernel.inside:>3}+{kernel.outside:<3} {mma:>4} {mix}")
    return "\n".join(lines)


def ours(tool, sources, archs):
    """[(source, arch, registers, Found)] of the project's own kernels."""
    nvcc, flags = assemble.find_nvcc(), assemble.nvcc_flags()

    def job(pair):
        source, arch = pair
        with tempfile.TemporaryDirectory(prefix="longhand_sass_") as folder:
            cubin = Path(folder) / "out.cubin"
            kernels, problem = assemble.assemble(nvcc, flags, source, "bf16", arch, assemble.run, cubin)
            if problem:
                raise RuntimeError(problem)
            registers = {kernel.name: kernel.registers for kernel in kernels}
            return [(source, arch, registers[kernel.name], kernel) for kernel in disassemble(tool, cubin)]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(job, [(s, a) for s in sources for a in archs]) for row in rows]


def beside(tool, path, part, archs):
    """The same of another binary: a cubin, or a library whose cubins cuobjdump takes out."""
    cubins = [path.resolve()]
    with tempfile.TemporaryDirectory(prefix="longhand_sass_") as folder:
        if path.suffix != ".cubin":
            extract = find_tool("cuobjdump")
            if not extract:
                sys.exit("sass.py: no cuobjdump on PATH, beside nvcc or in .venv (pip install nvidia-cuda-cuobjdump)")
            for arch in archs:
                subprocess.run([extract, "-xelf", f"sm_{arch}", str(path.resolve())], cwd=folder, check=True,
                               capture_output=True)
            cubins = sorted(Path(folder).glob("*.cubin"))
        rows = []
        for cubin in cubins:
            if part.encode() in cubin.read_bytes():
                rows += [("-", "-", kernel) for kernel in disassemble(tool, cubin) if part in kernel.name]
        return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="sources by name, without .cu; default: attention's")
    parser.add_argument("--archs", default="80 90a")
    parser.add_argument("--beside", type=Path, metavar="FILE")
    parser.add_argument("--name", default="", metavar="PART")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tool = find_tool("nvdisasm")
    if not tool or not assemble.find_nvcc():
        parser.error("needs nvcc and nvdisasm, on PATH, beside nvcc or in .venv (pip install nvidia-cuda-nvdisasm)")
    archs = args.archs.split()
    sources = [s for s in assemble.all_sources() if s.parent.name == "kernels" and
               (s.stem in args.kernels if args.kernels else s.stem.startswith("attention_"))]
    found = ours(tool, sources, archs)
    print(table([(arch, registers, kernel) for _, arch, registers, kernel in found]))
    if args.write:
        kept = defaultdict(dict)
        for source, arch, _, kernel in found:
            kept[f"{source.name} sm_{arch}"][kernel.name] = per_mma(kernel.loop)
        EXPECTED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.beside:
        print(table(beside(tool, args.beside, args.name, archs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
