"""--plan and --memory from the outside: exit codes, that the JSON adds up, that a run keeps what was chosen for it, and
that what a run has resident is what its plan says."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from runs import (BAD_INPUT, BUILDS, DONE, FAILED, ROOT, assert_same_run, chain, checkpoints, complaint, options, trainer,
                  write_shard)

DOES_NOT_FIT = 3
LONG_GPT2 = ["--model", "124M", "--state", "int8", "--positions", "tied", "--context", 262144]


def test_exit_codes():
    fits = trainer("--plan", *LONG_GPT2, "--memory", "16GiB", "--offload", "none")
    assert fits.returncode == DONE and fits.stderr == "", fits.stderr
    lines = fits.stdout.splitlines()
    assert lines[-1] == "fits: yes"
    assert len(lines) <= 45 and max(map(len, lines)) <= 100

    large = trainer("--plan", *LONG_GPT2, "--memory", "8GiB", "--offload", "none")
    assert large.returncode == DOES_NOT_FIT
    said = re.fullmatch(r"train_gpt2: context 262144 does not fit: the attention backward phase needs \d+\.\d\d GiB, "
                        r"\d+\.\d\d GiB more than the 8.00 GiB there are; the largest context that fits is (\d+)",
                        complaint(large))
    assert "fits: no" in large.stdout
    # That context does fit, and is what the table names.
    largest = said.group(1)
    assert f"largest context that fits: {largest}" in large.stdout
    words = LONG_GPT2[:-1] + [largest]
    assert trainer("--plan", *words, "--memory", "8GiB", "--offload", "none").returncode == DONE

    for words in (["--plan"], ["--plan", "--model", "124M", "--memory", "lots"], ["--gpu", "h100"],
                  ["--plan", "--model", "124M", "--gpu", "h100", "--plan-for", "cpu"]):
        bad = trainer(*words)
        assert bad.returncode == BAD_INPUT, words
        complaint(bad)


@pytest.mark.parametrize("words", [["--offload", "residual"], ["--head-group", "1"]], ids=" ".join)
def test_a_way_to_recompute_is_chosen_for_what_needs_one(data, tmp_path, words):
    """Both exclude --recompute none: the plan's choice is the run's, afresh and on a resume."""
    run = tmp_path / "run"
    chosen = plan_of([*options(data), *words])["options"]["recompute"]
    assert chosen != "none"
    done = trainer(*options(data, steps=3), *words, "--out", run)
    assert done.returncode == DONE, done.stderr
    assert recorded(run)["recompute"] == chosen
    done = trainer("--out", run, "--resume", "--steps", 4, "--chunk", 64, *words)
    assert done.returncode == DONE, done.stderr


def limited(limit, kilobytes, *words):
    command = shlex.join([str(BUILDS["fp32"] / "train_gpt2"), *map(str, words)])
    return subprocess.run(["bash", "-c", f"ulimit {limit} {kilobytes} && {command}"], capture_output=True, text=True,
                          timeout=300, cwd=ROOT)


def test_a_limit_on_the_address_space_is_planned_with(data, tmp_path):
    """ulimit -v: a run that cannot fit is refused before it begins, and none crashes in a library that is given no
    memory (oneDNN writes to address 0)."""
    words = options(data, model="1,1024,32", vocab=512, context=256, batch=1, tokens_per_step=256, steps=1, warmup=0,
                    val=None, sample_every=0, threads=1, recompute="none", offload="none")
    planned = plan_of(words)["device"]["total"] // 1024
    for limit in ("-v", "-d"):
        plan, run = (limited(limit, planned + 40000, *words, *more) for more in (["--plan"], ["--out", tmp_path / "run"]))
        assert plan.returncode == run.returncode == DOES_NOT_FIT, (plan.stderr, run.stderr)
        assert "context 256 does not fit" in complaint(plan) and "context 256 does not fit" in complaint(run)
        assert not (tmp_path / "run").exists()
    # --memory is taken at its word: what is missing then is missed while the run goes on.
    for room in range(24000, 44000, 4000):
        done = limited("-v", planned + room, *words, "--memory", "1GiB", "--out", tmp_path / str(room))
        assert done.returncode in (DONE, FAILED), done
        if done.returncode == FAILED:
            assert "memory" in complaint(done)


def test_a_run_that_does_not_fit_writes_nothing(data, tmp_path):
    done = trainer(*options(data), "--memory", "1MiB", "--out", tmp_path / "run")
    assert done.returncode == DOES_NOT_FIT
    assert "no context fits" in complaint(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program, model", [("train_gpt2", "355M"), ("train_pythia", "1.4b")])
def test_the_json_adds_up(program, model):
    words = ["--model", model, "--context", 65536, "--gpu", "h100", *(["--positions", "tied"] * (program == "train_gpt2"))]
    done = trainer("--plan-json", *words, program=program)
    assert done.returncode == DONE, done.stderr
    plan = json.loads(done.stdout)
    for where in ("device", "host"):
        rows = dict(plan[where])
        assert rows.pop("total") == sum(rows.values())
    assert plan["fits"] and plan["lacking"] == 0
    assert plan["device"]["total"] <= plan["memory"]
    assert plan["build"] == "cuda bf16"
    assert plan["largest_context"] >= 65536
    assert max(plan["phases"], key=lambda phase: phase["bytes"])["name"] == plan["peak_phase"]
    assert {saving["option"] for saving in plan["savings"]} == {"--state int8", "--master none", "--grad bf16"}
    assert plan["largest_context_host"] > 0 and "residual" in plan["largest_context_options"]["offload"]
    # The table shows the same.
    table = trainer("--plan", *words, program=program).stdout
    assert f"{plan['device']['total'] / 2**30:.2f} GiB   of" in table
    assert f"and {plan['largest_context_host'] / 2**30:.2f} GiB of host memory\nfits: yes" in table


def plan_of(words, program="train_gpt2", precision="fp32"):
    done = trainer("--plan-json", "--plan-for", "cpu", *words, program=program, precision=precision)
    assert done.returncode in (DONE, DOES_NOT_FIT), done.stderr
    return json.loads(done.stdout)


MEMORY_OPTIONS = ("recompute", "chunk", "head-group", "logits-rows", "offload")


def recorded(run):
    lines = (run / "options.toml").read_text().splitlines()
    return {name: value.strip('"') for name, value in (line.split(" = ") for line in lines if " = " in line)}


def test_a_run_keeps_what_was_chosen(data, tmp_path):
    """A run under --memory goes on bit for bit without being told again, and says what was chosen."""
    words = options(data, model="4,64,2", context=2048, batch=1, tokens_per_step=2048, steps=4, val=None, sample_every=0,
                    save_every=2)
    whole = plan_of(words)
    limit = whole["device"]["total"] - (whole["device"]["total"] - whole["device"]["overhead"]) // 2
    run, again = tmp_path / "run", tmp_path / "again"
    done = trainer(*words, "--memory", limit, "--out", run)
    assert done.returncode == DONE, done.stderr
    first, _, note = done.stdout.splitlines()[:3]
    assert first.startswith("cpu fp32")
    assert note.startswith("memory: chosen are --recompute ")

    plan = plan_of([*words, "--memory", limit])
    options_of_run = recorded(run)
    for name in MEMORY_OPTIONS:
        chosen = plan["options"][name.replace("-", "_")]
        assert options_of_run[name] == str(chosen), name
        if (name, chosen) not in (("offload", "none"), ("logits-rows", 512)):
            assert f"--{name} {chosen}" in note
    assert plan["options"]["recompute"] != "none"
    event = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert event["event"] == "plan"
    assert event["bytes"] == plan["device"]["total"] <= limit
    assert event["host_bytes"] == plan["host"]["total"]
    assert event["peak_phase"] == plan["peak_phase"]

    shutil.copytree(run, again)
    shutil.rmtree(again / "step_00000004")
    done = trainer("--out", again, "--resume")
    assert done.returncode == DONE and "resumed" in done.stdout, done.stderr
    assert_same_run(run, again, 4)
    assert recorded(again) == options_of_run

    # With all the memory there is the choice is made anew.
    shutil.rmtree(again / "step_00000004")
    done = trainer("--out", again, "--resume", "--memory", whole["device"]["total"])
    assert done.returncode == DONE, done.stderr
    assert recorded(again)["recompute"] == "none"


# (program, precision, options), 300 MB and more each.
RUNS = {
    "none": ("train_gpt2", "fp32", {"model": "4,256,4", "context": 4096}),
    "block-chunked-int8": ("train_pythia", "fp32", {"model": "4,512,8", "vocab": 16384, "context": 2048, "state": "int8",
                                                    "recompute": "block", "chunk": 1024}),
    "full-groups": ("train_gpt2", "fp32", {"model": "4,512,8", "vocab": 16384, "context": 1536, "recompute": "full",
                                           "head_group": 2, "chunk": 1024}),
    "offload-residual": ("train_gpt2", "fp32", {"model": "6,512,8", "vocab": 8192, "context": 2048, "recompute": "block",
                                                "offload": "residual"}),
    "offload-state": ("train_pythia", "fp32", {"model": "8,512,8", "vocab": 8192, "context": 1024, "recompute": "block",
                                               "offload": "residual,state"}),
}
LONG_RUNS = {
    "124M": ("train_gpt2", "fp32", {"model": "124M", "vocab": 50257, "context": 1024}),
    "124M-bf16": ("train_gpt2", "bf16", {"model": "124M", "vocab": 50257, "context": 1024, "offload": "master,state", "recompute": "block"}),
    "long-full": ("train_gpt2", "fp32", {"model": "6,256,4", "context": 16384, "recompute": "full", "chunk": 2048,
                                         "head_group": 1, "offload": "residual"}),
}
CASES = [pytest.param(run, id=name) for name, run in RUNS.items()] + [
    pytest.param(run, id=name, marks=pytest.mark.long) for name, run in LONG_RUNS.items()]


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    write_shard(folder / "train_0.bin", chain(80000, 4))
    return folder


@pytest.mark.parametrize("run", CASES)
def test_resident_memory_is_the_plan(run, long_data, tmp_path):
    program, precision, chosen = run
    words = options(long_data, **{"vocab": 512, "batch": 1, "tokens_per_step": None, "steps": 1, "val": None,
                                  "sample_every": 0, "save_every": 0, **chosen})
    plan = plan_of(words, program, precision)
    total = plan["device"]["total"]
    assert total > 300e6
    command = [str(BUILDS[precision] / program), *words, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == DONE
    resident = usage.ru_maxrss * 1024
    print(f"{resident / 1e6:.0f} MB resident, {total / 1e6:.0f} MB planned, {resident / total:.3f}")
    assert abs(resident / total - 1) <= 0.1
