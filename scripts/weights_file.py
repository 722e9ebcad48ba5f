"""Weights files (data/FORMATS.md): their headers, the order of their tensors with HuggingFace's names beside them, and
where a run's folder keeps its newest one."""

import json
import math
import os
import re
import struct
import sys
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple, Optional

import xxhash

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data"))
from common import HEADER_BYTES, MAX_VOCAB, InputError, open_input  # noqa: E402

GPT2, NEOX = "gpt2", "gpt_neox"  # as config.json's model_type says it
MAGIC = {GPT2: 20240326, NEOX: 20261124}
VERSION = {"fp32": 3, "bf16": 5, "fp16": 6}
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MODES = ("none", "linear", "ntk", "dynamic", "yarn")
GELU_TANH, GELU_ERF = 1, 2
VOCAB_MULTIPLE = 128  # rows of a token table are padded to it
INT_MAX = 2**31 - 1
MOST_BASE, MOST_SCALE = 1e30, 1e12  # rotary, the trainer's limits too (runtime/model/rope.cpp)
WORDS = struct.Struct("<14i2d")  # all that a header says; the rest is zero
HEAD_DIMS = (32, 64, 80, 128, 256)  # that attention has kernels for
STEP = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.old")  # .old: whole, and about to be replaced (runtime/files/checkpoint.h)


class Part(NamedTuple):
    """A tensor of one layer, or one that belongs to none."""

    name: str  # as data/FORMATS.md calls it, with its layer
    hf: str  # HuggingFace's name, without the prefix that not every file has
    shape: tuple[int, ...]  # in the file; (out, in)
    hf_shape: tuple[int, ...]
    transposed: bool = False  # HuggingFace keeps (in, out)
    padded: bool = False  # HuggingFace has the first V rows, and the others are zero
    tied: bool = False  # row p of HuggingFace's is row p mod maxT of ours

    def count(self) -> int:
        return math.prod(self.shape)


@dataclass
class Header:
    """In the names of data/FORMATS.md; what a family does not have keeps its default."""

    family: str
    dtype: str
    maxT: int
    V: int
    L: int
    H: int
    C: int
    Vp: int
    tied: int = 0
    tied_context: int = 0
    dims: int = 0
    parallel: int = 1
    gelu: int = GELU_ERF
    mode: int = 0
    softmax_temperature: int = 0
    original: int = 1
    base: float = 10000.0
    scale: float = 1.0

    def pack(self) -> bytes:
        common = (MAGIC[self.family], VERSION[self.dtype], self.maxT, self.V, self.L, self.H, self.C, self.Vp)
        if self.family == GPT2:
            packed = WORDS.pack(*common, self.tied, self.tied_context, 0, 0, 0, 0, 0.0, 0.0)
        else:
            own = (self.dims, self.parallel, self.gelu, self.mode, self.softmax_temperature, self.original)
            packed = WORDS.pack(*common, *own, self.base, self.scale)
        return packed.ljust(HEADER_BYTES, b"\0")

    def parts(self, hf_rows: int = 0) -> Iterator[Part]:
        """In the file's order; HuggingFace's table of tied positions has `hf_rows` rows."""
        for name, template, shape, transposed in TABLES[self.family]:
            ours = shape(self)
            if "{}" in template:
                theirs = ours[::-1] if transposed else ours
                for layer in range(self.L):
                    yield Part(f"{name} of layer {layer}", template.format(layer), ours, theirs, transposed)
            elif name in PADDED:
                yield Part(name, template, ours, (self.V, self.C), padded=True)
            elif name == "wpe" and self.tied:
                yield Part(name, template, ours, (hf_rows, self.C), tied=True)
            else:
                yield Part(name, template, ours, ours)

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and number of each kind of tensor: a header may promise any number of layers."""
        for name, template, shape, _ in TABLES[self.family]:
            yield name, shape(self), self.L if "{}" in template else 1

    def parameters(self) -> int:
        """As the model has them, without the padding of the token tables."""
        shapes = (((self.V, self.C) if name in PADDED else shape, many) for name, shape, many in self.sizes())
        return sum(math.prod(shape) * many for shape, many in shapes)

    def stretched_base(self) -> float:
        """The rotary base that transformers' plain rotation needs to turn as ntk does."""
        return self.base * self.scale ** (self.dims / (self.dims - 2)) if MODES[self.mode] == "ntk" else self.base

    def bytes(self) -> int:
        return HEADER_BYTES + ITEM_BYTES[self.dtype] * sum(math.prod(shape) * many for _, shape, many in self.sizes())


