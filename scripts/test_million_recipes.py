"""The recipes for a million tokens and for GPT-2 from scratch: every stage end to end on a small model, the same knobs
at small contexts, and what they do with their settings, on stand-ins for the programs that they call."""

import json
import random

import pytest
from recipe_testing import ROOT, SHORT, StandIns, by_distance, call, called, losses, run, start, table_of  # noqa: F401

TARGETS = {
    "million_124M_16GB.sh": (262144, "15GiB", None, "l4"),
    "million_1.4b_40GB.sh": (131072, "39GiB", None, "a100-40"),
    "million_1.4b_80GB.sh": (1048576, "79GiB", "128GiB", "h100"),
}
MILLION, HOST = 1048576, "100GiB"
STAGES = {4 * SHORT: 3, 8 * SHORT: 4}


def value(command, option):
    return command[command.index(option) + 1] if option in command else None


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path)


@pytest.mark.parametrize("recipe", TARGETS)
@pytest.mark.parametrize("target", ["default", "million"])
def test_a_dry_run_says_every_stage_and_its_plan(stand_ins, recipe, target):
    context, memory, host, gpu = TARGETS[recipe]
    moonshot = {"CONTEXT": MILLION, "HOST_MEMORY": HOST} if target == "million" else {}
    if moonshot:
        context, host = MILLION, HOST
    before = sorted(stand_ins.root.rglob("*"))
    commands = stand_ins.start(recipe, DRY="1", **moonshot)
    assert sorted({*stand_ins.root.rglob("*")} - {stand_ins.root / "calls"}) == before
    # The plans are made, and nothing else.
    plans, trainings = called(commands, "--plan"), called(commands, "--resume")
    assert stand_ins.calls() == [command[1:] for command in plans]
    ladder = [int(value(command, "--context")) for command in trainings]
    assert ladder == sorted(set(ladder)) and ladder[0] == 8192 and ladder[-1] == context and len(ladder) > 2
    # Each stage is trained as it was planned, with as many tokens a step, from the weights of the stage before.
    size, pythia = ("124M", False) if "124M" in recipe else ("1.4b", True)
    for plan, training in zip(plans, trainings, strict=True):
        assert [value(plan, option) for option in ("--model", "--plan-for", "--gpu")] == [size, "cuda", gpu]
        for option in ("--context", "--batch", "--tokens-per-step", "--positions", "--rope", "--state", "--master",
                       "--grad", "--memory", "--host-memory", "--offload"):
            assert value(plan, option) == value(training, option), option
        assert (value(plan, "--memory"), value(plan, "--host-memory")) == (memory, host)
        assert value(plan, "--offload") == (None if host else "none")
        assert value(plan, "--tokens-per-step") == str(context) and value(plan, "--state") == "int8"
        assert (value(plan, "--rope"), value(plan, "--master"), value(plan, "--grad")) == (
            ("yarn", "none", "bf16") if pythia else (None, "fp32", "fp32"))
        assert value(plan, "--positions") == (None if pythia else "tied")
    made = [value(called(commands, "convert_hf.py")[0], "--to")] + [value(training, "--out") for training in trainings]
    assert [value(training, "--init") for training in trainings] == made[:-1]
    # Both ways of the trained window, and each stage before and after its training.
    evaluated = [(value(command, "--init"), int(value(command, "--context"))) for command in called(commands, "--eval")]
    short = 2048 if pythia else 1024
    assert evaluated == [(made[0], short), *((weights, context) for i, context in enumerate(ladder)
                                             for weights in made[i:i + 2]), (made[-1], short)]
    assert value(called(commands, "--back")[0], "--back") in commands[-1] and made[-1] in commands[-1]
    assert {value(command, "--val-tokens") for command in called(commands, "--eval")} == {str(max(context, 524288))}
    assert called(commands, "pg19") and value(called(commands, "pg19")[0], "--min-tokens") == str(context + 1)
    # Without a trainer there is no plan, but the command.
    assert len(called(stand_ins.start(recipe, DRY="1", TRAINER=None, **moonshot), "--plan")) == len(plans)
    assert not stand_ins.calls()


@pytest.mark.parametrize("recipe", [*TARGETS, "long_gpt2_scratch.sh"])
def test_what_does_not_fit_ends_before_anything_is_downloaded(stand_ins, recipe):
    (stand_ins.root / "plan_code").write_text("3")
    for dry in ("", "1"):
        stand_ins.start(recipe, 3, DRY=dry, SETUP="0")
        assert called(stand_ins.calls(), "--plan") == stand_ins.calls() and len(stand_ins.calls()) == 1
    (stand_ins.root / "plan_code").write_text("0")
    commands = stand_ins.start(recipe)
    plan = called(commands, "--plan")
    assert len(plan) == 1 and value(plan[0], "--context") == max(
        (value(command, "--context") for command in called(commands, "--resume")), key=int)
    assert called(commands, "--recipe") and bool(called(commands, "download_hf.py")) == (recipe in TARGETS)
    # Started again it plans for the weights that it has, if it began with any, and fetches nothing.
    again = stand_ins.start(recipe)
    assert (value(called(again, "--plan")[0], "--init") is not None) == (recipe in TARGETS)
    assert not called(again, "--recipe") and not called(again, "download_hf.py")


