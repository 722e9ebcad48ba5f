#!/usr/bin/env python3
"""Makes the golden files of test/golden from HuggingFace's GPTNeoXForCausalLM, the truth that comes from outside.

    python -m venv VENV && VENV/bin/pip install -r dev/requirements-golden.txt
    VENV/bin/python scripts/golden_pythia.py          # rewrites test/golden/pythia_*.json

scripts/golden.py says what a golden file holds. Two things are not as transformers has them:

- Rotary angles. transformers computes them in float32, whatever the model's type. Here frequencies, angles, cosines and
  sines are float64, with transformers' own formulas, and then rounded to the model's type: in the truth because it is
  the truth, in lower precisions because ours are exact too, and the angles' error (1e-4 radians past 2048 positions)
  would hide what the arithmetic of PyTorch does.
- The softmax of attention, which transformers computes in float32: in the truth it is float64.
"""
import contextlib

import golden_packages  # noqa: F401
import torch
import transformers
from transformers import modeling_rope_utils as rope_utils
from transformers.models.gpt_neox import modeling_gpt_neox as neox

import golden


def config(seed, L, H, D, V, B, T, dims=None, parallel=True, gelu="erf", mode="none", original=2048, base=10000.0,
           scale=1.0):
    rope = dict(mode=mode, dims=dims or D // 4, original=original, base=base, scale=scale)
    return dict(seed=seed, L=L, C=H * D, H=H, V=V, maxT=T, B=B, T=T, parallel=parallel, gelu=gelu, rope=rope)


CONFIGS = {
    # Two layers, a padded vocabulary.
    "pythia_d32": config(seed=11, L=2, H=2, D=32, V=97, B=2, T=37),
    # Attention and MLP one after the other; Vp = 256: more padding than one tile, T past one tile of 64.
    "pythia_d64": config(seed=12, L=3, H=2, D=64, V=131, B=2, T=71, parallel=False),
    # A head dim that is no power of two, as the 2.8b has, V = Vp.
    "pythia_d80": config(seed=13, L=1, H=2, D=80, V=128, B=3, T=23),
    # GELU's tanh form.
    "pythia_d128": config(seed=14, L=2, H=2, D=128, V=97, B=2, T=45, gelu="tanh"),
    # The 1b's head dim, with one head: sums of 512 terms would add more error in an order other than PyTorch's than
    # its own is.
    "pythia_d256": config(seed=15, L=1, H=1, D=256, V=61, B=2, T=19),
    # Whole heads are rotated, three of them; both of the other choices at once.
    "pythia_whole": config(seed=16, L=2, H=3, D=32, V=67, B=2, T=29, dims=32, parallel=False, gelu="tanh"),
    # Past the 2048 positions that Pythia was trained on, and wide enough for a sharp attention, which feels an angle.
    "pythia_long": config(seed=17, L=1, H=1, D=128, V=29, B=1, T=2101),
    # Positions stretched: by a fraction; beyond the original window, whose length then counts; and YaRN, with a base
    # and a window for which some pairs are kept, some interpolated and some between.
    "pythia_linear": config(seed=18, L=1, H=2, D=32, V=61, B=2, T=57, mode="linear", scale=2.5, original=24),
    "pythia_dynamic": config(seed=19, L=1, H=2, D=32, V=61, B=2, T=57, mode="dynamic", scale=3.0, original=24),
    "pythia_yarn": config(seed=20, L=1, H=2, D=64, V=61, B=2, T=67, mode="yarn", scale=4.0, original=512, base=100.0),
}
TRAINING = config(seed=21, L=2, H=2, D=32, V=97, B=2, T=33)


def tensors(c):
    """In the order of Pythia's weights file, data/FORMATS.md."""
    embedding = (golden.padded(c["V"]), c["C"])
    _, strong, _ = golden.recipes(c["C"])
    return [("embedin", embedding, *strong), *golden.layer_tensors(c), ("embedout", embedding, *strong)]


class Wide:
    """The module torch as transformers' files see it, but that asking for float32 gives float64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@contextlib.contextmanager
def widened():
    for module in (neox, rope_utils):
        module.torch = Wide()
    try:
        yield
    finally:
        for module in (neox, rope_utils):
            module.torch = torch


class ExactRotary(torch.nn.Module):
    """transformers' rotary embedding for sequences of T tokens, in float64 up to the last rounding."""

    def __init__(self, hf, T):
        super().__init__()
        with widened():
            kind = hf.rope_parameters["rope_type"]
            if kind == "default":
                made = neox.GPTNeoXRotaryEmbedding.compute_default_rope_parameters(hf)
            else:
                made = rope_utils.ROPE_INIT_FUNCTIONS[kind](hf, seq_len=T)
        # Neither is a buffer: model.to(dtype) would round it.
        self.frequencies, self.factor = made
        assert self.frequencies.dtype == torch.float64

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


class Model(transformers.GPTNeoXForCausalLM):
    def forward(self, *args, **kwargs):
        with widened() if self.dtype == torch.float64 else contextlib.nullcontext():
            return super().forward(*args, **kwargs)


def model(c, dtype):
    rope = c["rope"]
    parameters = dict(
        rope_type="default" if rope["mode"] == "none" else rope["mode"],
        rope_theta=rope["base"],
        partial_rotary_factor=rope["dims"] * c["H"] / c["C"],
    )
    if rope["mode"] != "none":
        parameters["factor"] = rope["scale"]
    if rope["mode"] == "yarn":
        parameters["original_max_position_embeddings"] = rope["original"]
    hf = transformers.GPTNeoXConfig(
        vocab_size=c["V"],
        hidden_size=c["C"],
        intermediate_size=4 * c["C"],
        num_hidden_layers=c["L"],
        num_attention_heads=c["H"],
        max_position_embeddings=rope["original"],
        hidden_act={"erf": "gelu", "tanh": "gelu_new"}[c["gelu"]],
        layer_norm_eps=1e-5,
        use_parallel_residual=c["parallel"],
        rope_parameters=parameters,
        tie_word_embeddings=False,
        attn_implementation="eager",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = Model(hf).to(dtype)
    assert made.lm_head.weight is not made.gpt_neox.embed_in.weight, "the head is tied to embed_in"
    if dtype == torch.float32:
        compare_angles(c, made.gpt_neox.rotary_emb, ExactRotary(hf, c["T"]))
    made.gpt_neox.rotary_emb = ExactRotary(hf, c["T"])
    return made


def compare_angles(c, theirs, exact):
    """Stops unless transformers' own cosines and sines are the exact ones within the error of float32 angles."""
    x, positions = torch.zeros(1), torch.arange(c["T"])[None]
    for a, b in zip(theirs(x, positions), exact(x, positions)):
        assert a.shape[-1] == c["rope"]["dims"]
        error, allowed = float((a - b).abs().max()), 2.0**-24 * (8 + 4 * c["T"])
        assert error <= allowed, f"transformers' angles are {error} off, more than {allowed}"


FAMILY = golden.Family(
    tensors=tensors,
    model=model,
    whole={
        "embedin": "gpt_neox.embed_in.weight",
        "lnfw": "gpt_neox.final_layer_norm.weight",
        "lnfb": "gpt_neox.final_layer_norm.bias",
        "embedout": "lm_head.weight",
    },
    per_layer={
        "ln1w": ("input_layernorm.weight", False),
        "ln1b": ("input_layernorm.bias", False),
        "qkvw": ("attention.query_key_value.weight", False),
        "qkvb": ("attention.query_key_value.bias", False),
        "attprojw": ("attention.dense.weight", False),
        "attprojb": ("attention.dense.bias", False),
        "ln2w": ("post_attention_layernorm.weight", False),
        "ln2b": ("post_attention_layernorm.bias", False),
        "fcw": ("mlp.dense_h_to_4h.weight", False),
        "fcb": ("mlp.dense_h_to_4h.bias", False),
        "fcprojw": ("mlp.dense_4h_to_h.weight", False),
        "fcprojb": ("mlp.dense_4h_to_h.bias", False),
    },
    layer="gpt_neox.layers.{}",
    padded={"embedin", "embedout"},
    decayed={"embedin", "embedout", "qkvw", "attprojw", "fcw", "fcprojw"},
)

if __name__ == "__main__":
    golden.main("pythia", __doc__, FAMILY, CONFIGS, TRAINING)
