"""convert_hf.py: both families, every dtype, both directions, to the last bit; rope settings; outputs; memory."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import convert_hf
import hf_testing as t
from hf_testing import FAMILIES, KINDS, OPTION, C, L, T, V, binary, model, raw, read_safetensors, run, write_directory

HERE = os.path.dirname(os.path.abspath(__file__))


def without_prefix(tensors):
    return {name.removeprefix("transformer.").removeprefix("gpt_neox."): value for name, value in tensors.items()}


def in_shards(folder, tensors, kind):
    """The directory's single file as three, with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        t.write_safetensors(folder / shard, {name: tensors[name] for name in names if where[name] == shard}, kind)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_exact_both_ways(family, kind, tmp_path):
    tensors = model(family, kind)
    write_directory(tmp_path / "hf", family, tensors, kind)
    assert run(tmp_path / "hf", "--to", tmp_path / "model.bin") == 0
    assert (tmp_path / "model.bin").read_bytes() == binary(family, tensors, kind)
    assert run(tmp_path / "model.bin", "--back", tmp_path / "back") == 0
    assert read_safetensors(tmp_path / "back") == raw(tensors, kind)
    assert run(tmp_path / "back", "--to", tmp_path / "again.bin") == 0
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    assert config["torch_dtype"] == config["dtype"] == name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shards_and_buffers(family, tmp_path):
    tensors = model(family)
    buffers, one = {}, np.ones((1, 1, 5, 5), np.float32)
    for i in range(L):
        if family == "gpt2":
            buffers |= {f"h.{i}.attn.bias": one, f"h.{i}.attn.masked_bias": one[0, 0, 0, 0]}
        else:
            own = f"gpt_neox.layers.{i}.attention."
            buffers |= {own + "bias": one, own + "masked_bias": one[0], own + "rotary_emb.inv_freq": one[0, 0, 0]}
    plain = without_prefix(tensors)
    write_directory(tmp_path / "plain", family, plain | {name: np.asarray(value) for name, value in buffers.items()})
    write_directory(tmp_path / "shards", family, tensors)
    in_shards(tmp_path / "shards", tensors, "F32")
    variants = ["plain", "shards"]
    if family == "gpt2":
        write_directory(tmp_path / "head", family, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
        variants.append("head")
    else:
        renamed = {"lm_head.weight" if name == "embed_out.weight" else name: x for name, x in tensors.items()}
        write_directory(tmp_path / "renamed", family, renamed)
        variants.append("renamed")
    for name in variants:
        assert run(tmp_path / name, "--to", tmp_path / f"{name}.bin") == 0
        assert (tmp_path / f"{name}.bin").read_bytes() == binary(family, tensors), name


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_smaller_than_a_tensor(family, tmp_path, monkeypatch):
    """Transposes and copies in many uneven blocks give the same file as in one."""
    import tensor_stream

    tensors = model(family, "F16")
    write_directory(tmp_path / "hf", family, tensors, "F16")
    for block in (1, 100, 257):
        monkeypatch.setattr(tensor_stream, "BLOCK", block)
        monkeypatch.setattr(convert_hf, "BLOCK", block)
        assert run(tmp_path / "hf", "--to", tmp_path / "model.bin", "--force") == 0
        assert (tmp_path / "model.bin").read_bytes() == binary(family, tensors, "F16")
        assert run(tmp_path / "model.bin", "--back", tmp_path / "back", "--force") == 0
        assert read_safetensors(tmp_path / "back") == raw(tensors, "F16")


def values(pattern, kind):
    if kind == "BF16":
        return (pattern.astype(np.uint32) << 16).view(np.float32)
    return pattern.view({"F32": np.float32, "F16": np.float16}[kind]).astype(np.float32)


def converted(tmp_path, tensors, source, target):
    """wte after a conversion on the way to the binary, and the same on the way back from one."""
    write_directory(tmp_path / "hf", "gpt2", tensors, source)
    assert run(tmp_path / "hf", "--to", tmp_path / "model.bin", "--dtype", OPTION[target]) == 0
    there = (tmp_path / "model.bin").read_bytes()
    made = np.frombuffer(there[1024 : 1024 + V * C * np.dtype(t.BITS[target]).itemsize], t.BITS[target])
    (tmp_path / "own.bin").write_bytes(binary("gpt2", tensors, source))
    assert run(tmp_path / "own.bin", "--back", tmp_path / "back", "--dtype", OPTION[target]) == 0
    kind, shape, data = read_safetensors(tmp_path / "back")["transformer.wte.weight"]
    assert (kind, shape, data) == (target, (V, C), made.tobytes())
    return made


@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_widening_is_exact(source, tmp_path):
    tensors = model("gpt2", source)
    made = converted(tmp_path, tensors, source, "F32")
    wanted = values(tensors["transformer.wte.weight"].reshape(-1), source)
    assert made.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_narrowing_takes_the_nearest_and_the_even_one_of_two(target, tmp_path):
    tensors = model("gpt2")
    for name, value in tensors.items():  # within fp16's range
        tensors[name] = (values(value.reshape(-1), "F32") * 0 + 1).view(np.uint32).reshape(value.shape)
    every = np.arange(0x7C00 if target == "F16" else 0x7F80, dtype=np.uint16)
    table = values(every, target).astype(np.float64)  # ascending
    draw = np.random.default_rng(5)
    at = draw.integers(0, len(table) - 1, V * C)
    # Between two neighbours: exactly in the middle, a bit of fp32 off it on both sides, on one of them, anywhere.
    low, high = table[at], table[at + 1]
    middle = ((low + high) / 2).astype(np.float32)  # exact
    which = draw.integers(0, 5, V * C)
    where = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)),
             low.astype(np.float32), (low + (high - low) * draw.random(V * C)).astype(np.float32)]
    wide = np.choose(which, where)
    sign = draw.integers(0, 2, V * C, dtype=np.uint16)
    tensors["transformer.wte.weight"] = (wide.view(np.uint32) | (sign.astype(np.uint32) << 31)).reshape(V, C)
    exact = wide.astype(np.float64)
    below, above = exact - low, high - exact
    assert ((below == above) & (at % 2 == 0)).sum() > 100 and ((below == above) & (at % 2 == 1)).sum() > 100
    up = (above < below) | ((above == below) & (at % 2 == 1))
    wanted = (at + up).astype(np.uint16) | (sign << 15)
    assert (converted(tmp_path, tensors, "F32", target) == wanted).all()


