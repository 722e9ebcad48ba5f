#!/usr/bin/env python3
"""Makes the golden files of test/golden from HuggingFace's GPT2LMHeadModel, the truth that comes from outside.

    python -m venv VENV && VENV/bin/pip install -r dev/requirements-golden.txt
    VENV/bin/python scripts/golden_gpt2.py            # rewrites test/golden/gpt2_*.json

scripts/golden.py says what a golden file holds.
"""
import golden_packages  # noqa: F401
import transformers

import golden

CONFIGS = {
    # Two layers, a ragged T below maxT, a padded vocabulary.
    "gpt2_d32": dict(seed=1, L=2, C=64, H=2, V=97, maxT=40, B=2, T=37),
    # Vp = 256: more padding than one tile, T past one tile of 64.
    "gpt2_d64": dict(seed=2, L=3, C=128, H=2, V=131, maxT=80, B=2, T=71),
    # A head dim that is no power of two, V = Vp, T = maxT.
    "gpt2_d80": dict(seed=3, L=1, C=160, H=2, V=128, maxT=23, B=3, T=23),
}
TRAINING = dict(seed=4, L=2, C=64, H=2, V=97, maxT=40, B=2, T=33)


def tensors(c):
    """In llm.c's order."""
    matrix, strong, _ = golden.recipes(c["C"])
    return [
        ("wte", (golden.padded(c["V"]), c["C"]), *strong),
        ("wpe", (c["maxT"], c["C"]), *matrix),
        *golden.layer_tensors(c),
    ]


def model(c, dtype):
    made = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c["V"],
            n_positions=c["maxT"],
            n_embd=c["C"],
            n_layer=c["L"],
            n_head=c["H"],
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(dtype)
    assert made.lm_head.weight is made.transformer.wte.weight, "the head is not tied to wte"
    return made


FAMILY = golden.Family(
    tensors=tensors,
    model=model,
    whole={
        "wte": "transformer.wte.weight",
        "wpe": "transformer.wpe.weight",
        "lnfw": "transformer.ln_f.weight",
        "lnfb": "transformer.ln_f.bias",
    },
    per_layer={
        "ln1w": ("ln_1.weight", False),
        "ln1b": ("ln_1.bias", False),
        "qkvw": ("attn.c_attn.weight", True),
        "qkvb": ("attn.c_attn.bias", False),
        "attprojw": ("attn.c_proj.weight", True),
        "attprojb": ("attn.c_proj.bias", False),
        "ln2w": ("ln_2.weight", False),
        "ln2b": ("ln_2.bias", False),
        "fcw": ("mlp.c_fc.weight", True),
        "fcb": ("mlp.c_fc.bias", False),
        "fcprojw": ("mlp.c_proj.weight", True),
        "fcprojb": ("mlp.c_proj.bias", False),
    },
    layer="transformer.h.{}",
    padded={"wte"},
    decayed={"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"},
)

if __name__ == "__main__":
    golden.main("gpt2", __doc__, FAMILY, CONFIGS, TRAINING)
