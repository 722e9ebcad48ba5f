"""What the makers of golden files share: weights and tokens from a hash, fingerprints of results, and the runs of a
HuggingFace model that give them. A family of models (golden_gpt2.py, golden_pythia.py) is its tensors and its model.

Weights and tokens are a hash of (seed, stream, index) that test/golden.h computes again, so only results are stored,
and of each tensor only a fingerprint: its norm, some entries, and its products with random sign vectors. The truth is
float64; beside it stands the error that PyTorch itself makes in float32 and in bfloat16, the measure for ours.
"""
import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import golden_packages  # noqa: F401
import numpy as np
import torch
import transformers

SAMPLES, PROJECTIONS = 16, 16
# Streams of the hash: 0..15 are the parameter tensors, in the order of `tensors`.
TOKEN_STREAM, SAMPLE_STREAM, SIGN_STREAM = 16, 17, 18

OPTIMIZER = dict(steps=20, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


@dataclasses.dataclass
class Family:
    # config → (name, shape, mean, bits, step) of each tensor, in the order of the weights file: an entry is
    # mean + step·k, k uniform in ±2^(bits−1).
    tensors: Callable
    # (config, dtype) → the HuggingFace model, whatever its weights
    model: Callable
    # our name → HuggingFace's, for tensors that are there once
    whole: dict
    # our name → (HuggingFace's within a layer, whether its Conv1D keeps the transpose)
    per_layer: dict
    # HuggingFace's name of a layer, with {} for its number
    layer: str
    # rows from V on are zero here, and HuggingFace has none
    padded: set
    decayed: set


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


def recipes(C):
    """(mean, bits, step) of a matrix or bias, of a matrix with larger entries, and of a LayerNorm gain.

    Few bits and powers of two make every weight exact in bfloat16, so that all precisions start from the same numbers.
    The steps give logits, attention scores and GELU inputs a standard deviation near 1 at the width C.
    """
    return (0.0, 8, 2.0**-10), (0.0, 8, 2.0**-9 if C < 256 else 2.0**-10), (1.0, 6, 2.0**-7)


def layer_tensors(c):
    """The tensors that a GPT-2 and a Pythia have in each layer, and in the same order."""
    L, C = c["L"], c["C"]
    matrix, strong, gain = recipes(C)
    return [
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


def weights(family, c):
    """{name: float32 array} in our layout, (out, in)."""
    made = {}
    for stream, (name, shape, mean, bits, step) in enumerate(family.tensors(c)):
        k = hashes(c["seed"], stream, math.prod(shape)).view(np.int64) >> np.int64(64 - bits)
        made[name] = (mean + step * k).astype(np.float32).reshape(shape)
    for name in family.padded:
        made[name][c["V"] :] = 0
    return made


def batch(c, step=0):
    """tokens and targets (B,T): B rows of T+1 tokens, read at t and t+1."""
    n = c["B"] * (c["T"] + 1)
    rows = (hashes(c["seed"], TOKEN_STREAM, n, step * n) % np.uint64(c["V"])).astype(np.int64)
    rows = torch.from_numpy(rows.reshape(c["B"], c["T"] + 1))
    return rows[:, :-1], rows[:, 1:]


def build(family, c, dtype):
    """The HuggingFace model that carries weights(family, c)."""
    model = family.model(c, dtype)
    own = dict(model.named_parameters())
    made = weights(family, c)
    with torch.no_grad():
        for name, hf in family.whole.items():
            value = made[name][: c["V"]] if name in family.padded else made[name]
            own.pop(hf).copy_(torch.from_numpy(value))
        for name, (hf, transposed) in family.per_layer.items():
            for layer in range(c["L"]):
                value = made[name][layer]
                own.pop(f"{family.layer.format(layer)}.{hf}").copy_(torch.from_numpy(value.T if transposed else value))
    assert not own, f"parameters without a value: {list(own)}"
    return model


def gradients(family, c, model):
    """{name: float64 array} of the gradients, in our layout again."""
    own = dict(model.named_parameters())

    def gradient(hf):
        return own[hf].grad.double().numpy()

    made = {}
    for name, shape, *_ in family.tensors(c):
        if name in family.whole:
            hf = family.whole[name]
            made[name] = np.zeros(shape)
            made[name][: own[hf].shape[0]] = gradient(hf)
        else:
            hf, transposed = family.per_layer[name]
            layers = [gradient(f"{family.layer.format(layer)}.{hf}") for layer in range(c["L"])]
            made[name] = np.stack([g.T if transposed else g for g in layers])
    return made


def loss_of(c, model, step=0):
    """Logits (B,T,V), losses (B·T) and their mean; the softmax is never below float32."""
    tokens, targets = batch(c, step)
    logits = model(tokens).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    return logits, losses, losses.mean()


def results(family, c, dtype):
    """{name: float64 array} of all that is compared: loss, losses, logits and the gradient of each tensor."""
    model = build(family, c, dtype)
    logits, losses, loss = loss_of(c, model)
    loss.backward()
    outputs = {"loss": loss, "losses": losses, "logits": logits}
    outputs = {name: value.detach().double().numpy() for name, value in outputs.items()}
    return outputs, gradients(family, c, model)


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


def golden(family, c):
    truth = results(family, c, torch.float64)
    lower = {"fp32": results(family, c, torch.float32), "bf16": results(family, c, torch.bfloat16)}
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


def train(family, c, o, dtype):
    """Loss and gradient norm (before clipping) of each step of torch's AdamW, a fresh batch each."""
    model = build(family, c, dtype)
    decayed = {f"{family.layer.format(layer)}.{hf}"
               for n, (hf, _) in family.per_layer.items() if n in family.decayed for layer in range(c["L"])}
    decayed |= {hf for n, hf in family.whole.items() if n in family.decayed}
    groups = ([], [])
    for name, parameter in model.named_parameters():
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


def main(name, doc, family, configs, training):
    """The command line of a family's script: test/golden/*.json of `configs`, and NAME_training.json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "test" / "golden", metavar="DIR")
    args = parser.parse_args()
    # One thread: float32 sums then do not depend on the number of cores.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    made_by = f"scripts/golden_{name}.py with torch {torch.__version__}, transformers {transformers.__version__}"

    def write(file, content):
        path = args.out / f"{file}.json"
        path.write_text(json.dumps({"made_by": made_by, **content}) + "\n")
        print(f"{path}: {path.stat().st_size} bytes", flush=True)

    for file, c in configs.items():
        write(file, {"config": c, **golden(family, c)})
    dtypes = {"fp64": torch.float64, "fp32": torch.float32}
    curves = {p: train(family, training, OPTIMIZER, dtype) for p, dtype in dtypes.items()}
    write(f"{name}_training", {"config": training, "optimizer": OPTIMIZER, **curves})
