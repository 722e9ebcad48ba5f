"""A HuggingFace directory: config.json, and model.safetensors in one file or in shards with an index.

The safetensors library judges every file that is read (header, offsets, length). The bytes are read and written here:
for numpy the library knows no bf16, and it writes only what is in memory as a whole.
"""

import json
import math
import os
import re
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from tensor_stream import Stored
from weights_file import ITEM_BYTES, InputError, open_input

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SAFE_NAME = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DTYPE = {safe: dtype for dtype, safe in SAFE_NAME.items()}
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
# Names that an export has, and no others.
OURS = re.compile(r"(generation_|tokenizer_)?config\.json|tokenizer\.json|model\.safetensors(\.index\.json)?|model-\d{5,}-of-\d{5,}\.safetensors")
DOWNLOAD = "a model of HuggingFace's hub comes by scripts/download_hf.py MODEL DIR, then name DIR"
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


def read_json(path: str) -> dict[str, Any]:
    try:
        with open_input(path, "r", encoding="utf-8") as file:
            made = json.load(file, object_pairs_hook=without_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(made, dict):
        raise InputError(f"{path}: not a JSON object")
    return made


class Found(NamedTuple):
    """A tensor of the directory; its dtype may be one that we do not take."""

    stored: Stored
    safe_dtype: str


class Directory:
    """Use as a context: the files of the tensors are open inside."""

    def __init__(self, folder: str):
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder; {DOWNLOAD}")
        self.folder = folder
        self.config = read_json(self.path(CONFIG))
        self.handles: list[int] = []

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def __enter__(self):
        try:
            self.tensors = self.find()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            os.close(handle)
        self.handles.clear()

    def find(self) -> dict[str, Found]:
        if os.path.exists(self.path(SINGLE)):  # transformers prefers it too, should an index lie beside it
            return self.open(SINGLE)
        if not os.path.exists(self.path(INDEX)):
            other = next((name for name in OTHER_WEIGHTS if os.path.exists(self.path(name))), None)
            raise InputError(
                f"{self.folder}: neither {SINGLE} nor {INDEX}"
                + (f"; {other} is of a kind that is not read, save the model as safetensors" if other else "")
            )
        index = self.path(INDEX)
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise InputError(f"{index}: no weight_map")
        for tensor, name in where.items():
            if not isinstance(name, str) or not name or os.path.basename(name) != name:
                raise InputError(f"{index}: {tensor} is in {name!r}, which is no file's name")
        found: dict[str, Found] = {}
        for name in sorted(set(where.values())):
            shard = self.open(name)
            for tensor in shard:
                if where.get(tensor) != name:
                    raise InputError(f"{self.path(name)}: holds {tensor}, which {INDEX} does not place there")
            found |= shard
        for tensor, name in where.items():
            if tensor not in found:
                raise InputError(f"{self.path(name)}: {tensor} is missing, which {INDEX} places there")
        return found

    def open(self, name: str) -> dict[str, Found]:
        path = self.path(name)
        try:
            with open_input(path) as file, safe_open(path, framework="np"):
                handle = os.dup(file.fileno())
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from error
        self.handles.append(handle)
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        try:
            header = json.loads(os.pread(handle, length, 8), object_pairs_hook=without_duplicates)
        except ValueError as error:
            raise InputError(f"{path}: its header is not JSON ({error})") from error
        found = {}
        for tensor, about in header.items():
            if tensor != "__metadata__":
                offset = 8 + length + about["data_offsets"][0]
                dtype = DTYPE.get(about["dtype"], "")
                found[tensor] = Found(Stored(handle, path, offset, dtype, tuple(about["shape"])), about["dtype"])
        return found


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def split(entries: Iterable[Entry], dtype: str, shard_bytes: int) -> list[list[Entry]]:
    """In their order, no shard above the size unless a single tensor is."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = math.prod(entry.shape) * ITEM_BYTES[dtype]
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def write_tensors(file: BinaryIO, entries: list[Entry], dtype: str):
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it older transformers refuse the file
    end = 0
    for entry in entries:
        start, end = end, end + math.prod(entry.shape) * ITEM_BYTES[dtype]
        header[entry.name] = {"dtype": SAFE_NAME[dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        for block in entry.blocks():
            file.write(block.data)
    if file.tell() != 8 + len(text) + end:
        raise AssertionError(f"{file.name}: {file.tell():,} bytes were written, {8 + len(text) + end:,} announced")


def write(create: Callable[[str], Any], config: dict[str, Any], entries: list[Entry], dtype: str, shard_bytes: int):
    """The whole directory; `create` opens a file of a name for writing, as a context."""
    shards = split(entries, dtype, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, part in zip(names, shards):
        with create(name) as file:
            write_tensors(file, part, dtype)
    if len(shards) > 1:
        total = sum(math.prod(entry.shape) * ITEM_BYTES[dtype] for entry in entries)
        where = {entry.name: name for name, part in zip(names, shards) for entry in part}
        with create(INDEX) as file:
            file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode() + b"\n")
    with create(CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
