#!/usr/bin/env python3
"""Runs every test that this machine can and says what it skipped and why. Builds and tests share the cores: a program is
tested while others compile. Prints the time of each test, what each part took of the processors, and closes with
`N passed, N failed, N skipped`. Exits 1 if anything failed.

    test/run.py [--long] [PART ...]      parts: common, cpu, cpu-bf16, asan, simt, ranks, nvcc, cuda, python (default: all)
"""

import argparse
import concurrent.futures
import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "dev"))
import assemble  # noqa: E402
import lint  # noqa: E402
import sass  # noqa: E402

PARTS = ["common", "cpu", "cpu-bf16", "asan", "simt", "ranks", "nvcc", "cuda", "python"]
# What each part may take of the processors, building and testing, in seconds: together the limit of 15 minutes on two
# cores. A part that takes more is said at the end.
SHARES = {"common": 70, "cpu": 150, "cpu-bf16": 170, "asan": 210, "simt": 580, "ranks": 170, "nvcc": 190,
          "python": 260}
PYTHON_BUILDS = ["cpu", "cpu-bf16", "simt", "simt-bf16"]  # whose trainers the Python tests run
TRAINERS = ["train_gpt2", "train_pythia"]
CUDA_BUILD, CUDA_ARCH = "cuda-sm90a", "90a"  # compiled, its launches' host side too, and linked, GPU or not
RANKS = [1, 2, 3, 4, 8]
LONG_SUITE = "long"
TIMEOUT = 1800  # seconds for one program: a hang is a failure and not an endless test
PYTHON = ROOT / ".venv" / "bin" / "python"
SIMT_SEEDS = ["1", "2", "3"]  # of the order in which a block's threads run
LAUNCHES = ROOT / "build" / "launches.txt"
KERNEL_TESTS = {"attention_huge", "gpt2", "pythia", "positions", "recording", "host_store", "host_update", "device",
                "optimizer_bf16", "optimizer_codes"}
DEVICE_ONLY = {"attention_backends"}  # compares kernels that only a GPU has
# Readers of files and the code around them, under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED = ["fuzz", "shards", "tokenizer", "options", "sampler", "outliers", "log", "attention", "layernorm", "embedding",
             "rotary", "rope"]
DOCTEST = re.compile(r"test cases:\s*(\d+)\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed\s*\|\s*(\d+) skipped")

Done = namedtuple("Done", "returncode stdout stderr seconds processor")


class Tally:
    """What was found, and the processors' seconds of each part: (building, testing)."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.reasons = []
        self.taken = defaultdict(lambda: [0.0, 0.0])
        self.lock = threading.Lock()

    def add(self, passed, failed, skipped):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped

    def skip(self, reason):
        self.skipped += 1
        self.reasons.append(reason)


class Slots:
    """One token a core, in a pipe that is also make's jobserver, so that compilers and tests together fill the cores."""

    def __init__(self, count):
        self.count = count
        self.out, self.into = os.pipe()
        os.set_blocking(self.out, False)
        os.write(self.into, b"+" * count)

    @contextlib.contextmanager
    def slot(self):
        while True:
            select.select([self.out], [], [])
            with contextlib.suppress(BlockingIOError):  # another was faster
                token = os.read(self.out, 1)
                break
        try:
            yield
        finally:
            os.write(self.into, token)

    def make_flags(self):
        """MAKEFLAGS of a make that has one slot already and takes others from here; `make test VARIABLE=…` holds on."""
        _, separator, variables = os.environ.get("MAKEFLAGS", "").partition("-- ")
        return f" -j{self.count} --jobserver-auth={self.out},{self.into} {separator}{variables}"


