#!/usr/bin/env python3
"""Makes the golden files of test/golden from HuggingFace's GPT2LMHeadModel, the truth that comes from outside.

    python -m venv VENV && VENV/bin/pip install -r dev/requirements-golden.txt
    VENV/bin/python scripts/golden_gpt2.py            # rewrites test/golden/gpt2_*.json

Weights and tokens are a hash of (seed, stream, index) that test/golden.h computes again, so only results are stored,
and of each tensor only a fingerprint: its norm, some entries, and its products with random sign vectors. The truth is
float64; beside it stands the error that PyTorch itself makes in float32 and in bfloat16, the measure for ours.
"""
import argparse
import json
import math
import pathlib

import numpy as np
import torch
import transformers

SAMPLES, PROJECTIONS = 16, 16
# Streams of the hash: 0..15 are the parameter tensors, in the order of `tensors`.
TOKEN_STREAM, SAMPLE_STREAM, SIGN_STREAM = 16, 17, 18

CONFIGS = {
    # Two layers, a ragged T below maxT, a padded vocabulary.
    "gpt2_d32": dict(seed=1, L=2, C=64, H=2, V=97, maxT=40, B=2, T=37),
    # Vp = 256: more padding than one tile, T past one tile of 64.
    "gpt2_d64": dict(seed=2, L=3, C=128, H=2, V=131, maxT=80, B=2, T=71),
    # A head dim that is no power of two, V = Vp, T = maxT.
    "gpt2_d80": dict(seed=3, L=1, C=160, H=2, V=128, maxT=23, B=3, T=23),
}
TRAINING = dict(seed=4, L=2, C=64, H=2, V=97, maxT=40, B=2, T=33)
OPTIMIZER = dict(steps=20, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


def mix(z):
    """The finaliser of splitmix64, on uint64 that wraps."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(seed, stream, n, first=0):
    """n hashes of (seed, stream, first...)."""
    base = mix(mix(np.array([seed], np.uint64)) + np.uint64(stream))
    return mix(base + np.arange(first, first + n, dtype=np.uint64))


def padded(V):
    return (V + 127) // 128 * 128


def tensors(c):
    """(name, shape, mean, bits, step) in llm.c's order: an entry is mean + step·k, k uniform in ±2^(bits−1).

    Few bits and powers of two make every weight exact in bfloat16, so that all precisions start from the same numbers.
    The steps give logits, attention scores and GELU inputs a standard deviation near 1 at these widths.
    """
    L, C = c["L"], c["C"]
    matrix, strong, gain = (0.0, 8, 2.0**-10), (0.0, 8, 2.0**-9), (1.0, 6, 2.0**-7)
    return [
        ("wte", (padded(c["V"]), C), *strong),
        ("wpe", (c["maxT"], C), *matrix),
        ("ln1w", (L, C), *gain),
        ("ln1b", (L, C), *matrix),
        ("qkvw", (L, 3 * C, C), *strong),
        ("qkvb", (L, 3 * C), *matrix),
        ("attprojw", (L, C, C), *matrix),
        ("attprojb", (L, C), *matrix),
        ("ln2w", (L, C), *gain),
        ("ln2b", (L, C), *matrix),
        ("fcw", (L, 4 * C, C), *matrix),
        ("fcb", (L, 4 * C), *matrix),
        ("fcprojw", (L, C, 4 * C), *matrix),
        ("fcprojb", (L, C), *matrix),
        ("lnfw", (C,), *gain),
        ("lnfb", (C,), *matrix),
    ]


def weights(c):
    """{name: float32 array} in llm.c's layout, (out, in); rows of wte from V on are zero."""
    made = {}
    for stream, (name, shape, mean, bits, step) in enumerate(tensors(c)):
        k = hashes(c["seed"], stream, math.prod(shape)).view(np.int64) >> np.int64(64 - bits)
        made[name] = (mean + step * k).astype(np.float32).reshape(shape)
    made["wte"][c["V"] :] = 0
    return made


def batch(c, step=0):
    """tokens and targets (B,T): B rows of T+1 tokens, read at t and t+1."""
    n = c["B"] * (c["T"] + 1)
    rows = (hashes(c["seed"], TOKEN_STREAM, n, step * n) % np.uint64(c["V"])).astype(np.int64)
    rows = torch.from_numpy(rows.reshape(c["B"], c["T"] + 1))
    return rows[:, :-1], rows[:, 1:]


# llm.c's name → (HuggingFace's name, whether its Conv1D keeps the transpose).
PER_LAYER = {
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
}
WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
DECAYED = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}