def test_stages_are_checked(stand_ins):
    for stages in ("8192", "8192:0", "8192:10 x:5", "8192:10 8192:5", "16384:10 8192:5", "8192:1.5", "-4:2"):
        says = stand_ins.start("million_124M_16GB.sh", 2, STAGES=stages)
        assert "million_124M_16GB.sh: STAGES" in says and "CONTEXT:STEPS" in says and says.count("\n") == 1
        assert not stand_ins.calls()
    for context in ("1M", "0", "8192 ", "x"):
        says = stand_ins.start("million_1.4b_40GB.sh", 2, CONTEXT=context)
        assert f"million_1.4b_40GB.sh: CONTEXT '{context}' is not" in says and says.count("\n") == 1
    for settings in ({"CONTEXT": "100000"}, {"STAGES": "3000:1 8192:1"}, {"TOKENS_PER_STEP": "1000"}):
        says = stand_ins.start("million_124M_16GB.sh", 2, **settings)
        assert "is no whole number of" in says and says.count("\n") == 1
        assert not stand_ins.calls()
    for recipe in TARGETS:
        commands = called(stand_ins.start(recipe, DRY="1", STAGES="4096:7 65536:2"), "--resume")
        assert [(value(c, "--context"), value(c, "--steps")) for c in commands] == [("4096", "7"), ("65536", "2")]
        assert {value(c, "--tokens-per-step") for c in commands} == {"65536"}


@pytest.mark.parametrize("recipe", TARGETS)
def test_the_targets_fit(recipe):
    trainer = ROOT / f"build/cpu/train_{'gpt2' if '124M' in recipe else 'pythia'}"
    for moonshot in ({}, {"CONTEXT": str(MILLION), "HOST_MEMORY": HOST}):
        said = run(ROOT / "scripts" / recipe, DRY="1", SETUP="0", TRAINER=str(trainer), RUN="/nowhere/run", **moonshot)
        assert said.count("fits: yes") == said.count("--plan-for cuda") > 2
    done = call(ROOT / "scripts" / recipe, DRY="1", SETUP="0", TRAINER=str(trainer), RUN="/nowhere/run",
                CONTEXT=str(MILLION), HOST_MEMORY="")
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "download_hf.py" not in done.stdout


def ladder_settings(start, folder, **settings):
    """A recipe's settings for the small model; Pythia's recipes leave out master weights, which takes a bf16 build."""
    family, _, source, text = start
    trainer = ROOT / f"build/{'cpu' if family == 'gpt2' else 'cpu-bf16'}/train_{family}"
    return dict(
        RUN=str(folder / "run"), MODEL=str(source), TEXT=str(text), TRAINER=str(trainer), PLAN_FOR="cpu", SIZE="2,64,2",
        STAGES=" ".join(f"{context}:{steps}" for context, steps in STAGES.items()), SHORT=str(SHORT), LR="3e-3",
        WARMUP="1", VAL_TOKENS="2048", MEMORY="4GiB", SETUP="0",
    ) | settings


def toml(path):
    return dict(line.split(" = ") for line in path.read_text().splitlines() if " = " in line)