def test_mixed_dtypes_need_a_choice(tmp_path, capsys):
    tensors = model("gpt_neox", "F16")
    kinds = {name: "F16" for name in tensors}
    odd = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    tensors[odd], kinds[odd] = values(tensors[odd], "F16").view(np.uint32), "F32"
    write_directory(tmp_path / "hf", "gpt_neox", tensors, kinds)
    assert odd in t.refused(capsys, tmp_path / "hf", "--to", tmp_path / "model.bin")
    assert run(tmp_path / "hf", "--to", tmp_path / "model.bin", "--dtype", "fp16") == 0
    assert (tmp_path / "model.bin").read_bytes() == binary("gpt_neox", model("gpt_neox", "F16"), "F16")


@pytest.mark.parametrize("context", [None, 1, 40, 41, 100])
def test_tied_positions_are_expanded(context, tmp_path):
    tensors = model("gpt2")
    (tmp_path / "tied.bin").write_bytes(binary("gpt2", tensors, words=t.gpt2_words(tied=1, context=90)))
    option = ["--context", context] if context else []
    assert run(tmp_path / "tied.bin", "--back", tmp_path / "hf", *option) == 0
    rows = context or 90
    wpe = tensors["transformer.wpe.weight"]
    tensors["transformer.wpe.weight"] = wpe[np.arange(rows) % T]
    assert read_safetensors(tmp_path / "hf") == raw(tensors, "F32")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_positions"] == rows


