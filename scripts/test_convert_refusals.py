"""What convert_hf.py refuses: each in one line that names the place, with exit code 2 and nothing written."""

import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

import convert_hf
import hf_testing as t
from hf_testing import FAMILIES, KINDS, C, V, binary, model, refused, write_directory

HERE = os.path.dirname(os.path.abspath(__file__))


def refused_directory(capsys, tmp_path, family, tensors=None, kinds="F32", options=(), **changes):
    write_directory(tmp_path / "hf", family, model(family) if tensors is None else tensors, kinds, **changes)
    return refused_as_it_is(capsys, tmp_path, *options)


def refused_as_it_is(capsys, tmp_path, *options):
    says = refused(capsys, tmp_path / "hf", "--to", tmp_path / "model.bin", *options)
    assert os.listdir(tmp_path) == ["hf"]
    return says


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_needed_in_its_shape(family, tmp_path, capsys):
    whole = model(family)
    write_directory(tmp_path / "hf", family, whole)
    for name in whole:
        plain = name.removeprefix("transformer.").removeprefix("gpt_neox.")
        t.write_safetensors(tmp_path / "hf" / "model.safetensors", {k: v for k, v in whole.items() if k != name}, "F32")
        assert plain in refused_as_it_is(capsys, tmp_path)
        for other in (whole[name][..., :-1], whole[name][None], np.concatenate([whole[name], whole[name]])):
            t.write_safetensors(tmp_path / "hf" / "model.safetensors", whole | {name: other}, "F32")
            assert f"{name} is {list(other.shape)}" in refused_as_it_is(capsys, tmp_path)


EXTRA = {
    "gpt2": ["h.3.attn.bias", "transformer.h.3.attn.masked_bias", "h.00.attn.bias", "h.0.attn.rotary_emb.inv_freq",
             "h.0.ln_1.bias_2", "score.weight", "transformer.lm_head.weight", "embed_out.weight", "wte.weight",
             "transformer.transformer.h.0.attn.bias", "gpt_neox.h.0.attn.bias", "h.0.crossattention.bias"],
    "gpt_neox": ["gpt_neox.layers.3.attention.bias", "layers.3.attention.rotary_emb.inv_freq", "embed_in.weight",
                 "gpt_neox.embed_out.weight", "lm_head.weight", "layers.0.attention.rotary_emb.cos_cached",
                 "h.0.attn.bias", "gpt_neox.layers.0.attention.bias.weight", "rotary_emb.inv_freq", "embed_out.bias"],
}


@pytest.mark.parametrize("family,name", [(family, name) for family in FAMILIES for name in EXTRA[family]])
def test_only_known_buffers_are_left_out(family, name, tmp_path, capsys):
    whole = model(family)
    twins = {"wte.weight": "transformer.wte.weight", "embed_in.weight": "gpt_neox.embed_in.weight",
             "lm_head.weight": "embed_out.weight"}  # even if they are the same
    extra = whole[twins[name]] if name in twins else np.ones(C, np.uint32)
    says = refused_directory(capsys, tmp_path, family, whole | {name: extra})
    assert name in says and "has no place" in says


def test_a_head_that_is_not_tied(tmp_path, capsys):
    tensors = model("gpt2")
    head = tensors["transformer.wte.weight"].copy()
    head[-1, -1] ^= 1
    assert "lm_head.weight" in refused_directory(capsys, tmp_path, "gpt2", tensors | {"lm_head.weight": head})
    t.write_safetensors(tmp_path / "hf" / "model.safetensors", tensors | {"lm_head.weight": head[:-1]}, "F32")
    assert "lm_head.weight" in refused_as_it_is(capsys, tmp_path)


