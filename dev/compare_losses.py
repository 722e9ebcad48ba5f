#!/usr/bin/env python3
"""The largest relative difference between the losses of two runs, step by step; exits 1 if it is beyond the bound.

    dev/compare_losses.py WANT GOT [--bound B]       WANT, GOT: log.jsonl, or a JSON list of losses
"""

import argparse
import json
import math
import sys


def losses(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return json.loads(text)
    lines = (json.loads(line) for line in text.splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def difference(want, got):
    if not want or len(want) != len(got):
        return math.inf
    worst = max(abs(g / w - 1) for w, g in zip(want, got))
    return worst if math.isfinite(worst) else math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("want")
    parser.add_argument("got")
    parser.add_argument("--bound", type=float, default=math.inf)
    args = parser.parse_args()
    worst = difference(losses(args.want), losses(args.got))
    print(f"{worst:.2e}")
    return 0 if worst < math.inf and worst <= args.bound else 1


if __name__ == "__main__":
    sys.exit(main())
