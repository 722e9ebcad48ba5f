"""What the tests of convert_hf.py share: tiny models, and readers and writers that know nothing of its code."""

import json
import re
import struct

import numpy as np
import xxhash

import convert_hf

BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
VERSION = {"F32": 3, "BF16": 5, "F16": 6}
OPTION = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
KINDS = list(VERSION)
FAMILIES = ["gpt2", "gpt_neox"]
L, H, C, V, T = 3, 2, 64, 131, 40  # Vp = 256; D = 32
VP = 256

GPT2_CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V, "n_positions": T, "n_embd": C,
    "n_layer": L, "n_head": H, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}
NEOX_CONFIG = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": V, "hidden_size": C,
    "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": 4 * C, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "max_position_embeddings": T, "rotary_pct": 0.5, "rotary_emb_base": 10000,
    "use_parallel_residual": True, "tie_word_embeddings": False,
}
CONFIGS = {"gpt2": GPT2_CONFIG, "gpt_neox": NEOX_CONFIG}

# HuggingFace's names and shapes, in the order of the binary.
GPT2_LAYER = [
    ("ln_1.weight", (C,)), ("ln_1.bias", (C,)), ("attn.c_attn.weight", (C, 3 * C)), ("attn.c_attn.bias", (3 * C,)),
    ("attn.c_proj.weight", (C, C)), ("attn.c_proj.bias", (C,)), ("ln_2.weight", (C,)), ("ln_2.bias", (C,)),
    ("mlp.c_fc.weight", (C, 4 * C)), ("mlp.c_fc.bias", (4 * C,)), ("mlp.c_proj.weight", (4 * C, C)),
    ("mlp.c_proj.bias", (C,)),
]
NEOX_LAYER = [
    ("input_layernorm.weight", (C,)), ("input_layernorm.bias", (C,)),
    ("attention.query_key_value.weight", (3 * C, C)), ("attention.query_key_value.bias", (3 * C,)),
    ("attention.dense.weight", (C, C)), ("attention.dense.bias", (C,)), ("post_attention_layernorm.weight", (C,)),
    ("post_attention_layernorm.bias", (C,)), ("mlp.dense_h_to_4h.weight", (4 * C, C)),
    ("mlp.dense_h_to_4h.bias", (4 * C,)), ("mlp.dense_4h_to_h.weight", (C, 4 * C)), ("mlp.dense_4h_to_h.bias", (C,)),
]


def names_and_shapes(family, positions=T):
    if family == "gpt2":
        before, layer, inside = [("wte.weight", (V, C)), ("wpe.weight", (positions, C))], "h.{}.", GPT2_LAYER
        after, prefix = [("ln_f.weight", (C,)), ("ln_f.bias", (C,))], "transformer."
    else:
        before, layer, inside = [("embed_in.weight", (V, C))], "layers.{}.", NEOX_LAYER
        after, prefix = [("final_layer_norm.weight", (C,)), ("final_layer_norm.bias", (C,))], "gpt_neox."
    rows = before + [(layer.format(i) + name, shape) for name, shape in inside for i in range(L)] + after
    rows = [(prefix + name, shape) for name, shape in rows]
    return rows + ([("embed_out.weight", (V, C))] if family == "gpt_neox" else [])


def bits(shape, kind, draw):
    """Any finite bits: subnormals, both zeros and the largest numbers too."""
    made = draw.integers(0, 2 ** (8 * np.dtype(BITS[kind]).itemsize), shape, dtype=np.uint64).astype(BITS[kind])
    made[(made & EXPONENT[kind]) == EXPONENT[kind]] ^= EXPONENT[kind] & -EXPONENT[kind]  # its lowest exponent bit
    return made


def model(family, kind="F32", seed=1):
    """{HuggingFace's name with prefix: raw bits}."""
    draw = np.random.default_rng(seed)
    return {name: bits(shape, kind, draw) for name, shape in names_and_shapes(family)}


def write_safetensors(path, tensors, kinds):
    """`kinds` is one dtype for all, or {name: dtype}. Written by hand: numpy has no bf16."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        kind = kinds if isinstance(kinds, str) else kinds[name]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(folder):
    """{name: (dtype, shape, bytes)} of all shards: by the library what it knows of bf16, and by hand the bytes."""
    from safetensors import safe_open

    made = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            slices = {name: file.get_slice(name) for name in file.keys()}
            about = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        assert header.keys() == about.keys() and not header.keys() & made.keys()
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            made[name] = (*about[name], data[8 + length + begin : 8 + length + end])
    return made


def raw(tensors, kind):
    return {name: (kind, value.shape, value.tobytes()) for name, value in tensors.items()}


def write_directory(folder, family, tensors, kind="F32", **changes):
    folder.mkdir()
    config = CONFIGS[family] | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    write_safetensors(folder / "model.safetensors", tensors, kind)
    return folder


def neox_words(mode=0, base=10000.0, scale=1.0, original=T, parallel=1, gelu=2, temperature=0, maxT=T, kind="F32"):
    head = (20261124, VERSION[kind], maxT, V, L, H, C, VP, 16, parallel, gelu, mode, temperature, original)
    return struct.pack("<14i2d", *head, base, scale)


def gpt2_words(maxT=T, tied=0, context=0, kind="F32"):
    return struct.pack("<10i", 20240326, VERSION[kind], maxT, V, L, H, C, VP, tied, context)


def binary(family, tensors, kind="F32", words=None):
    """The weights file of data/FORMATS.md."""
    made = [(words or (gpt2_words(kind=kind) if family == "gpt2" else neox_words(kind=kind))).ljust(1024, b"\0")]
    for name, value in tensors.items():
        conv = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        made.append((value.T if conv else value).tobytes())
        if any(part in name for part in ("wte", "embed_in", "embed_out")):
            made.append(bytes((VP - V) * C * value.itemsize))
    return b"".join(made)


def write_manifest(checkpoint, parts=None, **more):
    """As a trainer does: of the files that are there, or of those given, with a checksum of its compact form."""
    there = sorted(checkpoint.glob("*.bin"))
    body = {"format": "longhand checkpoint", "fault": "", "meta": {}, "step": int(re.search(r"\d+", checkpoint.name)[0]),
            "parts": [{"name": path.name, "bytes": path.stat().st_size, "xxh3": xxhash.xxh3_64_hexdigest(path.read_bytes())}
                      for path in there] if parts is None else parts} | more
    compact = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body["checksum"] = xxhash.xxh3_64_hexdigest(compact.encode())
    text = json.dumps(body, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    (checkpoint / "manifest.json").write_text(text)


def run(*arguments):
    return convert_hf.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What convert_hf.py says on stderr when it exits with 2."""
    capsys.readouterr()
    code = run(*arguments)
    printed = capsys.readouterr()
    assert code == 2, f"exit {code}: {printed.err}"
    assert printed.out == "" and printed.err.startswith("convert_hf.py: error: ") and printed.err.count("\n") == 1
    return printed.err
