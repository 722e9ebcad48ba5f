"""What an export has beside its weights (tokenizer, settings for transformers, a model card), from what a run recorded;
and what is refused before anything large is written."""

import json
import os
import shutil

import pytest

import convert_hf
import dataset
import hf_testing as t
import vocabulary
import weights_file
from hf_testing import FAMILIES, refused, run
from recipe_testing import ROOT, call
from weights_file import GPT2, NEOX, Header

V = 257  # of raw bytes
ABOUT = {"updates": 19, "loader": {"drawn": [40]}}  # at step 20: one update was skipped


def header(family=GPT2, **changes):
    return Header(**dict(family=family, dtype="fp32", maxT=64, V=V, L=1, H=1, C=32, Vp=384, dims=8) | changes)


def write_checkpoint(folder, step, model, meta=ABOUT):
    place = folder / f"step_{step:08}"
    place.mkdir(parents=True)
    (place / "model.bin").write_bytes(model)
    t.write_manifest(place, meta=meta)
    return place


def weights(family=GPT2, **changes):
    made = header(family, **changes)
    return made.pack() + bytes(made.bytes() - 1024)


@pytest.fixture
def made(tmp_path):
    """A run of one checkpoint, with the folder of its shards beside it."""
    data = tmp_path / "private" / "corpus"
    data.mkdir(parents=True)
    vocabulary.RawBytes().write(str(data))
    (data / "train_000000.bin").write_bytes(b"")
    (data / "dataset.json").write_text(json.dumps(
        {"tokenizer": {"from": "raw bytes", "tokens": V, "end_of_text": 256}, "train": {"tokens": 123_456}}))
    write_checkpoint(tmp_path / "run", 20, weights())
    options = {"model": "1,32,1", "init": "", "train": f"{data}/train_*.bin:0.5,other/train_*.bin", "lr": 6e-4,
               "tokenizer": f"{data}/tokenizer.bin", "tokens-per-step": 128, "out": f"{tmp_path}/run", "threads": 2}
    write_options(tmp_path / "run", options)
    events = [{"event": "step", "step": 20, "loss": 2.5}, {"event": "val", "step": 20, "loss": 2.25},
              {"event": "step", "step": 21, "loss": 9.0}]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"cut')
    return tmp_path / "run", data, options