def test_shards_and_their_index(tmp_path):
    tensors = model("gpt_neox", "BF16")
    (tmp_path / "model.bin").write_bytes(binary("gpt_neox", tensors, "BF16"))
    assert run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--shard-size", "0.08MB") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    filled = {name: 0 for name in files}
    for name, file in index["weight_map"].items():
        filled[file] += tensors[name].nbytes
    assert max(filled.values()) <= 80_000
    assert read_safetensors(tmp_path / "hf") == raw(tensors, "BF16")
    assert run(tmp_path / "hf", "--to", tmp_path / "again.bin") == 0
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


ROPES = {
    "none": dict(mode=0),
    "other base": dict(mode=0, base=500000.25, original=16),
    "linear": dict(mode=1, scale=4.0, original=10),
    "ntk": dict(mode=2, scale=4.0, original=10),
    "dynamic": dict(mode=3, scale=1.5, original=10),
    "yarn": dict(mode=4, scale=4.0, original=10, base=9000.0),
    "sequential, tanh": dict(parallel=0, gelu=1),
}


@pytest.mark.parametrize("name", ROPES)
def test_every_rotary_mode_comes_back(name, tmp_path):
    tensors = model("gpt_neox", "F16")
    (tmp_path / "model.bin").write_bytes(binary("gpt_neox", tensors, "F16", t.neox_words(kind="F16", **ROPES[name])))
    assert run(tmp_path / "model.bin", "--back", tmp_path / "hf") == 0
    assert run(tmp_path / "hf", "--to", tmp_path / "again.bin") == 0
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    assert run(tmp_path / "model.bin", "--back", tmp_path / "longer", "--context", 77) == 0
    assert run(tmp_path / "longer", "--to", tmp_path / "longer.bin") == 0
    longer = t.neox_words(kind="F16", **ROPES[name] | dict(maxT=77))
    assert (tmp_path / "longer.bin").read_bytes() == binary("gpt_neox", tensors, "F16", longer)


def exported(tmp_path, **words):
    (tmp_path / "model.bin").write_bytes(binary("gpt_neox", model("gpt_neox"), words=t.neox_words(**words)))
    assert run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--force") == 0
    return json.loads((tmp_path / "hf" / "config.json").read_text())