@pytest.mark.parametrize("where", ["card", "host"])
def test_a_small_model_climbs_the_stages(start, tmp_path, where):
    family, *_, source, _ = start
    recipe = "million_124M_16GB.sh" if family == "gpt2" else f"million_1.4b_{'40' if where == 'card' else '80'}GB.sh"
    # What the planner would choose for want of memory is said here, so that it happens at this size.
    words = "--recompute block --chunk 128 --head-group 1" if where == "card" else "--recompute full --offload residual"
    host = "" if where == "card" else "1GiB"
    settings = ladder_settings(start, tmp_path, OPTIONS=f"--threads 1 {words}", HOST_MEMORY=host)
    said = run(f"scripts/{recipe}", **settings)
    first, last = STAGES
    outs = {context: tmp_path / f"run/{context}" for context in STAGES}

    # The table is what was evaluated, on the same tokens, with the weights that each stage left.
    rows = table_of(said)
    assert list(rows.values()) == losses(said)
    stretched = ["--positions", "tied"] if family == "gpt2" else ["--rope", "yarn"]

    def evaluate(weights, context, *options):
        return losses(run(settings["TRAINER"], "--eval", "loss", "--init", weights, "--val",
                          tmp_path / "run_tokens/val_*.bin", "--val-tokens", 2048, "--threads", 1, "--context", context,
                          *options))[0]

    expected = {
        f"at {SHORT}, before": evaluate(tmp_path / "run_start.bin", SHORT),
        f"at {first}, before training there": evaluate(tmp_path / "run_start.bin", first, *stretched),
        f"at {first}, after": evaluate(outs[first], first),
        f"at {last}, before training there": evaluate(outs[first], last, *stretched),
        f"at {last}, after": evaluate(outs[last], last),
        f"at {SHORT}, in the end": evaluate(outs[last], SHORT),
    }
    assert rows == pytest.approx(expected, abs=2e-3) and list(rows) == list(expected)
    # It knows its text at once where positions are right (ln 8 = 2.08 is knowing nothing), and each stage teaches.
    assert max(rows.values()) < 1
    for context in STAGES:
        assert rows[f"at {context}, after"] < rows[f"at {context}, before training there"] - 0.005

    for (context, steps), weights in zip(STAGES.items(), [tmp_path / "run_start.bin", outs[first]]):
        options = toml(outs[context] / "options.toml")
        assert options["init"] == f'"{weights}"' and options["context"] == str(context)
        assert options["state"] == '"int8"' and options["tokens-per-step"] == str(last)
        assert [path.name for path in outs[context].glob("step_*")] == [f"step_{steps:08}"]
        assert options["recompute"] == ('"block"' if where == "card" else '"full"')
        assert options["offload"] == ('"none"' if where == "card" else '"residual"')

    # The whole of it as transformers reads it.
    config = json.loads((tmp_path / "run_hf/config.json").read_text())
    if family == "gpt2":
        assert config["n_positions"] == last
    else:
        rope = config["rope_parameters"]
        assert (rope["rope_type"], rope["factor"]) == ("yarn", last / SHORT)  # of all stages together
        assert rope["original_max_position_embeddings"] == SHORT and config["max_position_embeddings"] == last
    assert (tmp_path / "run_hf/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    # Started again, with a step more of the last stage, it goes on there.
    settings["STAGES"] = settings["STAGES"].replace(f"{last}:{STAGES[last]}", f"{last}:{STAGES[last] + 1}")
    assert "resumed" in run(f"scripts/{recipe}", **settings)
    # The one before stays until a finite loss has proven the last.
    steps = [STAGES[last], STAGES[last] + 1]
    assert sorted(path.name for path in outs[last].glob("step_*")) == [f"step_{step:08}" for step in steps]


def test_the_longest_stage_has_to_fit(start, tmp_path):
    recipe = "million_124M_16GB.sh" if start[0] == "gpt2" else "million_1.4b_40GB.sh"
    stages = {"STAGES": "128:3 1048576:1", "MODEL": "", "SIZE": "2,64,2"}  # no model is there yet, and none is fetched
    for dry in ("", "1"):
        done = call(ROOT / "scripts" / recipe, **ladder_settings(start, tmp_path, DRY=dry, MEMORY="512MiB", **stages))
        assert done.returncode == 3, done.stdout + done.stderr
        assert "1048576" in done.stdout and ("--context 128 " in done.stdout) == bool(dry)
        assert "download_hf.py" not in done.stdout and "val_loss" not in done.stdout
        # Beside the warning that a plan measured on one thread brings, of the stages that fit.
        said = [line for line in done.stderr.splitlines() if not line.startswith("warning: running on one thread")]
        assert len(said) == 1 and "does not fit" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run_recipe.txt"]
    # A dry run of what fits has a plan for each stage.
    stages["STAGES"] = "128:3 256:1"
    said = run(ROOT / "scripts" / recipe, **ladder_settings(start, tmp_path, DRY="1", **stages))
    assert said.count("fits: yes") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run_recipe.txt"]


def test_from_scratch(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(by_distance(random.Random(i), 2000))
    settings = dict(
        RUN=str(tmp_path / "run"), TEXT=str(text), TRAINER=str(ROOT / "build/cpu/train_gpt2"), PLAN_FOR="cpu",
        SIZE="2,64,2", VOCAB="300", CONTEXT="256", SHORT="64", TOKENS_PER_STEP="512", STEPS="12", LR="1e-2", WARMUP="2",
        VAL_TOKENS="512", MEMORY="4GiB", OPTIONS="--threads 1", SETUP="0",
    )
    said = run("scripts/long_gpt2_scratch.sh", **settings)
    rows = table_of(said)
    assert list(rows.values()) == losses(said) and list(rows) == ["at 256", "at 64"]
    assert rows["at 256"] < 4  # ln 300 = 5.7
    assert "fits: yes" in said
    options, config = toml(tmp_path / "run/options.toml"), json.loads((tmp_path / "run_hf/config.json").read_text())
    assert (options["model"], options["context"]) == ('"2,64,2"', "256") and config["n_positions"] == 256
    assert (tmp_path / "run_hf/tokenizer.json").read_bytes() == (tmp_path / "run_tokens/tokenizer.json").read_bytes()
    # Another size is another run.
    done = call(ROOT / "scripts/long_gpt2_scratch.sh", **settings | {"SIZE": "2,32,2"})
    assert done.returncode == 2 and "2,64,2 from scratch, not of 2,32,2 from scratch; choose another RUN" in done.stderr
