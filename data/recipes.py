"""Known corpora: where they are, how their files are read, which tokenizer belongs to them.

Downloads land in OUT/download, are continued where they stopped, and are kept for the next run. Files whose names carry
a hash are found through the dataset's listing, so that no address here goes stale with them.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable

from common import InputError, RunError

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")  # a mirror, as for HuggingFace's own programs
GPT2_TOKENIZER = "openai-community/gpt2/resolve/main/tokenizer.json"
NEOX_TOKENIZER = "EleutherAI/pythia-1.4b-deduped/resolve/main/tokenizer.json"
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 4
AT_ONCE = 8  # downloads; PG-19 is thousands of small files


@dataclass(frozen=True)
class Recipe:
    about: str
    urls: Callable[[int], list[str]]  # the first so many files, 0: all
    files: int  # how many to take unless told
    tokenizer: str  # path on the hub
    val_fraction: float
    split_on: str = ""


def fetch(url: str, start: int = 0):
    request = urllib.request.Request(url, headers={"User-Agent": "longhand-prepare"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner) or type(error).__name__


def read(url: str) -> tuple[bytes, str]:
    """A small answer and its Link header."""
    try:
        with fetch(url) as answer:
            return answer.read(), answer.headers.get("Link", "")
    except (OSError, urllib.error.URLError) as error:
        raise RunError(f"cannot reach {url} ({reason(error)}); this recipe needs the network") from error


def listed(dataset: str, folder: str, suffix: str) -> Callable[[int], list[str]]:
    """The files of a folder of a dataset on the hub, in the order of their names."""

    def urls(count: int) -> list[str]:
        found, page = [], f"{HUB}/api/datasets/{dataset}/tree/main/{folder}"
        while page and not (count and len(found) >= count):
            body, link = read(page)
            try:
                found += [entry["path"] for entry in json.loads(body) if entry["path"].endswith(suffix)]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{page}: the answer is not a file listing") from error
            following = re.search(r'<([^>]+)>;\s*rel="next"', link)
            page = following.group(1) if following else ""
        return [f"{HUB}/datasets/{dataset}/resolve/main/{path}" for path in sorted(found)]

    return urls


def fixed(*urls: str) -> Callable[[int], list[str]]:
    return lambda count: list(urls)


def pg19(count: int) -> list[str]:
    body, _ = read(f"{HUB}/datasets/deepmind/pg19/resolve/main/data/train_files.txt")
    return [f"https://storage.googleapis.com/deepmind-gutenberg/{name}" for name in body.decode().split()]


RECIPES = {
    "tinyshakespeare": Recipe(
        "Shakespeare's plays, 1.1 MB, one file",
        fixed("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
        1,
        GPT2_TOKENIZER,
        0.1,
    ),
    "tinystories": Recipe(
        "short stories by GPT-4, 2.2 GB, one file",
        fixed(f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"),
        1,
        GPT2_TOKENIZER,
        0.01,
        split_on="<|endoftext|>",
    ),
    "fineweb-edu": Recipe(
        "educational web pages, the 10-billion-token sample, parquet files of about 2 GB",
        listed("HuggingFaceFW/fineweb-edu", "sample/10BT", ".parquet"),
        1,
        GPT2_TOKENIZER,
        0.005,
    ),
    "pile": Recipe(
        "the deduplicated Pile, 1,650 parquet files of about 270 MB",
        listed("EleutherAI/the_pile_deduplicated", "data", ".parquet"),
        1,
        NEOX_TOKENIZER,
        0.005,
    ),
    "pg19": Recipe("books from before 1919, 28,602 text files of about 400 KB", pg19, 500, GPT2_TOKENIZER, 0.01),
}


def download(url: str, path: str):
    """url → path, whole or not at all; a .part file is continued."""
    if os.path.exists(path):
        return
    part = path + ".part"
    for attempt in range(1, ATTEMPTS + 1):
        start = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            with fetch(url, start) as answer:
                continued = answer.status == 206
                expected = answer.headers.get("Content-Length")
                total = int(expected) + (start if continued else 0) if expected else None
                with open(part, "ab" if continued else "wb") as file:
                    while data := answer.read(1 << 20):
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            if total is None or os.path.getsize(part) == total:
                os.replace(part, path)
                return
            error: Exception = OSError(f"{os.path.getsize(part):,} of {total:,} bytes arrived")
        except urllib.error.HTTPError as caught:
            error = caught
            if caught.code == 416:  # the part is no beginning of this file
                os.remove(part)
            elif caught.code < 500 and caught.code != 429:
                break
        except (OSError, ValueError) as caught:
            error = caught
            if isinstance(caught, urllib.error.URLError) and start == 0:
                break  # no route or no such host: waiting does not help
        if attempt < ATTEMPTS:
            time.sleep(2**attempt)
    raise RunError(
        f"cannot download {url} ({reason(error)}); this recipe needs the network, "
        "and continues where it stopped when run again"
    )


def run(name: str, folder: str, count: int, need_tokenizer: bool, say: Callable[[str], None]) -> tuple[list[str], str]:
    """Downloads a recipe's files to `folder`: (their paths, the path of its tokenizer.json or "")."""
    recipe = RECIPES[name]
    count = recipe.files if count < 0 else count
    urls = recipe.urls(count)
    urls = urls[:count] if count else urls
    if not urls:
        raise RunError(f"recipe {name}: the listing names no files")
    if any(url.endswith(".parquet") for url in urls):
        try:
            import pyarrow  # noqa: F401 - asked for before gigabytes are fetched
        except ImportError as error:
            raise InputError(
                f"recipe {name} reads parquet, which needs pyarrow; install it with: pip install pyarrow"
            ) from error
    os.makedirs(folder, exist_ok=True)
    tokenizer = ""
    if need_tokenizer:
        tokenizer = os.path.join(folder, recipe.tokenizer.split("/")[1] + "-tokenizer.json")
        download(f"{HUB}/{recipe.tokenizer}", tokenizer)
    paths = [os.path.join(folder, url.rsplit("/", 1)[1]) for url in urls]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            waiting = [pool.submit(download, url, path) for url, path in zip(urls, paths)]
            for number, (future, path) in enumerate(zip(waiting, paths), 1):
                future.result()
                if len(paths) < 20 or number % 100 == 0 or number == len(paths):
                    say(f"{path}: {os.path.getsize(path):,} bytes (file {number:,} of {len(paths):,})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return paths, tokenizer