def test_what_config_json_says_of_rope(tmp_path):
    """5.x reads rope_scaling, else rope_parameters; 4.x rope_scaling, rotary_emb_base and rotary_pct."""
    shared = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    none = exported(tmp_path)
    assert none["rope_parameters"] == {"rope_type": "default", **shared} and none["rope_scaling"] is None
    assert none["max_position_embeddings"] == T == none["original_max_position_embeddings"]
    assert none["rotary_emb_base"] == none["rope_theta"] == 10000.0 and none["rotary_pct"] == 0.5
    assert "longhand" not in none and none["hidden_act"] == "gelu" and none["use_parallel_residual"] is True
    linear = exported(tmp_path, mode=1, scale=4.0, original=10)
    assert linear["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, **shared}
    assert linear["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert (linear["max_position_embeddings"], linear["original_max_position_embeddings"]) == (T, 10)
    ntk = exported(tmp_path, mode=2, scale=4.0, original=10)  # 6 rotated dimensions
    assert ntk["rope_parameters"]["rope_type"] == "default" and ntk["rope_scaling"] is None
    assert ntk["rope_theta"] == ntk["rotary_emb_base"] == pytest.approx(10000 * 4.0 ** (16 / 14), rel=1e-15)
    dynamic = exported(tmp_path, mode=3, scale=4.0, original=10)  # its window is max_position_embeddings
    assert dynamic["max_position_embeddings"] == 10 and dynamic["longhand"] == {"context": T}
    yarn = exported(tmp_path, mode=4, scale=4.0, original=10)
    assert yarn["rope_scaling"] == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
    stretched = {"factor": 4.0, "original_max_position_embeddings": 10}
    assert yarn["rope_parameters"] == {"rope_type": "yarn", **stretched, **shared}
    assert yarn["max_position_embeddings"] == T
    tanh = exported(tmp_path, gelu=1, parallel=0)
    assert tanh["hidden_act"] == "gelu_new" and tanh["use_parallel_residual"] is False


def test_a_yarn_that_some_releases_misread_is_told(tmp_path, capsys):
    exported(tmp_path, mode=4, scale=3.0, original=10)
    told = capsys.readouterr().err
    assert "4, the context over the original one" in told and "instead of 3;" in told and "--context 30" in told
    assert run(tmp_path / "model.bin", "--back", tmp_path / "other", "--context", 30) == 0
    assert "releases of transformers" not in capsys.readouterr().err


def test_a_dynamic_that_depends_on_the_length_is_told(tmp_path, capsys):
    exported(tmp_path, mode=3, scale=2.0, original=10)
    told = capsys.readouterr().err
    assert f"agree at the full {T} tokens only" in told
    assert run(tmp_path / "model.bin", "--back", tmp_path / "unstretched", "--context", 10) == 0
    for other in (dict(), dict(mode=1, scale=4.0, original=10), dict(mode=2, scale=4.0, original=10)):
        exported(tmp_path, **other)
    assert "agree at" not in capsys.readouterr().err


OLD_AND_NEW = [
    ({}, dict(mode=0)),
    ({"rotary_emb_base": ..., "rotary_pct": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5,
      "partial_rotary_factor": 0.5}}, dict(mode=0, base=5e5)),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, dict(mode=1, scale=2.0)),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None}, dict(mode=1, scale=2.0)),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, dict(mode=3, scale=2.0)),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "beta_fast": 32.0,
      "beta_slow": None, "attention_factor": 1.1386294361119891, "truncate": True}},
     dict(mode=4, scale=4.0, original=10)),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, dict(mode=4, scale=4.0)),
    ({"hidden_act": "gelu_fast", "use_parallel_residual": False}, dict(gelu=1, parallel=0)),
    # transformers cuts off, and so do we: 0.52 of 32 is 16.
    ({"rotary_pct": 0.52}, dict(mode=0)),
]


@pytest.mark.parametrize("changes,words", OLD_AND_NEW, ids=range(len(OLD_AND_NEW)))
def test_rope_settings_of_every_age(changes, words, tmp_path):
    write_directory(tmp_path / "hf", "gpt_neox", model("gpt_neox"), **changes)
    assert run(tmp_path / "hf", "--to", tmp_path / "model.bin") == 0
    assert (tmp_path / "model.bin").read_bytes()[:1024] == t.neox_words(**words).ljust(1024, b"\0")


def test_an_edited_config_is_believed_over_our_note(tmp_path):
    config = exported(tmp_path, mode=2, scale=4.0, original=10)
    for key in ("rotary_emb_base", "rope_theta"):
        config[key] = 123456.0
    config["rope_parameters"]["rope_theta"] = 123456.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "hf", "--to", tmp_path / "again.bin") == 0
    wanted = t.neox_words(base=123456.0, original=10).ljust(1024, b"\0")
    assert (tmp_path / "again.bin").read_bytes()[:1024] == wanted


def test_rotated_dimensions_survive_every_division():
    """transformers computes int(D · share)."""
    from hf_config import rotary_share

    for D in range(1, 257):
        for dims in range(0, D + 1, 2):
            assert int(D * rotary_share(dims, D)) == dims


def checkpoint(run_folder, step, data, name=None):
    folder = run_folder / (name or f"step_{step:08d}")
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(data)
    t.write_manifest(folder)
    return folder