@pytest.mark.parametrize("kind", ["F64", "I32", "BOOL", "F8_E4M3"])
def test_dtypes_of_other_kinds(kind, tmp_path, capsys):
    tensors = model("gpt_neox")
    kinds = {name: "F32" for name in tensors}
    width = {"F64": np.uint64, "I32": np.uint32, "BOOL": np.uint8, "F8_E4M3": np.uint8}[kind]
    odd = "gpt_neox.layers.2.attention.dense.bias"
    tensors[odd], kinds[odd] = np.zeros(C, width), kind
    says = refused_directory(capsys, tmp_path, "gpt_neox", tensors, kinds, ["--dtype", "fp32"])
    assert odd in says and kind in says


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_and_inf_in_any_place(family, kind, tmp_path, capsys):
    """Both ways, with and without another dtype, the last element of a tensor as well as the first."""
    exponent, whole = t.EXPONENT[kind], model(family, kind)
    write_directory(tmp_path / "hf", family, whole, kind)
    other = {"F32": "bf16", "F16": "fp32", "BF16": "fp16"}[kind]
    names = list(whole)
    for name, place, bad, says in (
        (names[0], 0, exponent, "Inf"),
        (names[1], -1, exponent | 1, "NaN"),
        (names[len(names) // 2], -1, exponent | exponent >> 1, "NaN"),
        (names[-1], -1, exponent | 1 << (8 * whole[names[0]].itemsize - 1), "Inf"),
    ):
        tensors = {key: value * 0 for key, value in whole.items()} | {name: whole[name] * 0}
        tensors[name].reshape(-1)[place] = bad
        t.write_safetensors(tmp_path / "hf" / "model.safetensors", tensors, kind)
        for options in ([], ["--dtype", other]):
            found = refused_as_it_is(capsys, tmp_path, *options)
            assert name in found and f"holds {says}" in found
        (tmp_path / "hf" / "own.bin").write_bytes(binary(family, tensors, kind))
        for options in ([], ["--dtype", other]):
            found = refused(capsys, tmp_path / "hf" / "own.bin", "--back", tmp_path / "back", *options)
            assert f"holds {says}" in found and os.listdir(tmp_path) == ["hf"]


def test_the_binary_names_tensor_and_layer(tmp_path, capsys):
    tensors = {name: value * 0 for name, value in model("gpt2").items()}
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = 0x7FC00000
    (tmp_path / "model.bin").write_bytes(binary("gpt2", tensors))
    assert "fcw of layer 1" in refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "back")


@pytest.mark.parametrize("option,value,fits", [("fp16", 65520.0, 65519.9), ("bf16", 3.3961775e38, 3.3961773e38)])
def test_what_is_too_large_to_narrow(option, value, fits, tmp_path, capsys):
    tensors = {name: value * 0 for name, value in model("gpt_neox").items()}
    name = "gpt_neox.layers.1.attention.dense.weight"
    tensors[name][2, 3] = np.array(-value, np.float32).view(np.uint32)
    says = refused_directory(capsys, tmp_path, "gpt_neox", tensors, options=["--dtype", option])
    assert name in says and "too large" in says and option in says
    tensors[name][2, 3] = np.array(fits, np.float32).view(np.uint32)
    t.write_safetensors(tmp_path / "hf" / "model.safetensors", tensors, "F32")
    assert t.run(tmp_path / "hf", "--to", tmp_path / "model.bin", "--dtype", option) == 0


BOTH = [
    ({"model_type": "llama"}, "llama"),
    ({"model_type": ...}, "model_type"),
    ({"model_type": ["gpt2"]}, "model_type"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 131.0}, "vocab_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"vocab_size": ...}, "vocab_size is missing"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
]
CONFIGS = {
    "gpt2": BOTH + [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"n_inner": 4 * C + 1}, "n_inner"),
        ({"n_head": 5}, "not divisible by 5"),
        ({"n_layer": None}, "n_layer is missing"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
    "gpt_neox": BOTH + [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps"),
        ({"intermediate_size": 3 * C}, "intermediate_size"),
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"num_attention_heads": 7}, "not divisible by 7"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": False}, "attention_bias"),
        ({"use_parallel_residual": 1}, "use_parallel_residual"),
        ({"rotary_pct": 0.1}, "3 rotated dimensions of 32"),
        ({"rotary_pct": 1.5}, "rotated share is 1.5"),
        ({"rotary_pct": 1e308}, "rotated share"),
        ({"rotary_emb_base": 10**400}, "rotary base"),
        ({"rotary_pct": "half"}, "rotated share"),
        *[({"rotary_emb_base": base}, "rotary base") for base in (0.5, 1, 1.0000001e30)],
        ({"rotary_emb_base": float("inf")}, "rotary base"),
        ({"rope_theta": 5.0}, "10000 as rotary_emb_base and 5.0 as rope_theta"),
        # Where no release of transformers looks, or not every one.
        ({"rotary_emb_base": ..., "rope_theta": 5e5}, "10000.0 as transformers' default and 500000.0 as rope_theta"),
        ({"rotary_pct": ..., "partial_rotary_factor": 0.5}, "default and 0.5 as partial_rotary_factor"),
        ({"rotary_emb_base": ..., "rope_scaling": {"type": "linear", "factor": 2.0},
          "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, "as rope_parameters.rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, "500000.0 as rope_scaling.rope_theta"),
        ({"head_dim": 16}, "head_dim is 16, and hidden_size over num_attention_heads 32"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 10},
         "default and 10 as original_max_position_embeddings"),
        ({"rope_scaling": [4]}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope factor is missing"),
        *[({"rope_parameters": {"rope_type": "linear", "factor": scale}}, "rotary scale") for scale in (0.5, 2e12)],
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
         "3.0 as rope_scaling.factor and 2.0 as rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 10}},
         "max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rotary_pct": 0.07}, "2 rotated dimensions"),
        *[({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, key: value}}, key)
          for key, value in (("beta_fast", 16), ("beta_slow", 2), ("truncate", False), ("mscale", 0.7),
                             ("mscale_all_dim", 1), ("attention_factor", 1.2), ("low_freq_factor", 1.0))],
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}}, "original_max"),
        ({"longhand": 3}, "longhand"),
        ({"longhand": {"context": "far"}}, "longhand"),
    ],
}


