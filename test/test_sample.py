"""Samples that go on from a prompt longer than the context, as long as anyone's."""

import random

import pytest

from runs import BAD_INPUT, DONE, VOCAB, trainer

T = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    run = tmp_path_factory.mktemp("weights") / "run"
    assert trainer("--model", "1,32,1", "--vocab", VOCAB, "--context", T, "--steps", 0, "--out", run).returncode == DONE
    return run


def sample(weights, prompt, folder, tokens):
    (folder / "prompt.toml").write_text(f"prompt-tokens = {prompt}\n")
    done = trainer("--eval", "sample", "--init", weights, "--sample-tokens", tokens, "--config", folder / "prompt.toml")
    assert done.returncode == DONE, done.stderr
    return list(map(int, done.stdout.split())), [line for line in done.stderr.splitlines() if "the prompt" in line]


@pytest.mark.parametrize("count", [T + 1, 1 << 20])
@pytest.mark.parametrize("tokens, kept", [(8, T - 7), (40, T // 2)])
def test_a_prompt_longer_than_the_context(weights, tmp_path, count, tokens, kept):
    """Its end is used, as much of it as leaves room for the sample and at least half a context, and this is said."""
    prompt = random.Random(1).choices(range(VOCAB), k=count)
    said, warned = sample(weights, prompt, tmp_path, tokens)
    assert said[:count] == prompt and len(said) == count + tokens
    assert warned == [f"warning: the prompt has {count} tokens, more than the context of {T}: its last {kept} are used"]
    alone, warned = sample(weights, prompt[-kept:], tmp_path, tokens)
    assert said[count:] == alone[kept:] and not warned


def test_a_prompt_of_the_context_is_used_whole(weights, tmp_path):
    prompt = random.Random(2).choices(range(VOCAB), k=T)
    said, warned = sample(weights, prompt, tmp_path, 1)
    assert len(said) == T + 1 and not warned


def test_a_configuration_that_is_something_else(tmp_path):
    with open(tmp_path / "huge.toml", "wb") as file:
        file.truncate(1 << 30)
    done = trainer("--config", tmp_path / "huge.toml")
    assert done.returncode == BAD_INPUT and "huge.toml has" in done.stderr