def test_the_newest_whole_checkpoint_of_a_run(tmp_path, capsys):
    models = [model("gpt2", seed=seed) for seed in range(4)]
    files = [binary("gpt2", tensors) for tensors in models]
    first = checkpoint(tmp_path / "run", 100, files[0])
    checkpoint(tmp_path / "run", 200, files[1], ".step_00000200.old")
    short = checkpoint(tmp_path / "run", 1000, files[2])
    (short / "model.bin").write_bytes(files[2][:-1])
    checkpoint(tmp_path / "run", 300, files[3], ".step_00000300.tmp")
    assert run(first, "--back", tmp_path / "a") == 0
    assert read_safetensors(tmp_path / "a") == raw(models[0], "F32")
    assert capsys.readouterr().err == ""
    assert run(tmp_path / "run", "--back", tmp_path / "b") == 0
    assert read_safetensors(tmp_path / "b") == raw(models[1], "F32")
    assert "step_00001000" in capsys.readouterr().err
    checkpoint(tmp_path / "run", 200, files[3])  # the new one of the same step
    assert run(tmp_path / "run", "--back", tmp_path / "c") == 0
    assert read_safetensors(tmp_path / "c") == raw(models[3], "F32")


def test_a_healthy_checkpoint_comes_before_a_newer_one_that_is_not(tmp_path):
    from weights_file import locate

    folders = [checkpoint(tmp_path / "run", step, binary("gpt2", model("gpt2", seed=step))) for step in (1, 2)]
    t.write_manifest(folders[1], fault="updates were skipped")
    warnings = []
    assert locate(str(tmp_path / "run"), warnings.append) == str(folders[0] / "model.bin")
    assert len(warnings) == 1 and "step_00000002: not healthy (updates were skipped)" in warnings[0]
    (folders[0] / "model.bin").unlink()
    assert locate(str(tmp_path / "run"), warnings.append) == str(folders[1] / "model.bin")
    assert "no other is" in warnings[-1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of 130 tokens more than bytes, end of text at 0 as GPT-NeoX has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["And it came to pass, that the king's men went up; naïve 漢字.\n" * 60], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_tokenizer_binary_is_that_of_prepare(tokenizer, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("And it came to pass\n" * 100)
    prepare = [sys.executable, os.path.join(os.path.dirname(HERE), "data", "prepare.py"), str(tmp_path / "text.txt")]
    options = ["--out", str(tmp_path / "data"), "--tokenizer", str(tokenizer), "--min-tokens", "1"]
    subprocess.run(prepare + options, check=True, stdout=subprocess.DEVNULL)
    assert run("--tokenizer", tokenizer, "--to", tmp_path / "own.bin") == 0
    assert (tmp_path / "own.bin").read_bytes() == (tmp_path / "data" / "tokenizer.bin").read_bytes()
    assert (tmp_path / "own.json").read_bytes() == tokenizer.read_bytes()  # generate.py encodes with it
    assert "own.bin" in capsys.readouterr().out
    assert run("--tokenizer", tmp_path / "own.json", "--to", tmp_path / "own.bin", "--force") == 0
    assert (tmp_path / "own.bin").read_bytes() == (tmp_path / "data" / "tokenizer.bin").read_bytes()


def test_another_end_of_text(tokenizer, tmp_path, capsys):
    made = json.loads(tokenizer.read_text())
    made["added_tokens"][0]["content"] = "</s>"
    made["model"]["vocab"] = {("</s>" if id_ == 0 else token): id_ for token, id_ in made["model"]["vocab"].items()}
    (tmp_path / "other.json").write_text(json.dumps(made))
    command = ["--tokenizer", tmp_path / "other.json", "--to", tmp_path / "tokenizer.bin"]
    assert "--eot-token" in t.refused(capsys, *command)
    assert run(*command, "--eot-token", "</s>") == 0
    assert (tmp_path / "tokenizer.bin").read_bytes()[1024:1029] == b"\x04</s>"


def test_tokenizer_goes_with_the_export(tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "small.bin").write_bytes(binary("gpt_neox", model("gpt_neox")))
    says = t.refused(capsys, tmp_path / "small.bin", "--back", tmp_path / "hf", "--tokenizer", tokenizer)
    assert "more than the model's 131" in says and not (tmp_path / "hf").exists()
    monkeypatch.setattr(t, "V", 301)
    monkeypatch.setattr(t, "VP", 384)
    (tmp_path / "large.bin").write_bytes(binary("gpt_neox", model("gpt_neox")))
    assert run(tmp_path / "large.bin", "--back", tmp_path / "hf", "--tokenizer", tokenizer) == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0


def test_nothing_half_written_stays(tmp_path, capsys, monkeypatch):
    tensors = model("gpt2")
    write_directory(tmp_path / "hf", "gpt2", tensors)
    (tmp_path / "model.bin").write_bytes(binary("gpt2", tensors))
    before = sorted(os.listdir(tmp_path))
    real, calls = convert_hf.recode, []

    def failing(error):
        def recode(*arguments):
            calls.append(1)
            if len(calls) > 5:
                raise error
            return real(*arguments)

        return recode

    commands = [tmp_path / "hf", "--to", tmp_path / "out"], [tmp_path / "model.bin", "--back", tmp_path / "out"]
    for error, says in ((OSError(28, "No space left on device"), "No space left"), (KeyboardInterrupt(), "stopped")):
        for command in commands:
            calls.clear()
            monkeypatch.setattr(convert_hf, "recode", failing(error))
            assert run(*command) == 1
            printed = capsys.readouterr()
            assert says in printed.err and printed.err.count("\n") == 1 and printed.out == ""
            assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(convert_hf, "recode", real)
    # What a killed conversion left is replaced, unless that conversion still runs.
    (tmp_path / ".out.bin.partial").write_bytes(b"x" * 10_000_000)
    with open(tmp_path / ".out.bin.partial") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another conversion" in t.refused(capsys, tmp_path / "hf", "--to", tmp_path / "out.bin")
    assert run(tmp_path / "hf", "--to", tmp_path / "out.bin") == 0
    assert (tmp_path / "out.bin").read_bytes() == binary("gpt2", tensors)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_bytes(b"x")
    assert run(tmp_path / "model.bin", "--back", tmp_path / "out") == 0
    assert read_safetensors(tmp_path / "out") == raw(tensors, "F32")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out", "out.bin"])


def test_existing_outputs_are_replaced_only_with_force(tmp_path, capsys):
    tensors = model("gpt2")
    write_directory(tmp_path / "hf", "gpt2", tensors)
    (tmp_path / "model.bin").write_bytes(b"precious")
    assert "--force" in t.refused(capsys, tmp_path / "hf", "--to", tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == b"precious"
    assert run(tmp_path / "hf", "--to", tmp_path / "model.bin", "--force") == 0
    assert "--force" in t.refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "hf")
    # All that an export can write is replaced, whatever it then writes itself.
    ours = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    for name in ours:
        (tmp_path / "hf" / name).write_text("{}")
    assert run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--force") == 0
    assert sorted(os.listdir(tmp_path / "hf")) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    assert "config.json" in t.refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "home", "--force")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "model.bin", "--back", tmp_path / "empty") == 0
    assert read_safetensors(tmp_path / "empty") == raw(tensors, "F32")