@pytest.mark.parametrize("family,changes,says", [(f, *case) for f in FAMILIES for case in CONFIGS[f]])
def test_config_values_that_the_trainer_does_not_compute(family, changes, says, tmp_path, capsys):
    error = refused_directory(capsys, tmp_path, family, **changes)
    assert "config.json: " in error and says in error


def test_directories_that_are_not_whole(tmp_path, capsys):
    tensors = model("gpt2")
    folder = write_directory(tmp_path / "hf", "gpt2", tensors)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    good = single.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    wte, rest = "transformer.wte.weight", good[8 + length :]
    twice = json.dumps(header)[:-1] + f', "{wte}": {json.dumps(header[wte])}}}'
    for data in (b"", good[:5], good[:-1], good + b"x", b"\xff" * 8 + good[8:], good[:8] + b"{" * length + rest,
                 struct.pack("<Q", len(twice)) + twice.encode() + rest):
        single.write_bytes(data)
        assert "model.safetensors" in refused_as_it_is(capsys, tmp_path)
    single.unlink()
    assert "neither model.safetensors nor" in refused_as_it_is(capsys, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in refused_as_it_is(capsys, tmp_path)
    names = sorted(tensors)
    where = {name: f"{name in names[:9]}.safetensors" for name in names}
    for shard in ("True.safetensors", "False.safetensors"):
        t.write_safetensors(folder / shard, {name: tensors[name] for name in names if where[name] == shard}, "F32")
    swapped = where | {names[0]: "False.safetensors"}
    for text, says in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {}, "weight_map": {}}', "twice"),
        ({name: "../" + file for name, file in where.items()}, "no file's name"),
        (where | {names[0]: "none.safetensors"}, names[0]),
        (swapped, names[0]),
        ({name: file for name, file in where.items() if name != names[3]}, names[3]),
        (where | {"h.9.ln_1.bias": "True.safetensors"}, "h.9.ln_1.bias is missing"),
    ):
        index.write_text(text if isinstance(text, str) else json.dumps({"weight_map": text}))
        assert says in refused_as_it_is(capsys, tmp_path)
    (folder / "True.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": where}))
    assert "True.safetensors: no such file" in refused_as_it_is(capsys, tmp_path)
    for text in ("", "[1]", "{", '{"n_embd": 1, "n_embd": 2}', "\udcff"):
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "config.json" in refused_as_it_is(capsys, tmp_path)
    (folder / "config.json").unlink()
    assert "config.json: cannot be read" in refused_as_it_is(capsys, tmp_path)


# The trainer's limits (runtime/model/rope.cpp), in every mode.
BAD_BASES = [0.5, 1.0, 1.0000001e30, float("inf"), float("nan"), -10000.0]
BAD_SCALES = [0.9999999, 1.0000001e12, float("inf"), float("nan"), -2.0]


