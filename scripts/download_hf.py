#!/usr/bin/env python3
"""Downloads a model from HuggingFace's hub: config.json, tokenizer.json and its safetensors, whole or in shards.

    scripts/download_hf.py openai-community/gpt2 models/gpt2

What is there already is kept, and an interrupted file is continued. Exit codes: 0 done, 1 the hub or the network
failed, 2 bad options.
"""

import argparse
import json
import os
import sys
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data"))
import recipes  # noqa: E402
from common import RunError  # noqa: E402

INDEX = "model.safetensors.index.json"


def files_of(model: str) -> list[str]:
    """Names of the files in the top folder of a model."""
    page = f"{recipes.HUB}/api/models/{urllib.parse.quote(model)}/tree/main"
    try:
        return [entry["path"] for entry in json.loads(recipes.read(page)[0]) if entry["type"] == "file"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{page}: the answer is not a file listing") from error


def wanted(model: str, there: list[str], folder: str) -> list[str]:
    names = ["config.json", "tokenizer.json"]
    if INDEX in there:
        path = os.path.join(folder, INDEX)
        recipes.download(f"{recipes.HUB}/{model}/resolve/main/{INDEX}", path)
        try:
            with open(path, encoding="utf-8") as file:
                names += sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: not an index of safetensors") from error
    else:
        names.append("model.safetensors")
    missing = [name for name in names if name not in there]
    if missing:
        raise RunError(f"{model} has no {', '.join(missing)}; its files are: {', '.join(sorted(there))}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="its name on the hub, such as EleutherAI/pythia-1.4b-deduped")
    parser.add_argument("folder", metavar="DIR", help="where to; made if it is not there")
    args = parser.parse_args()
    try:
        os.makedirs(args.folder, exist_ok=True)
        for name in wanted(args.model, files_of(args.model), args.folder):
            path = os.path.join(args.folder, name)
            recipes.download(f"{recipes.HUB}/{args.model}/resolve/main/{name}", path)
            print(f"{path}: {os.path.getsize(path):,} bytes", flush=True)
    except (RunError, OSError) as error:
        print(f"download_hf.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
