"""Data and model must belong together: by the tokens' numbers, by their tokenizer, and for as long as a run reads them."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest

from runs import BAD_INPUT, DONE, ROOT, VOCAB, chain, checkpoints, complaint, options, trainer, write_shard

sys.path.insert(0, str(ROOT / "data"))
import dataset  # noqa: E402

TOKENS = [bytes([65 + i]) for i in range(VOCAB)]


def write_tokenizer(path, tokens, eot=0):
    header = np.zeros(256, "<i4")
    header[:4] = 20240328, 2, len(tokens), eot
    path.write_bytes(header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens))
    return path


def describe(folder, tokens=TOKENS, eot=0, version=2, size=None):
    """dataset.json as prepare.py writes it; `size` is a vocabulary of that many tokens."""
    tokens = tokens if size is None else [struct.pack("<H", i) for i in range(size)]
    record = {"version": 2, "tokenizer": dataset.describe_tokenizer("a test", tokens, eot)}
    for side in ("train", "val"):
        counts = {path.name: (path.stat().st_size - 1024) // 2 for path in sorted(folder.glob(f"{side}_*.bin"))}
        record[side] = {"tokens": sum(counts.values()), "files": dataset.describe_shards(str(folder), counts)}
    if version == 1:
        del record["version"], record["tokenizer"]["hash"], record["train"]["files"], record["val"]["files"]
    (folder / "dataset.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def described(data, tmp_path):
    return describe(shutil.copytree(data, tmp_path / "described"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Weights files that are of no run, of a tiny model with the published vocabulary of each family."""
    folder = tmp_path_factory.mktemp("weights")
    made = {}
    for program, V in (("train_gpt2", 50257), ("train_pythia", 50304)):
        run = folder / program
        done = trainer("--model", "1,32,1", "--vocab", V, "--context", 32, "--steps", 0, "--out", run, program=program)
        assert done.returncode == DONE, done.stderr
        made[program] = shutil.move(run / "step_00000000/model.bin", folder / f"{program}.bin")
    return made


def brief(data, **changes):
    """Options of a run that is only to start, or not to."""
    return options(data, **{"model": "1,32,1", "steps": 1, "val_every": 0, "sample_every": 0, "save_every": 0, **changes})


def refused(out, *args, **kwargs):
    done = trainer(*args, "--out", out, **kwargs)
    assert done.returncode == BAD_INPUT, done
    assert not out.exists() or not list(out.iterdir())
    return complaint(done)


def test_a_token_that_is_too_large_is_found_before_the_first_step(data, tmp_path):
    tokens = chain(20000, 1)
    tokens[19990] = VOCAB
    write_shard(tmp_path / "train_0.bin", tokens)
    said = refused(tmp_path / "run", *brief(data, train=tmp_path / "train_0.bin"))
    assert "train_0.bin: token 64 at index 19990" in said
    # Validation reads some windows only; all of them are looked at.
    said = refused(tmp_path / "run", *brief(data, val=tmp_path / "train_0.bin", val_tokens=64))
    assert "token 64 at index 19990" in said


def test_the_vocabulary_must_fit_and_is_the_default(described, tmp_path):
    said = refused(tmp_path / "run", *brief(described, vocab=VOCAB - 1))
    assert f"dataset.json: a tokenizer of {VOCAB} tokens, but the model has only {VOCAB - 1}" in said
    done = trainer(*brief(described, vocab=None), "--out", tmp_path / "run")
    assert done.returncode == DONE, done.stderr
    assert f" V {VOCAB}," in done.stdout
    # So it is in a plan, which needs no shards.
    done = trainer("--plan", *brief(described, vocab=None))
    assert done.returncode == DONE and f"V {VOCAB}" in done.stdout, done
    assert trainer("--plan", *brief(tmp_path / "nowhere", vocab=None)).returncode == DONE


def test_all_that_is_known_of_the_tokenizer_must_agree(described, tmp_path):
    other = describe(shutil.copytree(described, tmp_path / "other"), tokens=TOKENS[::-1])
    right = write_tokenizer(tmp_path / "right.bin", TOKENS)
    wrong = write_tokenizer(tmp_path / "wrong.bin", TOKENS[::-1])
    two = f"{described}/train_*.bin,{other}/train_*.bin"
    run = tmp_path / "run"
    for changes, named in (
        ({"train": two}, "other/dataset.json is of another tokenizer than "),
        ({"val": f"{other}/val_*.bin"}, "other/dataset.json is of another tokenizer than "),
        ({"tokenizer": wrong}, f"than {wrong}"),
        ({"tokenizer": write_tokenizer(tmp_path / "end.bin", TOKENS, eot=5)}, "end of text 0 instead of 5"),
    ):
        assert named in refused(run, *brief(described, **changes))
    assert trainer(*brief(described, tokenizer=right), "--out", run).returncode == DONE

    # The run knows its tokenizer: a resume, a new run from it and an evaluation are held to it.
    resume = trainer("--out", run, "--resume", "--steps", 2, "--val", f"{other}/val_*.bin")
    assert resume.returncode == BAD_INPUT and f"than the run of {run}/step_00000001/model.bin" in complaint(resume)
    said = refused(tmp_path / "next", *brief(other, model=None, vocab=None, init=run))
    assert "than the run of" in said and "other tokens, although" in said
    evaluation = ["--eval", "loss", "--init", run, "--val", f"{other}/val_*.bin"]
    done = trainer(*evaluation)
    assert done.returncode == BAD_INPUT and "than the run of" in complaint(done)
    assert trainer(*evaluation[:-1], f"{described}/val_*.bin").returncode == DONE
    done = trainer("--eval", "sample", "--init", run, "--tokenizer", wrong, "--sample-tokens", 1)
    assert done.returncode == BAD_INPUT and "than the run of" in complaint(done)

    # A dataset.json without hashes, as it was once written, is held to its numbers.
    describe(other, tokens=TOKENS[::-1], version=1)
    assert trainer(*brief(other, train=two), "--out", tmp_path / "old").returncode == DONE
    describe(other, version=1, eot=5)
    assert "end of text 5 instead of 0" in refused(tmp_path / "run5", *brief(other, train=two))