def write_options(folder, options):
    (folder / "options.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))


def exported(folder):
    return {name: json.loads((folder / f"{name}.json").read_text())
            for name in ("config", "tokenizer_config", "generation_config")}


def test_the_runs_own_tokenizer_goes_along(made, tmp_path):
    folder, data, _ = made
    for source in (folder, folder / "step_00000020", folder / "step_00000020/model.bin"):
        assert run(source, "--back", tmp_path / "hf", "--force") == 0
        assert sorted(os.listdir(tmp_path / "hf")) == ["README.md", "config.json", "generation_config.json",
                                                       "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        assert (tmp_path / "hf/tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
        files = exported(tmp_path / "hf")
        assert files["tokenizer_config"] == {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
            "model_max_length": 64, "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False}
        assert files["generation_config"] == {"bos_token_id": 256, "eos_token_id": 256}
        assert (files["config"]["bos_token_id"], files["config"]["eos_token_id"]) == (256, 256)


def test_the_end_of_text_is_the_tokenizers(made, tmp_path):
    folder, data, _ = made
    other = json.loads((data / "tokenizer.json").read_text())
    other["added_tokens"][0]["content"] = "</s>"
    other["model"]["vocab"] = {token.replace("<|endoftext|>", "</s>"): at for token, at in
                               other["model"]["vocab"].items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert run(folder, "--back", tmp_path / "hf", "--tokenizer", tmp_path / "other.json", "--eot-token", "</s>") == 0
    files = exported(tmp_path / "hf")
    assert files["tokenizer_config"]["eos_token"] == files["tokenizer_config"]["bos_token"] == "</s>"
    assert files["generation_config"]["eos_token_id"] == 256
    # A run that was made with it needs no option.
    shutil.copy(tmp_path / "other.json", data / "tokenizer.json")
    (data / "tokenizer.bin").write_bytes(vocabulary.load(str(data / "tokenizer.json"), "</s>").binary())
    assert run(folder, "--back", tmp_path / "again") == 0
    assert exported(tmp_path / "again") == files


def test_what_is_left_of_a_runs_tokenizer(made, tmp_path, capsys):
    folder, data, options = made
    # A run without --tokenizer was trained on shards that know.
    write_options(folder, {key: value for key, value in options.items() if key != "tokenizer"})
    assert run(folder, "--back", tmp_path / "shards") == 0
    assert exported(tmp_path / "shards")["tokenizer_config"]["eos_token"] == "<|endoftext|>"
    # The binary alone still knows the end of text.
    write_options(folder, options)
    (data / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    capsys.readouterr()
    assert run(folder, "--back", tmp_path / "binary") == 0
    assert "tokenizer.json is not there" in capsys.readouterr().err
    assert json.loads((tmp_path / "binary/config.json").read_text())["eos_token_id"] == 256
    assert not (tmp_path / "binary/tokenizer_config.json").exists()
    # Of nothing known there is nothing said.
    (data / "tokenizer.bin").rename(tmp_path / "tokenizer.bin")
    assert run(folder, "--back", tmp_path / "nothing") == 0
    assert "names the tokenizer" in capsys.readouterr().err
    assert json.loads((tmp_path / "nothing/config.json").read_text())["eos_token_id"] is None
    assert not (tmp_path / "nothing/generation_config.json").exists()
    # Two files that do not belong together, and a vocabulary that the model does not have.
    (tmp_path / "tokenizer.bin").rename(data / "tokenizer.bin")
    text = (tmp_path / "tokenizer.json").read_text()
    (data / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"))
    assert "no token" in refused(capsys, folder, "--back", tmp_path / "wrong")
    assert "not of the same tokens" in refused(capsys, folder, "--back", tmp_path / "wrong", "--eot-token", "<|end|>")
    (data / "tokenizer.json").write_text(text)
    shutil.rmtree(folder / "step_00000020")
    write_checkpoint(folder, 20, weights(V=256))
    assert "257 tokens, more than the model's 256" in refused(capsys, folder, "--back", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_only_the_tokenizer_of_the_runs_own_tokens_goes_along(made, tmp_path, capsys):
    """Another of as many tokens would export well and read every text as noise."""
    folder, data, _ = made
    own = vocabulary.load(str(data / "tokenizer.json"), vocabulary.EOT_TEXT)
    about = {"tokens": own.size, "end_of_text": own.eot, "hash": dataset.tokenizer_hash(own.tokens)}
    shutil.rmtree(folder / "step_00000020")
    write_checkpoint(folder, 20, weights(), ABOUT | {"loader": {"drawn": [40], "tokenizer": about}})
    other = json.loads((data / "tokenizer.json").read_text())
    ids = other["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    said = refused(capsys, folder, "--back", tmp_path / "hf", "--tokenizer", tmp_path / "other.json")
    assert "other.json: is not the tokenizer of the tokens" in said
    assert run(folder, "--back", tmp_path / "own", "--tokenizer", data / "tokenizer.json") == 0
    # Another at the place that the run names.
    kept = tmp_path / "kept"
    shutil.copytree(data, kept)
    shutil.copy(tmp_path / "other.json", data / "tokenizer.json")
    (data / "tokenizer.bin").write_bytes(vocabulary.load(str(data / "tokenizer.json"), vocabulary.EOT_TEXT).binary())
    assert "is not the tokenizer of the tokens" in refused(capsys, folder, "--back", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    # None there: the end of text is still known.
    shutil.rmtree(data)
    assert run(folder, "--back", tmp_path / "without") == 0
    assert json.loads((tmp_path / "without/config.json").read_text())["eos_token_id"] == own.eot


def test_the_model_card(made, tmp_path, monkeypatch):
    folder, data, options = made
    assert run(folder, "--back", tmp_path / "my-model") == 0
    card = (tmp_path / "my-model/README.md").read_text()
    assert "# my-model\n" in card and "GPT-2 of" in card and "up to 64 tokens" in card
    assert "random weights" in card and "`corpus/train_*.bin`, `other/train_*.bin`, 123,456 tokens" in card
    assert "Steps: 20, 2,560 tokens read" in card and "lr = 0.0006\n" in card
    assert "2.2500 on the validation text, after step 20" in card and "2.5000 on the last training step" in card
    assert "9.0" not in card  # of a step that the checkpoint does not have behind it
    assert str(tmp_path) not in card and "private" not in card and "threads" not in card
    # Nobody's home is named, nor is there anything to say of a weights file by itself.
    for path in ("/home/ada/train_*.bin", "/Users/ada/train_*.bin", f"{tmp_path}/train_*.bin", "../../ada/../train.bin"):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_options(folder, options | {"train": path})
        assert run(folder, "--back", tmp_path / "my-model", "--force") == 0
        card = (tmp_path / "my-model/README.md").read_text()
        assert tmp_path.name not in card and "/home" not in card and "/Users" not in card and ".." not in card
    (tmp_path / "alone.bin").write_bytes(weights())
    assert run(tmp_path / "alone.bin", "--back", tmp_path / "alone") == 0
    assert "Training" not in (tmp_path / "alone/README.md").read_text()


@pytest.mark.parametrize("harm", ["options", "log", "manifest", "dataset"])
def test_a_record_that_is_not_as_expected_is_left_out(made, tmp_path, harm):
    folder, data, _ = made
    path = {"options": folder / "options.toml", "log": folder / "log.jsonl", "dataset": data / "dataset.json",
            "manifest": folder / "step_00000020/manifest.json"}[harm]
    if harm == "manifest":
        t.write_manifest(path.parent, meta=["odd"])
    else:
        path.write_bytes(b'\xff{"event": [], "train": 3}\n[1]\n')
    assert run(folder, "--back", tmp_path / "hf") == 0
    assert (tmp_path / "hf/README.md").exists()


def test_words_that_a_user_wrote_on_the_card_stay(made, tmp_path, capsys):
    assert run(made[0], "--back", tmp_path / "hf") == 0
    card = tmp_path / "hf/README.md"
    mine = card.read_text().replace("# hf", "# The best model")
    card.write_text(mine)
    assert "holds README.md, which" in refused(capsys, made[0], "--back", tmp_path / "hf", "--force")
    assert card.read_text() == mine


def test_a_checkpoint_that_goes_while_it_is_read(tmp_path, monkeypatch, capsys):
    """A trainer saves 2 and removes 1 between our listing and our reading; then 3 for 2 before the file is opened."""
    folder = tmp_path / "run"
    write_checkpoint(folder, 1, weights())
    real_model, real_header = weights_file.checkpoint_model, convert_hf.read_header
    removed = []

    def goes(step):
        if step not in removed:
            removed.append(step)
            shutil.rmtree(folder / f"step_{step:08}")
            write_checkpoint(folder, step + 1, weights())

    def model(place):
        if place.endswith("1"):
            goes(1)
        return real_model(place)

    def read(path):
        if path.endswith("step_00000002/model.bin"):
            goes(2)
        return real_header(path)

    monkeypatch.setattr(weights_file, "checkpoint_model", model)
    monkeypatch.setattr(convert_hf, "read_header", read)
    assert run(folder, "--back", tmp_path / "hf") == 0
    assert removed == [1, 2] and capsys.readouterr().err == ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes,says", [
    ({"n_embd": 192, "hidden_size": 192, "intermediate_size": 768}, "heads of 96"),
    ({"vocab_size": 70_000}, "70,000 tokens; shards hold 16-bit tokens"),
    ({"n_layer": 10**9, "num_hidden_layers": 10**9}, "1,000,000,000 layers"),
])
def test_what_no_trainer_takes_is_not_written(family, changes, says, tmp_path, capsys):
    t.write_directory(tmp_path / "hf", family, t.model(family), **changes)
    assert says in refused(capsys, tmp_path / "hf", "--to", tmp_path / "model.bin")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_header_of_any_number_of_layers_is_judged_by_its_size(family, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(header(family, L=2**31 - 1).pack() + bytes(1000))
    assert "but its header needs" in refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "hf")


def test_llama_cpp_drops_what_stretches_a_pythia(tmp_path, capsys):
    for changes, warned in (({}, False), ({"mode": 1, "scale": 4.0}, True), ({"mode": 4, "scale": 2.0}, True),
                            ({"mode": 2, "scale": 4.0}, True), ({"base": 5e5}, True)):
        (tmp_path / "model.bin").write_bytes(weights(NEOX, original=32, **changes))
        capsys.readouterr()
        assert run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--force") == 0
        assert ("llama.cpp" in capsys.readouterr().err) == warned, changes


def test_a_name_of_the_hub_is_sent_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["gpt2"], ["gpt2", "--to", "gpt2.bin"], ["EleutherAI/pythia-1.4b", "--to", "x.bin"]):
        assert "scripts/download_hf.py" in refused(capsys, *arguments)


def test_the_trainer_sends_a_huggingface_directory_to_the_converter(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "train.bin").write_bytes(bytes(2000))
    done = call(ROOT / "build/cpu/train_gpt2", "--init", tmp_path / "hf", "--train", tmp_path / "train.bin", "--out",
                tmp_path / "run")
    assert done.returncode == 2 and f"scripts/convert_hf.py {tmp_path}/hf --to FILE.bin" in done.stderr


def test_tokens_of_any_length_become_a_binary(tmp_path):
    made = json.loads(vocabulary.RawBytes().text)
    made["added_tokens"].append(dict(made["added_tokens"][0], id=257, content="=" * 300, special=False))
    (tmp_path / "hf.json").write_text(json.dumps(made))
    assert run("--tokenizer", tmp_path / "hf.json", "--to", tmp_path / "tokenizer.bin") == 0
    tokens, eot = vocabulary.read_binary(str(tmp_path / "tokenizer.bin"))
    assert tokens[257] == b"=" * 300 and eot == 256