def metered(command, pass_fds=(), **environment):
    """Runs to the end; also says what it took, everything that it started included."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, pass_fds=pass_fds,
                                   env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Done(process.returncode, *texts, time.monotonic() - start, usage.ru_utime + usage.ru_stime)


def run(command, **environment):
    """`timeout` also ends what the program started, and exits with 124. Threads that wait sleep: on a busy machine
    tiny models otherwise spend minutes where seconds are right."""
    passive = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    return metered(["timeout", str(TIMEOUT), *command], **passive | environment)


def report(name, seconds, outcome):
    print(f"  {name:<40} {seconds:7.1f} s   {outcome}", flush=True)


class Job:
    """A test to run once all of `needs` is built. `lock`: what of its kind must not run beside it."""

    def __init__(self, part, name, work, read, needs=(), lock=None):
        self.part, self.name, self.work, self.read, self.needs, self.lock = part, name, work, read, set(needs), lock

    def __call__(self, tally, slots):
        with self.lock or contextlib.nullcontext(), slots.slot():
            done = self.work()
        with tally.lock:
            tally.taken[self.part][1] += done.processor
            self.read(tally, self.name, done)


def read_doctest(tally, name, done):
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
    report(name, done.seconds, f"{passed} passed" + (f", {failed} FAILED (exit {done.returncode})" if failed else ""))
    if failed:
        print(done.stdout[-6000:] + done.stderr[-6000:], flush=True)


def doctest(part, build, test, long, lock=None, **environment):
    binary = f"build/{build}/test_{test}"
    command = [f"./{binary}"] + ([] if long else [f"--test-suite-exclude={LONG_SUITE}"])
    name = binary + "".join(f" {key.lower()}={value}" for key, value in environment.items() if key == "SIMT_SEED")
    return Job(part, name, lambda: run(command, **environment), read_doctest, [build], lock)


def tests():
    """Names of test programs: those of dev/simt, those that run kernels, those of code that is the same in every build,
    and all others that one process runs."""
    names = sorted(path.stem for path in (ROOT / "test").glob("*.cpp")
                   if path.stem != "main" and not path.stem.startswith("ranks_"))
    simulator = [n for n in names if n.startswith("simt")]
    kernels = [n for n in names if n in KERNEL_TESTS or n in DEVICE_ONLY or (ROOT / "kernels" / f"{n}.cu").exists()]
    rest = [n for n in names if n not in simulator and n not in kernels]
    common = [n for n in rest if lint.is_common_test(ROOT / "test" / f"{n}.cpp")]
    return simulator, kernels, common, [n for n in rest if n not in common]


def benches():
    return sorted(f"bench_{path.stem}" for path in (ROOT / "dev" / "bench").glob("*.cpp")
                  if path.stem not in ("main", "backend_cpu"))


def nvcc_jobs(tally, assembled, long, known):
    """What each source's machine code is, of the build that links and of more assembled for this."""
    nvcc = assemble.find_nvcc()
    archs = [arch for arch in assemble.ARCHS if long or arch in ("80", "90a")]
    for arch in archs:
        if arch not in known:
            tally.skip(f"this nvcc does not know sm_{arch}")
    if not long:
        tally.reasons.append("sm_86, sm_89 and sm_120; all but attention in bf16 for sm_80 and in fp32 for sm_90a (make test-long assembles them)")
    flags = assemble.nvcc_flags()
    disassembler = sass.find_tool("nvdisasm")
    if not disassembler:
        tally.skip("no nvdisasm: the instructions of attention's inner loops were not counted")

    def sass_check(cubin, source, precision, arch):
        wanted = cubin.exists() and precision == "bf16" and (long or arch in ("80", CUDA_ARCH))
        return sass.check(disassembler, cubin, source, arch) if wanted else ""

    def job(source, precision, arch):
        built = (precision, arch) == ("bf16", CUDA_ARCH)

        def read_built():
            kernels, problem, cubin = assemble.check_built(source, precision, arch, ROOT / "build" / CUDA_BUILD)
            assembled.extend(kernels)
            return Done(0, problem + sass_check(cubin, source, precision, arch), "", 0, 0)

        def work():
            taken = []

            def quiet(command):
                taken.append(metered(command))
                return taken[-1]

            with tempfile.TemporaryDirectory(prefix="longhand_nvcc_") as folder:
                cubin = Path(folder) / "out.cubin"
                kernels, problem = assemble.check(nvcc, flags, source, precision, arch, quiet, cubin)
                problem += sass_check(cubin, source, precision, arch)
            assembled.extend(kernels)
            return taken[0]._replace(stdout=problem)

        def read(tally, name, done):
            tally.add(0, 1, 0) if done.stdout else tally.add(1, 0, 0)
            if done.stdout:
                report(name, done.seconds, f"FAILED\n{done.stdout}")

        return Job("nvcc", f"nvcc {source.name} {precision} sm_{arch}", read_built if built else work, read,
                   [CUDA_BUILD] if built else [])

    def wanted(source, precision, arch):
        return long or (precision, arch) in (("bf16", CUDA_ARCH), ("fp32", "80")) or source.name.startswith("attention")

    return [job(*each) for each in assemble.jobs(assemble.all_sources(), [arch for arch in archs if arch in known])
            if wanted(*each)]