PADDED = {"wte", "embedin", "embedout"}
# Name, HuggingFace's name, shape, does HuggingFace keep the transpose (its Conv1D does)?
TABLES: dict[str, tuple[tuple[str, str, Callable[[Header], tuple[int, ...]], bool], ...]] = {
    GPT2: (
        ("wte", "wte.weight", lambda h: (h.Vp, h.C), False),
        ("wpe", "wpe.weight", lambda h: (h.maxT, h.C), False),
        ("ln1w", "h.{}.ln_1.weight", lambda h: (h.C,), False),
        ("ln1b", "h.{}.ln_1.bias", lambda h: (h.C,), False),
        ("qkvw", "h.{}.attn.c_attn.weight", lambda h: (3 * h.C, h.C), True),
        ("qkvb", "h.{}.attn.c_attn.bias", lambda h: (3 * h.C,), False),
        ("attprojw", "h.{}.attn.c_proj.weight", lambda h: (h.C, h.C), True),
        ("attprojb", "h.{}.attn.c_proj.bias", lambda h: (h.C,), False),
        ("ln2w", "h.{}.ln_2.weight", lambda h: (h.C,), False),
        ("ln2b", "h.{}.ln_2.bias", lambda h: (h.C,), False),
        ("fcw", "h.{}.mlp.c_fc.weight", lambda h: (4 * h.C, h.C), True),
        ("fcb", "h.{}.mlp.c_fc.bias", lambda h: (4 * h.C,), False),
        ("fcprojw", "h.{}.mlp.c_proj.weight", lambda h: (h.C, 4 * h.C), True),
        ("fcprojb", "h.{}.mlp.c_proj.bias", lambda h: (h.C,), False),
        ("lnfw", "ln_f.weight", lambda h: (h.C,), False),
        ("lnfb", "ln_f.bias", lambda h: (h.C,), False),
    ),
    NEOX: (
        ("embedin", "embed_in.weight", lambda h: (h.Vp, h.C), False),
        ("ln1w", "layers.{}.input_layernorm.weight", lambda h: (h.C,), False),
        ("ln1b", "layers.{}.input_layernorm.bias", lambda h: (h.C,), False),
        ("qkvw", "layers.{}.attention.query_key_value.weight", lambda h: (3 * h.C, h.C), False),
        ("qkvb", "layers.{}.attention.query_key_value.bias", lambda h: (3 * h.C,), False),
        ("attprojw", "layers.{}.attention.dense.weight", lambda h: (h.C, h.C), False),
        ("attprojb", "layers.{}.attention.dense.bias", lambda h: (h.C,), False),
        ("ln2w", "layers.{}.post_attention_layernorm.weight", lambda h: (h.C,), False),
        ("ln2b", "layers.{}.post_attention_layernorm.bias", lambda h: (h.C,), False),
        ("fcw", "layers.{}.mlp.dense_h_to_4h.weight", lambda h: (4 * h.C, h.C), False),
        ("fcb", "layers.{}.mlp.dense_h_to_4h.bias", lambda h: (4 * h.C,), False),
        ("fcprojw", "layers.{}.mlp.dense_4h_to_h.weight", lambda h: (h.C, 4 * h.C), False),
        ("fcprojb", "layers.{}.mlp.dense_4h_to_h.bias", lambda h: (h.C,), False),
        ("lnfw", "final_layer_norm.weight", lambda h: (h.C,), False),
        ("lnfb", "final_layer_norm.bias", lambda h: (h.C,), False),
        ("embedout", "embed_out.weight", lambda h: (h.Vp, h.C), False),
    ),
}