@pytest.mark.parametrize("program, V, size, eot, noise", [
    ("train_pythia", 50304, 8192, 0, "8192 tokens"),    # a tokenizer of one's own
    ("train_gpt2", 50257, 8192, 0, "8192 tokens"),
    ("train_pythia", 50304, 50257, 50256, "token 50256"),  # GPT-2's
    ("train_pythia", 50304, 50277, 0, None),               # GPT-NeoX's
    ("train_gpt2", 50257, 50257, 50256, None),
])
def test_trained_weights_refuse_ids_that_are_noise_to_them(program, V, size, eot, noise, weights, data, tmp_path):
    folder = describe(shutil.copytree(data, tmp_path / "tokens"), size=size, eot=eot)
    args = brief(folder, model=None, vocab=None, init=weights[program])
    evaluation = ["--eval", "loss", "--init", weights[program], "--val", f"{folder}/val_*.bin", "--context", 32]
    if noise:
        said = refused(tmp_path / "run", *args, program=program)
        assert noise in said and f"--vocab {V}" in said and "dataset.json" in said
        done = trainer(*evaluation, program=program)
        assert done.returncode == BAD_INPUT and noise in complaint(done)
        args += ["--vocab", V]  # it is meant
    else:
        done = trainer(*evaluation, program=program)
        assert done.returncode == DONE, done.stderr
    done = trainer(*args, "--out", tmp_path / "run", program=program)
    assert done.returncode == DONE, done.stderr
    # Nothing is known of llm.c's own shards, but for what their tokenizer says.
    (folder / "dataset.json").unlink()
    assert trainer(*evaluation, program=program).returncode == DONE
    tokenizer = write_tokenizer(tmp_path / "tokenizer.bin", [struct.pack("<H", i) for i in range(size)], eot)
    for what in (evaluation, ["--eval", "sample", "--init", weights[program], "--sample-tokens", 1]):
        done = trainer(*what, "--tokenizer", tokenizer, program=program)
        assert done.returncode == (BAD_INPUT if noise else DONE) and (not noise or noise in complaint(done)), done


def test_a_padded_model_of_ones_own_goes_on_with_its_tokens(described, tmp_path):
    big = tmp_path / "big"
    assert trainer(*brief(described, vocab=50304), "--out", big).returncode == DONE
    done = trainer(*brief(described, model=None, vocab=None, init=big), "--out", tmp_path / "next")
    assert done.returncode == DONE, done.stderr


def test_a_run_goes_on_with_its_own_shards_only(data, tmp_path):
    shards, run = shutil.copytree(data, tmp_path / "shards"), tmp_path / "run"
    assert trainer(*options(shards, steps=3), "--out", run).returncode == DONE
    meta = json.loads((run / "step_00000003/manifest.json").read_text())["meta"]["loader"]
    assert [shard["name"] for shard in meta["sources"][0]] == ["train_0.bin", "train_1.bin"]
    assert str(tmp_path) not in json.dumps(meta)
    resume = ["--out", run, "--resume", "--steps", 6]
    log = (run / "log.jsonl").read_bytes()

    def resume_refused(word):
        done = trainer(*resume)
        assert done.returncode == BAD_INPUT
        said = complaint(done)
        assert word in said and "--init" in said
        assert checkpoints(run)[-1] == "step_00000003" and (run / "log.jsonl").read_bytes() == log

    write_shard(shards / "train_1.bin", chain(7001, 5))  # another text of the same length
    resume_refused('shard 2, "train_1.bin", holds other tokens')
    (shards / "train_1.bin").unlink()
    shutil.copy(data / "train_1.bin", shards / "train_00.bin")
    resume_refused('shard 2 is "train_00.bin" and was "train_1.bin"')
    (shards / "train_00.bin").unlink()
    resume_refused('"train_1.bin", is missing')
    shutil.copy(data / "train_1.bin", shards)
    write_shard(shards / "train_2.bin", chain(5000, 9))
    resume_refused('shard 3, "train_2.bin", is new')
    # As a new run from this one's weights it may.
    done = trainer(*options(shards, steps=1, model=None, vocab=None, init=run), "--out", tmp_path / "next")
    assert done.returncode == DONE, done.stderr

    (shards / "train_2.bin").unlink()
    assert trainer(*resume).returncode == DONE
    # Where they lie does not matter; how they are mixed does.
    moved = shards.rename(tmp_path / "moved")
    resume[-1:] = [8, "--train", f"{moved}/train_*.bin", "--val", f"{moved}/val_*.bin"]
    assert trainer(*resume).returncode == DONE
    assert f'train = "{moved}/train_*.bin"' in (run / "options.toml").read_text()