def test_force_deletes_nothing_but_an_export(tmp_path, capsys, monkeypatch):
    (tmp_path / "model.bin").write_bytes(binary("gpt2", model("gpt2")))
    assert run(tmp_path / "model.bin", "--back", tmp_path / "hf") == 0
    command = [tmp_path / "model.bin", "--back", tmp_path / "hf", "--force"]
    (tmp_path / "hf" / "README.md").unlink()
    others = ["README.md", ".git", "model-1-of-2.safetensors", "model.safetensors.old"]
    for name in others:
        (tmp_path / "hf" / name).mkdir() if name == ".git" else (tmp_path / "hf" / name).write_text("mine")
        before = sorted(os.listdir(tmp_path / "hf"))
        assert f"{tmp_path}/hf: holds {name}, which" in t.refused(capsys, *command)
        assert sorted(os.listdir(tmp_path / "hf")) == before and not (tmp_path / ".hf.partial").exists()
        (tmp_path / "hf" / name).rename(tmp_path / name)
    (tmp_path / "hf" / "tokenizer.json").mkdir()
    for i in range(7):
        (tmp_path / "hf" / f"{i}.txt").write_text("mine")
    assert "holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more, which" in t.refused(capsys, *command)
    # What comes while the tensors are written stays as well.
    for name in os.listdir(tmp_path / "hf"):
        (tmp_path / "hf" / name).rename(tmp_path / f"moved_{name}")
    (tmp_path / "hf" / "config.json").write_text("{}")
    real = convert_hf.hf_directory.write
    monkeypatch.setattr(convert_hf.hf_directory, "write",
                        lambda *arguments: (real(*arguments), (tmp_path / "hf" / "late.txt").write_text("mine")))
    assert "holds late.txt, which" in t.refused(capsys, *command)
    assert (tmp_path / "hf" / "late.txt").read_text() == "mine" and not (tmp_path / ".hf.partial").exists()