def padded(V: int) -> int:
    return -(-V // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def check(header: Header, where: str):
    """Refuses sizes that no model has; `where` begins the message."""
    for name in ("maxT", "V", "L", "H", "C", "Vp"):
        if not 1 <= getattr(header, name) <= INT_MAX:
            raise InputError(f"{where}: {name} is {getattr(header, name)}, not from 1 to {INT_MAX}")
    if header.V > header.Vp:
        raise InputError(f"{where}: {header.V} tokens, but a token table of {header.Vp} rows")
    if header.C % header.H:
        raise InputError(f"{where}: {header.H} heads do not divide the width {header.C}")
    if header.family == GPT2:
        if header.tied not in (0, 1) or (header.tied and not 1 <= header.tied_context <= INT_MAX):
            raise InputError(f"{where}: tied positions {header.tied} with context {header.tied_context}")
        return
    D = header.C // header.H
    if header.dims % 2 or not 0 <= header.dims <= D:
        raise InputError(f"{where}: {header.dims} rotated dimensions of {D}; an even number, at most all, is needed")
    if not 1 < header.base <= MOST_BASE:
        raise InputError(f"{where}: the rotary base is {header.base}, not above 1 and at most {MOST_BASE:g}")
    if not 1 <= header.scale <= MOST_SCALE:
        raise InputError(f"{where}: the rotary scale is {header.scale}, not from 1 to {MOST_SCALE:g}")
    if not 1 <= header.original <= INT_MAX:
        raise InputError(f"{where}: the original context is {header.original}, not from 1 to {INT_MAX}")
    if not 0 <= header.mode < len(MODES):
        raise InputError(f"{where}: rotary mode {header.mode}; 0 to {len(MODES) - 1} are known")
    if header.gelu not in (GELU_TANH, GELU_ERF):
        raise InputError(f"{where}: GELU form {header.gelu}; {GELU_TANH} (tanh) and {GELU_ERF} (erf) are known")
    for name in ("parallel", "softmax_temperature"):
        if getattr(header, name) not in (0, 1):
            raise InputError(f"{where}: the flag {name} is {getattr(header, name)}, neither 0 nor 1")
    if MODES[header.mode] in ("ntk", "dynamic") and header.dims == 2:
        raise InputError(f"{where}: rope {MODES[header.mode]} has no exponent d/(d-2) for 2 rotated dimensions")


def check_trainable(header: Header, where: str):
    """Refuses a model that no trainer would take, before gigabytes of it are written."""
    D = header.C // header.H
    if D not in HEAD_DIMS:
        raise InputError(
            f"{where}: heads of {D} (width {header.C} over {header.H} heads); the trainer has kernels for "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )
    if header.V > MAX_VOCAB:
        raise InputError(f"{where}: {header.V:,} tokens; shards hold 16-bit tokens, so at most {MAX_VOCAB:,} are trained")


def read_header(path: str) -> Header:
    """The header of a weights file that is exactly as long as it says; InputError for any other."""
    try:
        size = os.path.getsize(path)
        with open_input(path) as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(head) < HEADER_BYTES:
        raise InputError(f"{path}: {size:,} bytes, shorter than a header of {HEADER_BYTES:,}")
    words = WORDS.unpack_from(head)
    family = next((family for family, magic in MAGIC.items() if magic == words[0]), None)
    if family is None:
        raise InputError(
            f"{path}: magic {words[0]}, neither GPT-2's {MAGIC[GPT2]} nor Pythia's {MAGIC[NEOX]}: no weights file"
        )
    dtype = next((dtype for dtype, version in VERSION.items() if version == words[1]), None)
    if dtype is None:
        raise InputError(f"{path}: version {words[1]}; 3 (fp32), 5 (bf16) and 6 (fp16) are known")
    if family == GPT2:
        header = Header(family, dtype, *words[2:8], tied=words[8], tied_context=words[9])
    else:
        header = Header(family, dtype, *words[2:8], 0, 0, *words[8:14], *words[14:16])
    check(header, path)
    if size != header.bytes():
        raise InputError(f"{path}: {size:,} bytes, but its header needs {header.bytes():,}")
    return header


def checkpoint_fault(folder: str) -> str:
    """What keeps a checkpoint from being healthy, by its manifest; nothing if it cannot be read."""
    try:
        with open_input(os.path.join(folder, "manifest.json"), "r", encoding="utf-8") as file:
            return str(json.load(file).get("fault") or "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def manifest_checksum(text: str) -> str:
    """Of a manifest without its checksum and without the blanks between its words, as the trainer hashes it. Its text is
    taken as it is: Python would write some numbers otherwise."""
    words = "".join(re.findall(r'"(?:[^"\\]|\\.)*"|[^\s"]+', text))
    return xxhash.xxh3_64_hexdigest(re.sub('"checksum":"[0-9a-f]{16}",', "", words, count=1).encode())


def read_manifest(folder: str) -> dict[str, Any]:
    """A checkpoint's manifest, which matches the checksum that it holds of itself."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open_input(path, "r", encoding="utf-8", newline="") as file:
            text = file.read()
        made = json.loads(text)
        if made["checksum"] != manifest_checksum(text) or not text.endswith("}\n"):
            raise InputError(f"{path}: damaged; it does not match its checksum")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged") from error
    return made


def checkpoint_model(folder: str) -> str:
    """model.bin of one checkpoint, whose parts have the sizes that its manifest says, and model.bin its hash. What else
    a resume needs is the trainer's to hash."""
    parts = {part["name"]: part for part in read_manifest(folder)["parts"]}
    if "model.bin" not in parts:
        raise InputError(f"{folder}: its manifest names no model.bin")
    for name, part in parts.items():
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size != part["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(f"{path}: {found}, and the manifest says {part['bytes']:,} bytes")
    model, hashed = os.path.join(folder, "model.bin"), xxhash.xxh3_64()
    try:
        with open_input(model) as file:
            while piece := file.read(1 << 24):
                hashed.update(piece)
    except OSError as error:
        raise InputError(f"{model}: cannot be read ({error.strerror})") from error
    if hashed.hexdigest() != parts["model.bin"]["xxh3"]:
        raise InputError(f"{model}: its bytes changed since it was written, the manifest has another hash of them")
    return model


def checkpoints_in(run: str) -> list[str]:
    """Names of a run's checkpoints, the newest first."""
    steps: list[tuple[int, bool, str]] = []
    for name in os.listdir(run):
        if match := STEP.fullmatch(name):
            steps.append((int(match[1] or match[2]), not name.startswith("."), name))
    return [name for _, _, name in sorted(steps, reverse=True)]


def newest_model(run: str, warn: Callable[[str], None]) -> Optional[str]:
    """model.bin of the newest whole checkpoint, a healthy one if there is one. A trainer that saves removes older
    checkpoints meanwhile: where the list has changed, what was found wrong may only have been on its way out, and the
    search begins again."""
    while True:
        names, refused = checkpoints_in(run), []
        faults = {name: checkpoint_fault(os.path.join(run, name)) for name in names}
        model = None
        for name in sorted(names, key=lambda name: faults[name] != ""):  # stable: the newest first among each
            folder, newest = os.path.join(run, name), os.path.join(run, names[0])
            try:
                model = checkpoint_model(folder)
            except InputError as error:
                refused.append(f"{error}; the checkpoint before it is taken")
                continue
            if faults[name]:
                refused.append(f"{folder}: not healthy ({faults[name]}), but no other is")
            elif faults[names[0]]:
                refused.append(f"{newest}: not healthy ({faults[names[0]]}); {folder} is taken, the newest that is")
            break
        if not refused or checkpoints_in(run) == names:
            for line in refused:
                warn(line)
            return model


def locate(path: str, warn: Callable[[str], None]) -> str:
    """The weights file that a path means: itself, a checkpoint's, or that of a run's newest whole checkpoint, a healthy
    one if there is one."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    if not os.path.isdir(path):
        return path
    if os.path.exists(os.path.join(path, "manifest.json")):
        return checkpoint_model(path)
    if model := newest_model(path, warn):
        return model
    steps = checkpoints_in(path)
    if not steps and os.path.exists(os.path.join(path, "config.json")):
        raise InputError(f"{path}: is a HuggingFace directory; convert it with --to FILE.bin")
    found = "no whole checkpoint" if steps else "neither a run nor a checkpoint"
    raise InputError(f"{path}: {found} is in this folder")