def changed(data, at, value, form="<i"):
    return data[: 4 * at] + struct.pack(form, value) + data[4 * at + struct.calcsize(form) :]


def test_weights_files_that_are_not_whole(tmp_path, capsys):
    gpt2, neox = binary("gpt2", model("gpt2")), binary("gpt_neox", model("gpt_neox"))
    yarn = binary("gpt_neox", model("gpt_neox"), words=t.neox_words(mode=4, scale=4.0, original=10, temperature=1))
    cases = [
        (b"", "shorter than a header"),
        (gpt2[:1023], "shorter than a header"),
        (gpt2[:-1], "its header needs"),
        (gpt2 + b"\0", "its header needs"),
        (changed(gpt2, 0, 20240520), "magic 20240520"),
        (changed(gpt2, 1, 4), "version 4"),
        (changed(gpt2, 8, 2), "tied positions 2"),
        (changed(gpt2, 8, 1), "tied positions 1 with context 0"),
        (changed(changed(gpt2, 8, 1), 9, -1), "tied positions 1 with context -1"),
        *[(changed(gpt2, at, 0), "is 0") for at in (2, 3, 4, 5, 6)],
        (changed(gpt2, 3, 257), "257 tokens"),
        (changed(gpt2, 5, 5), "5 heads"),
        (changed(gpt2, 3, V - 1), "not zero in the rows from 130"),
        (changed(neox, 3, V - 1), "embedin is not zero"),
        (changed(neox, 8, 5), "5 rotated"),
        (changed(neox, 8, 34), "34 rotated"),
        (changed(neox, 8, -2), "-2 rotated"),
        (changed(neox, 9, 2), "parallel is 2"),
        (changed(neox, 10, 0), "GELU form 0"),
        (changed(neox, 11, 5), "rotary mode 5"),
        (changed(neox, 12, 2), "softmax_temperature is 2"),
        (changed(neox, 13, 0), "original context is 0"),
        *[(changed(neox, 14, base, "<d"), f"base is {base}, not above 1") for base in BAD_BASES],
        *[(changed(neox, 16, scale, "<d"), f"scale is {scale}, not from 1") for scale in BAD_SCALES],
        (changed(changed(neox, 11, 2), 8, 2), "rope ntk"),
        (changed(changed(neox, 11, 3), 8, 2), "rope dynamic"),
        (changed(changed(changed(changed(neox, 11, 2), 8, 4), 14, 1e20, "<d"), 16, 1e6, "<d"), "stretched base is 1e+32"),
        (yarn, "temperature on the softmax"),
    ]
    for data, says in cases:
        (tmp_path / "model.bin").write_bytes(data)
        error = refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "hf")
        assert says in error and "model.bin" in error and os.listdir(tmp_path) == ["model.bin"]


def test_the_outermost_rotary_values_are_taken(tmp_path):
    for words in (dict(base=1.0000001), dict(base=1e30), dict(mode=1, scale=1e12), dict(mode=4, scale=1.0)):
        (tmp_path / "model.bin").write_bytes(binary("gpt_neox", model("gpt_neox"), words=t.neox_words(**words)))
        assert t.run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--force") == 0
        assert t.run(tmp_path / "hf", "--to", tmp_path / "again.bin", "--force") == 0
        assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_a_table_of_positions_has_its_length(tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(binary("gpt2", model("gpt2")))
    for context in (39, 41):
        says = refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "hf", "--context", context)
        assert "a table of 40 rows" in says and os.listdir(tmp_path) == ["model.bin"]
    assert t.run(tmp_path / "model.bin", "--back", tmp_path / "hf", "--context", 40) == 0