def build(c, dtype):
    """The HuggingFace model that carries weights(c)."""
    model = transformers.GPT2LMHeadModel(
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
    own = dict(model.transformer.named_parameters())
    made = weights(c)
    with torch.no_grad():
        for name, hf in WHOLE.items():
            value = made[name][: c["V"]] if name == "wte" else made[name]
            own.pop(hf).copy_(torch.from_numpy(value))
        for name, (hf, transposed) in PER_LAYER.items():
            for layer in range(c["L"]):
                value = made[name][layer]
                own.pop(f"h.{layer}.{hf}").copy_(torch.from_numpy(value.T if transposed else value))
    assert not own, f"parameters without a value: {list(own)}"
    assert model.lm_head.weight is model.transformer.wte.weight, "the head is not tied to wte"
    return model


def gradients(c, model):
    """{name: float64 array} of the gradients, in llm.c's layout again."""
    own = dict(model.transformer.named_parameters())

    def gradient(hf):
        return own[hf].grad.double().numpy()

    made = {}
    for name, shape, *_ in tensors(c):
        if name in WHOLE:
            made[name] = np.zeros(shape)
            made[name][: own[WHOLE[name]].shape[0]] = gradient(WHOLE[name])
        else:
            hf, transposed = PER_LAYER[name]
            layers = [gradient(f"h.{layer}.{hf}") for layer in range(c["L"])]
            made[name] = np.stack([g.T if transposed else g for g in layers])
    return made


def loss_of(c, model, step=0):
    """Logits (B,T,V), losses (B·T) and their mean; the softmax is never below float32."""
    tokens, targets = batch(c, step)
    logits = model(tokens).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    return logits, losses, losses.mean()


def results(c, dtype):
    """{name: float64 array} of all that is compared: loss, losses, logits and the gradient of each tensor."""
    model = build(c, dtype)
    logits, losses, loss = loss_of(c, model)
    loss.backward()
    outputs = {"loss": loss, "losses": losses, "logits": logits}
    outputs = {name: value.detach().double().numpy() for name, value in outputs.items()}
    return outputs, gradients(c, model)


def fingerprint(seed, truth, others):
    """What test/golden.h compares a tensor with; `others` are PyTorch's own results in lower precisions."""
    n, flat = truth.size, truth.ravel()
    indices = np.unique(hashes(seed, SAMPLE_STREAM, SAMPLES) % np.uint64(n)).astype(np.int64)
    bits = hashes(seed, SIGN_STREAM, n)
    signs = [1.0 - 2.0 * ((bits >> np.uint64(p)) & np.uint64(1)).astype(np.float64) for p in range(PROJECTIONS)]
    norm = float(np.linalg.norm(flat))
    made = {
        "n": n,
        "norm": norm,
        "projections": [math.fsum(s * flat) for s in signs],
        "samples": [[int(i), float(flat[i])] for i in indices],
    }
    for precision, other in others.items():
        error = other.ravel() - flat
        made[precision] = {
            "error": float(np.linalg.norm(error)) / norm,
            "worst_element": float(np.abs(error).max()) / norm,
        }
    return made


def golden(c):
    truth = results(c, torch.float64)
    lower = {"fp32": results(c, torch.float32), "bf16": results(c, torch.bfloat16)}
    outputs, grads = (
        {
            name: fingerprint(c["seed"], value, {p: r[part][name] for p, r in lower.items()})
            for name, value in truth[part].items()
            if name != "loss"
        }
        for part in (0, 1)
    )
    loss = {"fp64": float(truth[0]["loss"]), **{p: float(r[0]["loss"]) for p, r in lower.items()}}
    return {"loss": loss, **outputs, "gradients": grads}


def train(c, o, dtype):
    """Loss and gradient norm (before clipping) of each step of torch's AdamW, a fresh batch each."""
    model = build(c, dtype)
    decayed = {f"h.{layer}.{hf}" for n, (hf, _) in PER_LAYER.items() if n in DECAYED for layer in range(c["L"])}
    decayed |= {hf for n, hf in WHOLE.items() if n in DECAYED}
    groups = ([], [])
    for name, parameter in model.transformer.named_parameters():
        groups[name in decayed].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": o["weight_decay"]}],
        lr=o["lr"],
        betas=(o["beta1"], o["beta2"]),
        eps=o["eps"],
    )
    losses, norms = [], []
    for step in range(o["steps"]):
        loss = loss_of(c, model, step)[2]
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])))
        losses.append(float(loss.detach()))
        optimizer.step()
    return {"losses": losses, "grad_norms": norms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "test" / "golden", metavar="DIR")
    args = parser.parse_args()
    # One thread: float32 sums then do not depend on the number of cores.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    made_by = f"scripts/golden_gpt2.py with torch {torch.__version__}, transformers {transformers.__version__}"
    files = {name: {"made_by": made_by, "config": c, **golden(c)} for name, c in CONFIGS.items()}
    files["gpt2_training"] = {
        "made_by": made_by,
        "config": TRAINING,
        "optimizer": OPTIMIZER,
        "fp64": train(TRAINING, OPTIMIZER, torch.float64),
        "fp32": train(TRAINING, OPTIMIZER, torch.float32),
    }
    for name, content in files.items():
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(content) + "\n")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
