#!/usr/bin/env python3
"""Draws a run's training and validation loss against the tokens seen.

scripts/plot_loss.py demo/run -o loss.png
"""

import argparse
import json
import os
import sys
from typing import Optional

LARGEST = 1e39  # above every float32; what is larger nobody measured, and it cannot be drawn
Curve = tuple[list[float], list[float]]  # tokens, losses


class Refused(Exception):
    """One line for the user; exit code 2."""


def read_log(path: str) -> tuple[Curve, Curve]:
    """Training and validation curves. A line cut short by a crash or still being written is passed over."""
    curves: dict[str, Curve] = {"step": ([], []), "val": ([], [])}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    event = json.loads(line)
                    kind, tokens, loss = event["event"], float(event["tokens"]), float(event["loss"])
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    continue
                if kind in ("step", "val") and 0 <= tokens <= LARGEST and abs(loss) <= LARGEST:
                    curves[kind][0].append(tokens)
                    curves[kind][1].append(loss)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from error
    if not curves["step"][0] and not curves["val"][0]:
        raise Refused(f"{path}: no losses in it yet")
    return curves["step"], curves["val"]


def smooth(losses: list[float]) -> list[float]:
    """Mean over up to a fortieth of the run. At the start, where the loss falls steeply, the window shrinks to stay
    centred; at the end it only loses its future half, so that the last figure is a mean too."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    half = len(losses) // 80
    smoothed = []
    for i in range(len(losses)):
        first = i - min(half, i)
        last = min(i + min(half, i), len(losses) - 1)
        smoothed.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return smoothed


def unit(most: float) -> tuple[float, str]:
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= scale:
            return scale, f"tokens ({name})"
    return 1.0, "tokens"


def draw(train: Curve, val: Curve, title: str, path: str):
    try:
        import matplotlib
    except ImportError as error:
        raise Refused(
            "the Python package matplotlib is missing; install it with: pip install -r requirements.txt"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale, label = unit(max(train[0] + val[0]))
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    if train[0]:
        x = [tokens / scale for tokens in train[0]]
        axes.plot(x, train[1], color="tab:blue", alpha=0.25, linewidth=0.8)
        mean = smooth(train[1])
        axes.plot(x, mean, color="tab:blue", linewidth=1.6, label=f"training (last {mean[-1]:.3f})")
    if val[0]:
        best = min(val[1])
        axes.plot(
            [tokens / scale for tokens in val[0]],
            val[1],
            color="tab:orange",
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=f"validation (last {val[1][-1]:.3f}, best {best:.3f})",
        )
    axes.set(xlabel=label, ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    beside = f"{path}.partial"
    try:
        figure.savefig(beside, format=os.path.splitext(path)[1][1:].lower() or "png")
        os.replace(beside, path)
    except ValueError as error:  # a format that matplotlib does not know
        raise Refused(f"{path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise Refused(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)
        if os.path.exists(beside):
            os.remove(beside)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message} (--help lists the options)")


def main(argv: Optional[list[str]] = None) -> int:
    parser = OneLineParser(
        prog="plot_loss.py", description="Draws a run's training and validation loss against tokens."
    )
    parser.add_argument("run", metavar="RUN", help="run folder with a log.jsonl, or the log itself")
    parser.add_argument(
        "-o", "--output", default="loss.png", metavar="FILE", help="picture to write: .png, .svg or .pdf (loss.png)"
    )
    parser.add_argument("--title", help="the picture's title (the run's name)")
    try:
        args = parser.parse_args(argv)
        log = args.run
        if os.path.isdir(args.run):
            log = os.path.join(args.run, "log.jsonl")
            if not os.path.isfile(log):  # a pipe of that name would be waited for
                raise Refused(f"{log}: no such file")
        train, val = read_log(log)
        name = os.path.basename(os.path.normpath(os.path.abspath(args.run)))
        draw(train, val, args.title or name, args.output)
    except Refused as refused:
        print(f"plot_loss.py: error: {' '.join(str(refused).split())}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
