#!/usr/bin/env python3
"""Downloads a model from HuggingFace's hub: config.json, tokenizer.json and its safetensors, whole or in shards.

    scripts/download_hf.py openai-community/gpt2 models/gpt2

What is there already is kept if it has the hash that the hub names, else refused: a folder holds one model. An
interrupted file is continued. Exit codes: 0 done, 1 the hub or the network failed, 2 bad options or a folder that holds
something else.
"""

import argparse
import glob
import hashlib
import json
import os
import sys
import urllib.parse
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data"))
import recipes  # noqa: E402
from common import InputError, RunError  # noqa: E402

INDEX = "model.safetensors.index.json"


class File(NamedTuple):
    """A file of the hub. Large ones are known by their SHA-256, others by git's name for a blob."""

    size: int
    sha256: str
    blob: str

    def is_at(self, path: str) -> bool:
        if os.path.getsize(path) != self.size:
            return False
        hashed = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                hashed.update(data)
        return hashed.hexdigest() == (self.sha256 or self.blob)


def files_of(model: str) -> dict[str, File]:
    """The files in the top folder of a model."""
    page = f"{recipes.HUB}/api/models/{urllib.parse.quote(model)}/tree/main"
    made = {}
    try:
        for entry in json.loads(recipes.read(page)[0]):
            if entry["type"] == "file":
                sha256 = (entry.get("lfs") or {}).get("oid", "")
                made[entry["path"]] = File(int(entry["size"]), str(sha256), str(entry["oid"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{page}: the answer is not a file listing") from error
    return made


def fetch(model: str, name: str, file: File, folder: str) -> str:
    """The path of the file, which is there as the hub has it."""
    path = os.path.join(folder, name)
    if os.path.exists(path):
        if not file.is_at(path):
            raise InputError(f"{path}: is there and is not {model}'s {name}; remove it, or choose another folder")
        return path
    # The bytes that came so far are named after the whole, so that no other file is continued with them.
    arriving = f"{path}.{(file.sha256 or file.blob)[:16]}"
    for other in glob.glob(glob.escape(path) + ".*"):
        if not other.startswith(arriving) and other.endswith(".part"):
            os.remove(other)
    recipes.download(f"{recipes.HUB}/{model}/resolve/main/{name}", arriving)
    if not file.is_at(arriving):
        os.remove(arriving)
        raise RunError(f"{path}: what arrived has not the hash that the hub names; run again")
    os.replace(arriving, path)
    return path


def wanted(model: str, there: dict[str, File], folder: str) -> list[str]:
    names = ["config.json", "tokenizer.json"]
    if INDEX in there:
        path = fetch(model, INDEX, there[INDEX], folder)
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
        there = files_of(args.model)
        for name in wanted(args.model, there, args.folder):
            path = fetch(args.model, name, there[name], args.folder)
            print(f"{path}: {os.path.getsize(path):,} bytes", flush=True)
        return 0
    except InputError as error:
        code, message = 2, str(error)
    except (RunError, OSError) as error:
        code, message = 1, str(error)
    print(f"download_hf.py: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
