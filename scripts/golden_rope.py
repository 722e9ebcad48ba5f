#!/usr/bin/env python3
"""Makes test/golden/rope.json from transformers: frequencies of every way to stretch rotary positions, rows rotated.

    python -m venv VENV && VENV/bin/pip install -r dev/requirements-golden.txt
    VENV/bin/python scripts/golden_rope.py            # rewrites test/golden/rope.json

transformers computes frequencies, angles, cosines and sines in float32, whatever the type of the model. Its own code is
run here with torch.float standing for float64: that is the truth. The same code as it is comes along as a check.

Rows are a hash of (seed, stream, index), as in scripts/golden_gpt2.py, and test/rope.cpp makes them again.
"""
import argparse
import contextlib
import json
import pathlib
import random

import golden_packages  # noqa: F401
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as neox

from golden import hashes

# Heads large enough that a part of them gives every number of rotated dims, from 8 to 64.
HEADS, HEAD_DIM = 2, 256
# (mode, dims of a head, of which rotated, position of the first token): what is rotated as a whole.
ROTATED = [("none", 32, 8, 0), ("linear", 80, 20, 2040), ("dynamic", 64, 16, 100000), ("yarn", 80, 20, 1 << 30)]
TOKENS = 3


@contextlib.contextmanager
def in_float64():
    """transformers' float32 becomes float64."""
    kept = torch.float, torch.float32, torch.Tensor.float
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float, torch.float32, torch.Tensor.float = kept


def config_of(case):
    """transformers' config for a case: its window is the trained one for dynamic, which YaRN names apart."""
    rope = {"rope_type": {"none": "default"}.get(case["mode"], case["mode"]), "rope_theta": case["base"],
            "partial_rotary_factor": case["dims"] / case["D"]}
    if case["mode"] != "none":
        rope["factor"] = case["scale"]
    if case["mode"] == "yarn":
        rope["original_max_position_embeddings"] = case["original"]
    return transformers.GPTNeoXConfig(hidden_size=HEADS * case["D"], num_attention_heads=HEADS,
                                      max_position_embeddings=case["original"], rope_parameters=rope)


def frequencies(case):
    """(float tensor (dims/2), factor of cosine and sine) for sequences of case["T"] tokens."""
    config = config_of(case)
    if case["mode"] == "none":
        return neox.GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[case["mode"]](config, "cpu", seq_len=case["T"])


def with_frequencies(case):
    """The case with its truth, after a look at whether float32 agrees with it."""
    with in_float64():
        truth, factor = frequencies(case)
    rounded, same_factor = frequencies(case)
    assert truth.dtype == torch.float64 and rounded.dtype == torch.float32 and factor == same_factor
    assert len(truth) == case["dims"] // 2
    assert float((rounded.double() / truth - 1).abs().max()) < 1e-5
    return {**case, "factor": factor, "frequencies": truth.tolist()}


def rows(seed, stream, D):
    """(1,H,TOKENS,D), uniform in ±4 in steps of 2^-5: exact in bfloat16."""
    k = hashes(seed, stream, HEADS * TOKENS * D).astype("int64") >> 56
    return torch.from_numpy(k / 32.0).reshape(1, HEADS, TOKENS, D)


def rotated(seed, case, position0):
    """The rotated dims of queries and keys (TOKENS tokens from position0 on), by transformers in float64."""
    q, k = rows(seed, 0, case["D"]), rows(seed, 1, case["D"])
    with in_float64():
        embedding = neox.GPTNeoXRotaryEmbedding(config_of(case))
        # What the module would choose for the longest sequence that it had seen.
        embedding.inv_freq, embedding.attention_scaling = frequencies(case)
        embedding.rope_type = "default"
        cos, sin = embedding(q, torch.arange(position0, position0 + TOKENS)[None])
        assert cos.dtype == torch.float64
        q_out, k_out = neox.apply_rotary_pos_emb(q, k, cos, sin)
    d = case["dims"]
    assert torch.equal(q_out[..., d:], q[..., d:]) and torch.equal(k_out[..., d:], k[..., d:])
    return {**with_frequencies(case), "seed": seed, "position0": position0,
            "q": q_out[..., :d].flatten().tolist(), "k": k_out[..., :d].flatten().tolist()}


def cases():
    draw = random.Random(1)
    made = []
    for mode in ("none", "linear", "dynamic", "yarn"):
        for n in range(12):
            dims = draw.choice(range(8, 66, 2))
            original = draw.choice((64, 512, 2048, 4096))
            # The window itself, less, a little more, far more.
            T = draw.choice((original, original // 2, original + 1, draw.randrange(original, 500 * original)))
            base = draw.choice((10000.0, 500.0, 500000.0, round(draw.uniform(20, 30000), 1)))
            scale = 1.0 if mode == "none" else draw.choice((1.0, 2.0, 4.0, 64.0, round(draw.uniform(1, 40), 2)))
            made.append(dict(mode=mode, D=HEAD_DIM, dims=dims, base=base, scale=scale, original=original, T=T))
    # Pythia's own: windows of 2048, quarters of its heads.
    for mode in ("linear", "dynamic", "yarn"):
        for dims in (8, 16, 20, 32, 64):
            made.append(dict(mode=mode, D=4 * dims, dims=dims, base=10000.0, scale=8.0, original=2048, T=16384))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "test" / "golden", metavar="DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "made_by": f"scripts/golden_rope.py with torch {torch.__version__}, transformers {transformers.__version__}",
        "frequencies": [with_frequencies(case) for case in cases()],
        "rotated": [
            rotated(seed, dict(mode=mode, D=D, dims=dims, base=10000.0, scale=1.0 if mode == "none" else 4.0,
                               original=2048, T=8192), position0)
            for seed, (mode, D, dims, position0) in enumerate(ROTATED)
        ],
    }
    path = args.out / "rope.json"
    path.write_text(json.dumps(content) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
