#!/usr/bin/env python3
"""Compares the 8-bit optimizer states with those of bitsandbytes' own CPU optimizers, code for code.

    python scripts/check_bitsandbytes.py [--n N] [--steps S]

By hand, not a test: it needs torch and bitsandbytes (0.50 or later, whose Adam8bit runs on a CPU), which nothing else
here does, and a C++ compiler. Exits 1 if a code differs that should not.

Each step starts from bitsandbytes' state. Its CPU path rounds a value to one of 65,536 even steps of [-1, 1] times
absmax before it looks for the code, so its small codes are far from the nearest (1.5e-5 of absmax is the least v it
knows): its codes must be those of a value within half a step of ours. The same values go through bitsandbytes' own
exact search (what its quantize_blockwise does for float64): there only ties to within rounding may differ, and what our
guard of the sign did, which the CPU path lacks (a tiny negative m becomes code 127). Ours runs with the floor on v off.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

try:
    import bitsandbytes
    import bitsandbytes.functional
    import torch
except ImportError as error:
    print(f"{Path(__file__).name}: error: the Python package {error.name} is missing: pip install {error.name}",
          file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
TIE = 4e-7  # of the terms whose sum the value is: a few roundings of float
HALF_STEP = 1 / 65535  # of bitsandbytes' table, half of 2 / 65535
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def build(folder):
    tool = folder / "optimizer_raw"
    subprocess.run(["g++", "-O3", "-march=native", "-std=c++20", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
                    str(ROOT / "dev/optimizer_raw.cpp"), str(ROOT / "kernels/optimizer.cpp"), "-o", str(tool)],
                   check=True)
    return tool


def our_step(tool, folder, state, grads, t, lion, floor_v=False):
    """One step of ours from `state`: weights, m, v, m_absmax, v_absmax."""
    n, blocks = grads.size, state["m_absmax"].size
    path = folder / "arrays.bin"
    settings = np.array([LR, *BETAS, EPS, DECAY], np.float64)
    head = np.array([n, t, lion, floor_v], np.int64).tobytes() + settings.tobytes()
    names = ("m", "v", "m_absmax", "v_absmax")
    path.write_bytes(head + state["weights"].tobytes() + grads.tobytes() + b"".join(state[k].tobytes() for k in names))
    subprocess.run([str(tool), str(path)], check=True)
    raw, at, made = path.read_bytes(), len(head), {}
    for name, kind, count in (("weights", np.float32, n), ("grads", np.float32, n), ("m", np.uint8, n),
                              ("v", np.uint8, n), ("m_absmax", np.float32, blocks), ("v_absmax", np.float32, blocks)):
        made[name] = np.frombuffer(raw, kind, count, at).copy()
        at += made[name].nbytes
    return made


def their_state(optimizer, p):
    s = optimizer.state[p]
    blocks = -(-p.numel() // 256)
    state = {"weights": p.detach().numpy().copy()}
    state["m"], state["m_absmax"] = s["state1"].numpy().copy(), s["absmax1"].numpy().copy()
    state["v"] = s["state2"].numpy().copy() if "state2" in s else np.zeros(p.numel(), np.uint8)
    state["v_absmax"] = s["absmax2"].numpy().copy() if "absmax2" in s else np.zeros(blocks, np.float32)
    return state


def compare(book, ours, exact, theirs, value, terms):
    """Counts of codes: ties and guarded ones among those that differ from the exact ones, wrong ones, ones that differ
    from theirs, and those where theirs is no code within half a step. value and terms, the sum of its parts' sizes, are
    in units of absmax."""
    at = np.flatnonzero(ours != exact)
    a, b, x = ours[at].astype(int), exact[at].astype(int), value[at]
    border = (book[a].astype(np.float64) + book[b]) / 2
    guard = (a == 126) & (b == 127) & (x < 0) & (book[0] < 0)
    tie = ~guard & (np.abs(a - b) == 1) & (np.abs(x - border) <= TIE * terms[at])
    middles = (book[1:].astype(np.float64) + book[:-1]) / 2
    reach = HALF_STEP * 1.01
    low, high = np.searchsorted(middles, value - reach), np.searchsorted(middles, value + reach)
    return np.array([tie.sum(), guard.sum(), (~tie & ~guard).sum(), (ours != theirs).sum(),
                     ((theirs < low) | (theirs > high)).sum()])


def check(name, lion, n, steps, tool, folder):
    books = [bitsandbytes.functional.create_dynamic_map(signed=s).numpy() for s in (True, False)]
    rng = np.random.default_rng(5)
    p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(n).astype(np.float32)))
    kind = bitsandbytes.optim.Lion8bit if lion else bitsandbytes.optim.AdamW8bit
    settings = dict(lr=LR, betas=BETAS, weight_decay=DECAY)
    optimizer = kind([p], **settings) if lion else kind([p], eps=EPS, **settings)
    sizes = np.exp(2 * rng.standard_normal(n)).astype(np.float32)  # gradients of very different sizes in each block

    before = {"weights": p.detach().numpy().copy(), "m": np.zeros(n, np.uint8), "v": np.zeros(n, np.uint8)}
    before["m_absmax"] = before["v_absmax"] = np.zeros(-(-n // 256), np.float32)
    found, codes, absmax_off, weights_off, block = np.zeros(5, int), 0, 0.0, 0.0, np.arange(n) // 256
    for t in range(1, steps + 1):
        grads = (sizes * rng.standard_normal(n)).astype(np.float32)
        ours = our_step(tool, folder, before, grads, t, lion)
        m = books[0][before["m"]] * before["m_absmax"][block]
        parts = m * np.float32(BETAS[lion]), grads * np.float32(1 - BETAS[lion])
        m, m_terms = parts[0] + parts[1], np.abs(parts[0]) + np.abs(parts[1])
        v = books[1][before["v"]] * before["v_absmax"][block] * np.float32(BETAS[1])
        v = v + grads**2 * np.float32(1 - BETAS[1])
        p.grad = torch.from_numpy(grads)
        optimizer.step()
        theirs = their_state(optimizer, p)
        for book, which, value, terms in ((books[0], "m", m, m_terms), (books[1], "v", v, v))[: 1 if lion else 2]:
            exact, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.from_numpy(value).double(),
                                                                      torch.from_numpy(book), 256)
            units = absmax.numpy()[block]
            found += compare(book, ours[which], exact.numpy(), theirs[which], value / units, terms / units)
            codes += n
            absmax_off = np.maximum(absmax_off, float(np.abs(ours[which + "_absmax"] / theirs[which + "_absmax"] - 1).max()))
        size = np.abs(theirs["weights"]) + np.abs(before["weights"])
        weights_off = np.maximum(weights_off, float((np.abs(ours["weights"] - theirs["weights"]) / size).max()))
        before = theirs
    print(f"{name}: {steps} steps of {n} elements, {codes} codes\n"
          f"  against the exact search: {found[0]} ties, {found[1]} by the guard of the sign, {found[2]} wrong\n"
          f"  against the CPU optimizer: {found[3]} differ, {found[4]} by more than its table's half step\n"
          f"  absmax off by {absmax_off:.1e}, weights by {weights_off:.1e} of their size at most")
    return found[2] == 0 and found[4] == 0 and absmax_off < 1e-5 and weights_off < 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256 * 400 + 77, help="elements, at least 4096")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tool = build(folder)
        good = [check(name, lion, args.n, args.steps, tool, folder) for name, lion in (("AdamW", False), ("Lion", True))]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
