#!/usr/bin/env python3
"""Holds the rules of the house: formatting, the five files of every layer, what a trainer may not contain, file sizes.

Prints one line for each breach and exits 1 if there was any.
"""

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_LAYERS = {"device", "ptx", "types", "launch", "common", "math", "scratch"}
MAX_LINES = 600
MAX_TRAINER_LINES = 1200
SHARED_LINES = 6
IN_TRAINERS = re.compile(r"__global__|<<<|\bcuda[A-Z_]\w*|^\s*#\s*(if|ifdef|ifndef|elif)\b", re.MULTILINE)
COMMENTED_OUT = re.compile(r"^\s*//.*(\);|\{|\w = .*;)\s*$", re.MULTILINE)
INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# What types.h and the builds' flags make different.
BY_BACKEND = "LONGHAND_SIMT|__CUDACC__|cuda_runtime"
BY_PRECISION = "real|kPrecision|kRealEpsilon|PRECISION_BF16"
DIFFERS = re.compile(rf"\b({BY_PRECISION}|{BY_BACKEND})\b")
ROOMS = ["plan", "loop", "model", "ranks", "options", "device", "files", "base"]  # of runtime/
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )
    return [ROOT / name for name in sorted(listed.stdout.split("\n")) if name and (ROOT / name).exists()]