def test_a_link_is_written_through(tmp_path, capsys):
    tensors = model("gpt2")
    for name in ("disk", "links"):
        (tmp_path / name).mkdir()
    for name in ("file.bin", "folder"):  # at first to where nothing is
        (tmp_path / "links" / name).symlink_to(tmp_path / "disk" / name)
    write_directory(tmp_path / "hf", "gpt2", tensors)
    for options in ([], ["--force"]):
        assert run(tmp_path / "hf", "--to", tmp_path / "links" / "file.bin", *options) == 0
        assert run(tmp_path / "disk" / "file.bin", "--back", tmp_path / "links" / "folder", *options) == 0
        assert (tmp_path / "disk" / "file.bin").read_bytes() == binary("gpt2", tensors)
        assert read_safetensors(tmp_path / "disk" / "folder") == raw(tensors, "F32")
        assert all(path.is_symlink() for path in (tmp_path / "links").iterdir())
        for place in ("disk", "links"):
            assert sorted(os.listdir(tmp_path / place)) == ["file.bin", "folder"]
    assert "--force" in t.refused(capsys, tmp_path / "hf", "--to", tmp_path / "links" / "file.bin")


MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[1])
import convert_hf

def peak():  # kB; getrusage would count the process that started this one too
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

base = peak()
for command in ("hf --to model.bin", "model.bin --back back --dtype fp16 --shard-size 200MB"):
    assert convert_hf.main(command.split()) == 0
print(peak() - base)
"""


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_with_the_model(family, tmp_path, monkeypatch):
    """Well over 300 MB of fp32, its largest tensors 100 MB each, pass in less than 150 MB."""
    width, V = 2560, 10240
    for name in ("GPT2_LAYER", "NEOX_LAYER"):
        wide = [(part, tuple(x // C * width for x in shape)) for part, shape in getattr(t, name)]
        monkeypatch.setattr(t, name, wide)
    for name, value in (("C", width), ("V", V), ("L", 1)):
        monkeypatch.setattr(t, name, value)
    header, end = {}, 0
    for name, shape in t.names_and_shapes(family):
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (tmp_path / "hf").mkdir()
    sizes = {"n_embd": width, "hidden_size": width, "n_head": 20, "num_attention_heads": 20, "intermediate_size": 4 * width, "vocab_size": V, "n_layer": 1,
             "num_hidden_layers": 1}
    config = {key: sizes.get(key, value) for key, value in t.CONFIGS[family].items()}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "hf" / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros, which the disk need not hold
    assert end > 400e6
    measure = [sys.executable, "-c", MEASURE, HERE]
    done = subprocess.run(measure, cwd=tmp_path, capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 150_000, f"{kilobytes / 1000:.0f} MB above the interpreter"
    print(f"{family}: {end / 1e6:.0f} MB converted with {kilobytes / 1000:.0f} MB above the interpreter")