def read_pytest(tally, name, done):
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", last)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    skipped = found.get("skipped", 0) + found.get("deselected", 0)
    if done.returncode not in (0, 5) and not failed:
        failed = 1
    tally.add(found.get("passed", 0), failed, skipped)
    if found.get("deselected"):
        tally.reasons.append(f"{name}: {found['deselected']} long ones (make test-long runs them)")
    tally.reasons += [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    report(name, done.seconds, f"{found.get('passed', 0)} passed" + (f", {failed} FAILED" if failed else ""))
    for line in done.stdout.splitlines():
        if line.startswith("covered "):
            print(f"    {line}", flush=True)
    if failed:
        print((done.stdout + done.stderr)[-8000:], flush=True)


def pytest_job(part, file, needs, long, lock=None):
    command = [str(PYTHON), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", file]
    command += [] if long else ["-m", "not long"]
    return Job(part, file, lambda: run(command), read_pytest, needs, lock)


def python_jobs(long, lock):
    """pytest for the tools, the scripts and the trainer's command line, each test beside what it tests."""
    files = [path.relative_to(ROOT).as_posix() for folder in ("test", "test/trials", "scripts", "data")
             for path in sorted((ROOT / folder).glob("test_*.py"))]
    return [pytest_job("python", file, PYTHON_BUILDS, long, lock) for file in files if file != "test/test_ranks.py"]


def ranks_jobs(tally, long):
    """Tests that several ranks take part in: in the cpu build over MPI, under dev/simt over its NCCL. (builds, jobs)"""
    mpi = shutil.which("mpirun") and shutil.which("mpicxx")
    if not mpi:
        tally.skip("no mpirun and mpicxx: ranks of the cpu build were not tested")
    tests = sorted(path.stem for path in (ROOT / "test").glob("ranks_*.cpp"))
    programs = {build: [f"test_{test}" for test in tests] + TRAINERS for build in ("cpu", "simt")} | {"cpu-bf16": TRAINERS}
    if long:
        programs["simt-bf16"] = TRAINERS
    builds = {f"{build} for ranks": ("ranks", [f"build/{build}/{name}" for name in names] +
                                     [f"build/{build}/comm_mpi.so"] * bool(mpi and build.startswith("cpu")))
              for build, names in programs.items()}

    def job(build, test, ranks, seed=None, *options):
        program = f"build/{build}/test_{test}"
        environment = {"OMP_NUM_THREADS": "1", "SIMT_THREADS": "1"}
        if seed:
            environment |= {"SIMT_SEED": seed, "RANKS_WITH_LIBRARY": "1"}
        command = [str(PYTHON), "test/ranks.py", *options, str(ranks), program]
        name = f"{program} ranks={ranks}" + (f" simt_seed={seed}" if seed else "")
        return Job("ranks", name, lambda: run(command, **environment), read_doctest, [f"{build} for ranks"])

    jobs = [job("cpu", test, ranks) for test in tests for ranks in RANKS if mpi]
    jobs += [job("simt", test, ranks, seed, "--without-mpirun") for test in tests for ranks, seed in zip(RANKS, "12312")]
    return builds, [pytest_job("ranks", "test/test_ranks.py", list(builds), long)] + jobs


def plan(tally, parts, long, assembled):
    """{build: (part, targets of make)}, in the order of building, and the jobs: what takes longest comes first."""
    simulator, kernels, common, others = tests()
    builds, jobs = {}, []
    # Models of a test are so small that a second thread doubles the processors' time: the tests of one build have all.
    one_thread = {"OMP_NUM_THREADS": "1"}
    # In a long test some programs fill the memory, and on a GPU each wants all of it: one at a time.
    alone, gpu = threading.Lock() if long else None, threading.Lock()

    def build(name, part, programs):
        builds[name] = (part, [f"build/{name}/test_{test}" for test in programs])

    if "simt" in parts:
        LAUNCHES.unlink(missing_ok=True)
        for name in ("simt", "simt-bf16"):  # what no precision changes runs in the first
            own = [test for test in simulator if name == "simt" or lint.depends_on_precision(ROOT / "test" / f"{test}.cpp")]
            build(name, "simt", own + kernels)
            launches = {"SIMT_LAUNCHES": str(LAUNCHES)}
            orders = {"SIMT_THREADS": "1", "OMP_NUM_THREADS": "1"}
            jobs += [doctest("simt", name, test, long, SIMT_SEED=seed, **launches, **orders)
                     for test in kernels for seed in SIMT_SEEDS]
            jobs += [doctest("simt", name, test, long, **launches) for test in own]
    for name in ("cpu", "cpu-bf16"):
        if name in parts:
            build(name, name, [test for test in kernels if test not in DEVICE_ONLY] + others)
    if "python" in parts:
        jobs += python_jobs(long, alone)
    for name in PYTHON_BUILDS:
        if "python" in parts or (name in parts and name in builds):
            part, targets = builds.get(name, (name.removesuffix("-bf16") if "simt" in name else name, []))
            builds[name] = part, targets + [f"build/{name}/{trainer}" for trainer in TRAINERS]
            if name == "cpu" and "python" in parts and shutil.which("mpicxx"):
                builds[name][1].append("build/cpu/comm_mpi.so")
    if "nvcc" in parts:
        nvcc = assemble.find_nvcc()
        known = assemble.known_archs(nvcc) if nvcc else []
        if CUDA_ARCH not in known:
            tally.skip("nvcc is not installed, or older than 12: nothing was compiled for a GPU")
        else:
            jobs += nvcc_jobs(tally, assembled, long, known)
            build(CUDA_BUILD, "nvcc", kernels)
            builds[CUDA_BUILD][1].extend(f"build/{CUDA_BUILD}/{name}" for name in TRAINERS + benches())
    if "ranks" in parts:
        of_ranks = ranks_jobs(tally, long)
        builds |= of_ranks[0]
        jobs += of_ranks[1]
    if "asan" in parts:
        build("cpu-asan", "asan", SANITIZED)
        jobs += [doctest("asan", "cpu-asan", test, long, alone, **one_thread) for test in SANITIZED]
    if "common" in parts:
        build("common", "common", common)
        jobs += [doctest("common", "common", test, long, alone) for test in common]
    for name in ("cpu", "cpu-bf16"):
        if name in parts:
            threads = {} if name == "cpu" else one_thread
            jobs += [doctest(name, name, test, long, alone, **threads) for test in kernels + others if test not in DEVICE_ONLY]
    if "cpu-bf16" in parts and "avx512" in Path("/proc/cpuinfo").read_text():  # as on a CPU without it
        jobs.append(doctest("cpu-bf16", "cpu-bf16", "matmul", long, alone, DNNL_MAX_CPU_ISA="AVX2"))
    if "cuda" in parts:
        if assemble.find_nvcc() and not run(["nvidia-smi", "-L"]).returncode:
            for name in ("cuda", "cuda-fp32"):
                build(name, "cuda", kernels)
                jobs += [doctest("cuda", name, test, long, gpu) for test in kernels]
        else:
            tally.skip("no GPU here: CUDA kernels ran under dev/simt only")
    return builds, jobs


def run_all(tally, builds, jobs):
    """Builds one after the other; a job starts when what it needs is built and a core is free."""
    slots = Slots(os.cpu_count())
    waiting, built, failures = list(jobs), set(), set()
    with concurrent.futures.ThreadPoolExecutor(slots.count) as pool:
        started = []

        def start():
            for job in [job for job in waiting if job.needs <= built]:
                waiting.remove(job)
                started.append(pool.submit(job, tally, slots))

        start()
        for name, (part, targets) in builds.items():
            with slots.slot():
                done = metered(["make", "-k", "-s", "--no-print-directory", *targets], (slots.out, slots.into),
                               MAKEFLAGS=slots.make_flags())
            with tally.lock:
                tally.taken[part][0] += done.processor
                report(f"build {name}", done.seconds, "FAILED" if done.returncode else "built")
                if done.returncode:
                    tally.add(0, 1, 0)
                    failures.add(name)
                    print((done.stdout + done.stderr)[-6000:], flush=True)
            if not done.returncode:
                built.add(name)
                start()
        for future in started:
            future.result()
    for job in waiting:
        report(job.name, 0, f"not run: {', '.join(sorted(job.needs & failures))} did not build")


def shares(tally, parts, limited):
    """The table of what each part took, and the parts that took more than their share."""
    print(f"{'seconds of the processors':<28} {'building':>9} {'testing':>9} {'share':>7}")
    over = []
    for part in sorted(tally.taken, key=PARTS.index):
        building, testing = tally.taken[part]
        share = SHARES.get(part)
        print(f"  {part:<26} {building:9.0f} {testing:9.0f} {share or '':>7}")
        if limited and part in parts and share and building + testing > share:
            over.append(f"warning: {part} took {building + testing:.0f} s of the processors, and its share of "
                        f"`make test` is {share} s (SHARES in test/run.py)")
    total = [sum(taken[i] for taken in tally.taken.values()) for i in (0, 1)]
    print(f"  {'together':<26} {total[0]:9.0f} {total[1]:9.0f} {sum(SHARES.values()):>7}")
    return over


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--long", action="store_true", help="also what takes long: many seeds, kill loops, 2^31 elements")
    args = parser.parse_args()
    parts = args.parts or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    tally, begin, assembled = Tally(), time.monotonic(), []
    run_all(tally, *plan(tally, parts, args.long, assembled))
    if assembled:
        (ROOT / "build" / "assembly.txt").write_text(
            assemble.table(assembled, assemble.read_launches([LAUNCHES] if LAUNCHES.exists() else [])), encoding="utf-8")
        worst = sum(kernel.spills > 0 for kernel in assembled)
        print(f"{len(assembled)} kernels, {worst} with spills: build/assembly.txt")
    over = shares(tally, parts, not args.long)
    for reason in tally.reasons:
        print(f"skipped: {reason}")
    for line in over:
        print(line)
    print(f"all parts: {time.monotonic() - begin:.0f} s")
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