def check_format(complain):
    sources = [str(p) for p in tracked("*.h", "*.cpp", "*.cu")]
    run = subprocess.run(["clang-format", "--dry-run", "-Werror", *sources], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        names = sorted({line.split(":")[0] for line in run.stderr.splitlines() if "clang-format-violations" in line})
        for name in names or [run.stderr.strip()]:
            complain(f"{name}: not formatted; run make format")


def check_layers(complain):
    """Every kernels/X.h has X.cpp, X.cu, a test and a bench."""
    headers = sorted(p.stem for p in (ROOT / "kernels").glob("*.h") if p.stem not in NOT_LAYERS)
    # attention_tiles.h is a part of the layer attention, seen by its own sources only.
    layers = [name for name in headers if not any(name.startswith(f"{other}_") for other in headers)]
    for layer in layers:
        for suffix in ("cpp", "cu"):
            whole = ROOT / "kernels" / f"{layer}.{suffix}"
            halves = [ROOT / "kernels" / f"{layer}_{half}.{suffix}" for half in ("forward", "backward")]
            if not whole.exists() and not all(half.exists() for half in halves):
                complain(f"kernels/{layer}.h: no kernels/{layer}.{suffix}")
        for path in (f"test/{layer}.cpp", f"dev/bench/{layer}.cpp"):
            if not (ROOT / path).exists():
                complain(f"kernels/{layer}.h: no {path}")


def reached(path, seen):
    """A source and all of the project's headers that it includes."""
    path = Path(os.path.normpath(path))
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for name in INCLUDED.findall(path.read_text(encoding="utf-8")):
        reached(path.parent / name, seen)
    return seen


def names(source, words):
    """Whether a source or a header of it has one of these words, apart from types.h."""
    return any(words.search(re.sub(r"//.*", "", path.read_text(encoding="utf-8")))
               for path in reached(source, set()) if path != ROOT / "kernels" / "types.h")


def is_common(source):
    """Whether a source of runtime/ is the same in every build."""
    return not names(source, DIFFERS)


def depends_on_precision(source):
    return names(source, re.compile(rf"\b({BY_PRECISION})\b"))


def is_common_test(test):
    """Whether a test is the same in every build."""
    return not names(test, DIFFERS)


def check_common(complain):
    """The Makefile's COMMON is exactly the sources that are the same in every build; of dev/simt the precision changes nothing."""
    listed = re.search(r"^COMMON = (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE).group(1).split()
    for path in sorted((ROOT / "runtime").glob("*/*.cpp")):
        if path.stem.endswith(("_cpu", "_cuda", "_mpi")):
            continue
        name = f"{path.parent.name}/{path.stem}"
        common = any(fnmatch.fnmatch(name, pattern.replace("%", "*")) for pattern in listed)
        if common and not is_common(path):
            complain(f"runtime/{name}.cpp: is in COMMON of the Makefile, but what it includes differs between builds")
        if not common and is_common(path):
            complain(f"runtime/{name}.cpp: is the same in every build; add it to COMMON of the Makefile")
    for path in sorted((ROOT / "dev" / "simt").glob("*.cpp")):
        if depends_on_precision(path):
            complain(f"dev/simt/{path.name}: is compiled once, but what it includes depends on the precision")


def check_rooms(complain):
    """A source of runtime/ includes what is in its own room or below: ROOMS, from top to bottom."""
    for path in tracked("runtime/*"):
        room = path.relative_to(ROOT / "runtime").parts[0]
        if room not in ROOMS:
            complain(f"{path.relative_to(ROOT)}: in no room of runtime/ ({', '.join(ROOMS)})")
            continue
        for name in INCLUDED.findall(path.read_text(encoding="utf-8")):
            found = re.fullmatch(r"\.\./(\w+)/.*", name)
            if found and ROOMS.index(found[1]) < ROOMS.index(room):
                complain(f"{path.relative_to(ROOT)}: includes {name}, of a room above its own")


def check_backends(complain):
    """What the Makefile compiles once for all builds of a precision knows nothing of their backends."""
    for path in tracked("runtime/*/*.cpp", "test/*.cpp", "train_*.cu", "kernels/scratch.cpp"):
        own = path.stem.endswith(("_cpu", "_cuda")) or path.stem.startswith("simt")
        if not own and names(path, re.compile(rf"\b({BY_BACKEND})\b")):
            complain(f"{path.relative_to(ROOT)}: is compiled once for all builds of a precision, "
                     "but what it includes differs between backends")


def check_text(complain):
    for path in tracked("*.h", "*.cpp", "*.cu", "*.py", "*.sh", "Makefile", "*.md"):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        trainer = re.fullmatch(r"train_\w+\.cu", name)
        limit = MAX_TRAINER_LINES if trainer else MAX_LINES
        if path.suffix != ".md" and lines > limit:
            complain(f"{name}: {lines} lines; {limit} is the limit")
        if trainer:
            for found in IN_TRAINERS.finditer(text):
                line = text.count("\n", 0, found.start()) + 1
                complain(f"{name}:{line}: a trainer may not contain {found.group().strip()!r}")
        if path.suffix in {".h", ".cpp", ".cu"}:
            for found in COMMENTED_OUT.finditer(text):
                line = text.count("\n", 0, found.start()) + 1
                complain(f"{name}:{line}: looks like commented-out code: {found.group().strip()!r}")
        if path.name != "lint.py" and (found := UNFINISHED.search(text)):
            line = text.count("\n", 0, found.start()) + 1
            complain(f"{name}:{line}: {found.group()}")
        if re.search(r"[ \t]+$", text, re.MULTILINE) and path.suffix != ".md":
            complain(f"{name}: trailing white space")


def own_lines(path):
    """A trainer's lines that are not the model itself: without its lists of tensors and the parts of its two passes."""
    text = re.sub(r"^void \w+::(forward|backward|attention\w*|mlp\w*|project_qkv)\(.*?^}", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not re.match(r"//|#include|t\.add|arena_\.place\(", line)]


def check_trainers(complain):
    """What two trainers share stands in runtime/: no six lines of one are in the other."""
    blocks = {}
    for path in tracked("train_*.cu"):
        lines = own_lines(path)
        for i in range(len(lines) - SHARED_LINES + 1):
            block = tuple(lines[i : i + SHARED_LINES])
            other = blocks.setdefault(block, path)
            if other != path:
                complain(f"{path.name}: six lines from {other.name} from {block[0]!r} on; share them in runtime/")


def check_python(complain):
    for path in tracked("*.py"):
        try:
            compile(path.read_text(encoding="utf-8"), str(path), "exec")
        except SyntaxError as error:
            complain(f"{path.relative_to(ROOT)}:{error.lineno}: {error.msg}")


def check_help(complain):
    """README names no option that the trainers lack."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    table = (ROOT / "runtime" / "options" / "option_table.cpp").read_text(encoding="utf-8")
    for option in sorted(set(re.findall(r"train_\w+ [^`\n]*", readme))):
        for name in re.findall(r"--([a-z][a-z-]+)", option):
            if f'"{name}"' not in table:
                complain(f"README.md: --{name} is no option of the trainers")


def main():
    problems = []
    for check in (check_format, check_layers, check_common, check_rooms, check_backends, check_text, check_trainers, check_python, check_help):
        check(problems.append)
    for problem in problems:
        print(problem)
    print(f"lint: {len(problems)} problems" if problems else "lint: clean")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