def test_checkpoints_that_are_not_whole(tmp_path, capsys):
    folder = tmp_path / "run" / "step_00000001"
    folder.mkdir(parents=True)
    data = binary("gpt2", model("gpt2"))
    (folder / "model.bin").write_bytes(data)
    assert "neither a run nor a checkpoint" in refused(capsys, folder, "--back", tmp_path / "hf")
    mine, other = ({"name": f"{name}.bin", "bytes": len(data), "xxh3": "0" * 16} for name in ("model", "optimizer"))
    for parts, says in (
        ([other], "names no model.bin"),
        ([mine, other], "optimizer.bin: is missing"),
        ([mine | {"bytes": 7}], "manifest says 7"),
        ([mine], "model.bin: its bytes changed"),
    ):
        t.write_manifest(folder, parts)
        assert says in refused(capsys, folder, "--back", tmp_path / "hf")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")  # nobody will write to it
    assert "no regular file" in refused(capsys, folder, "--back", tmp_path / "hf")
    (folder / "manifest.json").unlink()
    t.write_manifest(folder, meta={"note": 'naïve " \\ { 漢', "loss": 1e-7})
    assert t.run(folder, "--back", tmp_path / "whole") == 0
    whole = (folder / "manifest.json").read_text()
    for harmed in ("{", "[]", "", whole[:-1], whole.replace('"step": 1', '"step": 2'), whole.replace("1e-07", "1e-06")):
        (folder / "manifest.json").write_text(harmed)
        assert "damaged" in refused(capsys, folder, "--back", tmp_path / "hf")
    assert t.run(tmp_path / "run", "--back", tmp_path / "hf") == 2  # warned of, and no other is there
    assert "no whole checkpoint" in capsys.readouterr().err
    write_directory(tmp_path / "given", "gpt2", model("gpt2"))
    assert "--to FILE.bin" in refused(capsys, tmp_path / "given", "--back", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_tokenizers_that_are_not_ours(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wordpiece.json").write_text('{"model": {"type": "WordPiece"}}')
    (tmp_path / "model.bin").write_bytes(binary("gpt2", model("gpt2")))
    before = sorted(os.listdir(tmp_path))
    for name in ("list.json", "wordpiece.json", "none.json"):
        assert name in refused(capsys, "--tokenizer", tmp_path / name, "--to", tmp_path / "tokenizer.bin")
        back = [tmp_path / "model.bin", "--back", tmp_path / "hf"]
        assert name in refused(capsys, *back, "--tokenizer", tmp_path / name)
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments,says",
    [
        ([], "either --to"),
        (["m.bin"], "either --to"),
        (["m.bin", "--to", "a.bin", "--back", "b"], "either --to"),
        (["--back", "b"], "--back needs"),
        (["--to", "a.bin"], "--to needs"),
        (["hf", "--to", "a.bin", "--tokenizer", "t.json"], "two calls"),
        (["hf", "--to", "a.bin", "--context", "9"], "--context belongs"),
        (["--tokenizer", "t.json", "--to", "a.bin", "--dtype", "fp16"], "--dtype"),
        (["m.bin", "--back", "b", "--dtype", "fp64"], "fp64"),
        (["m.bin", "--back", "b", "--context", "0"], "whole number"),
        (["m.bin", "--back", "b", "--shard-size", "big"], "5GB"),
        (["m.bin", "--back", "b", "--shard-size", "0"], "5GB"),
        (["m.bin", "--back", "b", "--elsewhere"], "--elsewhere"),
        (["hf", "--to", "a.bin"], "no such folder"),
        (["m.bin", "--back", "b"], "no such file"),
    ],
)
def test_options(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be(tmp_path, capsys):
    write_directory(tmp_path / "hf", "gpt2", model("gpt2"))
    (tmp_path / "model.bin").write_bytes(binary("gpt2", model("gpt2")))
    assert "is a folder" in refused(capsys, tmp_path / "hf", "--to", tmp_path / "hf", "--force")
    assert "is a file" in refused(capsys, tmp_path / "model.bin", "--back", tmp_path / "model.bin", "--force")
    assert "does not exist" in refused(capsys, tmp_path / "hf", "--to", tmp_path / "none" / "model.bin")


def test_the_exit_code_and_help_of_the_program():
    """Every option is in the help, and the program's own code is main's."""
    program = [sys.executable, os.path.join(HERE, "convert_hf.py")]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "dynamic" in done.stdout
    for action in convert_hf.parser()._actions:
        for option in action.option_strings:
            assert re.search(rf"^  .*{option}\b", done.stdout, re.MULTILINE), option
    done = subprocess.run([*program, "none", "--to", "none.bin"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    heavy = {"torch", "transformers", "matplotlib"}
    check = f"import sys; sys.path.insert(0, {HERE!r}); import convert_hf; print({heavy!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "set()\n"
