#!/usr/bin/env python3
"""HuggingFace directories ↔ weights files of GPT-2 and Pythia (gpt2, gpt_neox), and tokenizer.json → tokenizer.bin.

    scripts/convert_hf.py pythia-160m --to pythia.bin        # config.json and model.safetensors -> a weights file
    scripts/convert_hf.py runs/long --back long_hf           # a run, a checkpoint or a weights file -> HuggingFace,
                                                             # with the run's tokenizer and a model card
    scripts/convert_hf.py --tokenizer pythia-160m/tokenizer.json --to tokenizer.bin

Neither torch nor much memory is needed: tensors pass through in blocks of a few MB, in the order of the file that is
written. With one dtype on both sides not a bit changes.

An exported model computes in transformers what the trainer computes. With rope dynamic that holds at the full context
only: transformers takes the frequencies from the length of each sequence, the trainer from the context of the run.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import sys
from typing import BinaryIO, Iterator, Optional

import numpy as np

import hf_config
import hf_directory
import hf_export
from hf_directory import Directory, Entry, Found
from tensor_stream import BLOCK, STORAGE, Stored, recode
from weights_file import (
    GPT2,
    ITEM_BYTES,
    MODES,
    NEOX,
    Header,
    InputError,
    Part,
    check_trainable,
    locate,
    read_header,
)

import vocabulary  # of data/, which weights_file puts on the path
from common import EOT_TEXT, RunError

PREFIX = {GPT2: "transformer.", NEOX: "gpt_neox."}
OUTSIDE = {GPT2: {"lm_head.weight"}, NEOX: {"embed_out.weight", "lm_head.weight"}}  # never with the prefix
BUFFERS = {
    GPT2: ("h.{}.attn.bias", "h.{}.attn.masked_bias"),
    NEOX: ("layers.{}.attention.bias", "layers.{}.attention.masked_bias", "layers.{}.attention.rotary_emb.inv_freq"),
}
FAMILY_NAME = {GPT2: "GPT-2", NEOX: "GPT-NeoX"}


def warn(line: str):
    print(f"convert_hf.py: {line}", file=sys.stderr)


@contextlib.contextmanager
def syncing(path: str) -> Iterator[BinaryIO]:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class Staged:
    """A file or a folder that has its name only once it is whole and on the disk; use as a context, and commit().
    Until then it is `.NAME.partial` beside that name, locked, so that what a killed run left behind can be replaced."""

    def __init__(self, target: str, folder: bool, force: bool):
        # Of a link the place that it leads to, as any program would write there.
        self.target, self.folder = os.path.realpath(target), folder
        parent, name = os.path.split(self.target)
        self.parent, self.path = parent, os.path.join(parent, f".{name}.partial")
        if not os.path.isdir(parent):
            raise InputError(f"{target}: its folder {parent} does not exist")
        if os.path.isdir(self.target) and not folder:
            raise InputError(f"{target}: is a folder; the name of a file is needed")
        if os.path.exists(self.target) and not os.path.isdir(self.target) and folder:
            raise InputError(f"{target}: is a file; the name of a folder is needed")
        occupied = os.path.lexists(self.target) and not (folder and not os.listdir(self.target))
        if occupied and not force:
            raise InputError(f"{target}: exists already; choose another name, or replace it with --force")
        if occupied and folder and not os.path.exists(os.path.join(self.target, hf_directory.CONFIG)):
            raise InputError(f"{target}: holds no {hf_directory.CONFIG}, so --force does not replace it")
        self.check_replaceable()

    def check_replaceable(self):
        """A folder is replaced as a whole, so it may hold nothing that an export does not write."""
        if not self.folder or not os.path.isdir(self.target):
            return
        with os.scandir(self.target) as inside:
            others = sorted(
                at.name for at in inside if not (hf_directory.OURS.fullmatch(at.name) or hf_export.is_ours(at.path))
                or at.is_dir()
            )
        if others:
            named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
            raise InputError(
                f"{self.target}: holds {named}, which --force would delete; move that, or name another folder"
            )

    def __enter__(self):
        if self.folder:
            os.makedirs(self.path, exist_ok=True)
        self.handle = os.open(self.path, os.O_RDONLY if self.folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have given the file its final name in the meantime.
            if not os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            os.close(self.handle)
            raise InputError(f"{self.target}: another conversion is writing it") from error
        if self.folder:
            for name in os.listdir(self.path):
                os.remove(os.path.join(self.path, name))
        return self

    def create(self, name: str):
        """A file of the folder, or with "" the file itself."""
        return syncing(os.path.join(self.path, name) if name else self.path)

    def commit(self):
        if self.folder:
            os.fsync(self.handle)
            self.check_replaceable()  # the conversion may have taken minutes
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            old = os.path.join(self.parent, f".{os.path.basename(self.target)}.old")
            if self.folder and os.path.isdir(self.target) and os.listdir(self.target):
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.target, old)
            os.rename(self.path, self.target)
            parent = os.open(self.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def __exit__(self, kind, *_):
        if kind is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path) if self.folder else os.remove(self.path)
        os.close(self.handle)


def recoded(blocks: Iterator[np.ndarray], source: str, target: str, name: str) -> Iterator[np.ndarray]:
    return (recode(block, source, target, name) for block in blocks)


def zeros(count: int, dtype: str) -> Iterator[np.ndarray]:
    return (np.zeros(min(BLOCK, count - start), STORAGE[dtype]) for start in range(0, count, BLOCK))


def match(directory: Directory, header: Header) -> dict[str, tuple[str, Found]]:
    """Each tensor of the model under its name without prefix: its full name, and where it is. Nothing may be missing,
    and nothing left over but the buffers that the architecture is known to have."""
    family, folder = header.family, directory.folder
    if header.L > len(directory.tensors):
        raise InputError(f"{folder}: config.json says {header.L:,} layers, and there are {len(directory.tensors):,} tensors")
    buffers = {template.format(layer) for template in BUFFERS[family] for layer in range(header.L)}
    wanted = {part.hf: part for part in header.parts()}
    named: dict[str, tuple[str, Found]] = {}
    extra: list[str] = []
    for full, found in directory.tensors.items():
        name = full
        if full.startswith(PREFIX[family]) and full[len(PREFIX[family]) :] not in OUTSIDE[family]:
            name = full[len(PREFIX[family]) :]
        elif family == NEOX and full == "lm_head.weight":  # what transformers 5 calls it inside
            name = "embed_out.weight"
        if name in buffers:
            continue
        if name in named or (name not in wanted and (family, name) != (GPT2, "lm_head.weight")):
            extra.append(full)
        else:
            named[name] = full, found

    def some(names: list[str]) -> str:
        return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")

    if missing := [name for name in wanted if name not in named]:
        raise InputError(f"{folder}: no tensor {some(missing)}, which this {FAMILY_NAME[family]} needs")
    if extra:
        raise InputError(f"{folder}: the tensor {some(extra)} has no place in this {FAMILY_NAME[family]}")
    for name, (full, found) in named.items():
        shape = wanted[name if name in wanted else "wte.weight"].hf_shape
        if found.stored.shape != shape:
            raise InputError(
                f"{found.stored.path}: {full} is {list(found.stored.shape)}, but config.json makes it {list(shape)}"
            )
        if not found.stored.dtype:
            raise InputError(f"{found.stored.path}: {full} is {found.safe_dtype}; F32, F16 and BF16 are supported")
    return named


def check_tied(named: dict[str, tuple[str, Found]]):
    """GPT-2's unembedding is its token table; a copy in the file must be one."""
    if "lm_head.weight" not in named:
        return
    full, found = named.pop("lm_head.weight")
    head, wte = found.stored, named["wte.weight"][1].stored
    count = wte.shape[0] * wte.shape[1]
    pairs = zip(head.blocks(0, count), wte.blocks(0, count))
    if head.dtype != wte.dtype or any(a.tobytes() != b.tobytes() for a, b in pairs):
        raise InputError(f"{head.path}: {full} is not the same as wte.weight; a head of its own is not supported")


def own_dtype(named: dict[str, tuple[str, Found]], wish: Optional[str]) -> str:
    first, found = next(iter(named.values()))
    for full, other in named.values():
        if not wish and other.stored.dtype != found.stored.dtype:
            raise InputError(
                f"{other.stored.path}: {full} is {other.safe_dtype} and {first} is {found.safe_dtype}; "
                "choose what all become with --dtype"
            )
    return wish or found.stored.dtype


def to_binary(args):
    with Directory(args.source) as directory:
        header = hf_config.header_of(directory.config, "fp32", directory.path(hf_directory.CONFIG))
        check_trainable(header, directory.path(hf_directory.CONFIG))
        named = match(directory, header)
        header.dtype = own_dtype(named, args.dtype)
        with Staged(args.to, False, args.force) as staged:
            check_tied(named)
            with staged.create("") as file:
                file.write(header.pack())
                for part in header.parts():
                    full, found = named[part.hf]
                    stored, count = found.stored, part.count()
                    inside = header.V * header.C if part.padded else count
                    blocks = stored.transposed_blocks() if part.transposed else stored.blocks(0, inside)
                    for block in recoded(blocks, stored.dtype, header.dtype, f"{stored.path}: {full}"):
                        file.write(block.data)
                    for block in zeros(count - inside, header.dtype):
                        file.write(block.data)
                assert file.tell() == header.bytes()
            staged.commit()
    say(args.to, header, header.bytes())


def repeated(stored: Stored, rows: int) -> Iterator[np.ndarray]:
    """A table of tied positions, row p mod its length at row p."""
    length, C = stored.shape
    for start in range(0, rows, length):
        yield from stored.blocks(0, min(length, rows - start) * C)


def check_padding(stored: Stored, header: Header, part: Part):
    for block in stored.blocks(header.V * header.C, part.count()):
        if (block.view(np.uint8) != 0).any():
            raise InputError(f"{stored.path}: {part.name} is not zero in the rows from {header.V} on, its padding")


def entry_of(part: Part, stored: Stored, header: Header, dtype: str, rows: int) -> Entry:
    def blocks() -> Iterator[np.ndarray]:
        if part.tied:
            raw = repeated(stored, rows)
        elif part.transposed:
            raw = stored.transposed_blocks()
        else:
            raw = stored.blocks(0, int(np.prod(part.hf_shape, dtype=np.int64)))
        return recoded(raw, header.dtype, dtype, f"{stored.path}: {part.name}")

    outside = part.hf in OUTSIDE[header.family]
    return Entry(part.hf if outside else PREFIX[header.family] + part.hf, part.hf_shape, blocks)


def context_of(header: Header, wish: Optional[int], path: str) -> int:
    if header.family == GPT2 and not header.tied:
        if wish not in (None, header.maxT):
            raise InputError(
                f"{path}: its positions are a table of {header.maxT} rows and not tied, so --context {wish} is not "
                "possible; train with --positions to have another length"
            )
        return header.maxT
    return wish or (header.tied_context if header.tied else header.maxT)


def warn_of_rope(header: Header, context: int):
    """Where what transformers computes is what the trainer computes under conditions only."""
    mode, factor = MODES[header.mode], context / header.original
    if header.family == NEOX and mode == "yarn" and factor != header.scale:
        same = round(header.original * header.scale)
        warn(f"releases of transformers about 4.51 take {factor:g}, the context over the original one, for yarn's "
             f"factor instead of {header.scale:g}; use a later one, or --context {same}")
    if header.family == NEOX and mode == "dynamic" and context > header.original:
        warn(f"transformers takes dynamic's frequencies from the length of each sequence, the trainer from the context "
             f"of the run, so their logits agree at the full {context:,} tokens only")
    if header.family == NEOX and (mode != "none" or header.base != 10000):
        warn("llama.cpp's converter writes neither the rope scaling nor the base of a GPT-NeoX, so its GGUF file rotates "
             "as an unstretched Pythia does; give them to llama.cpp by its --rope-... options")


def back(args):
    with contextlib.ExitStack() as stack:
        export(args, *open_weights(args.source, stack), stack)


def open_weights(source: str, stack: contextlib.ExitStack) -> tuple[str, Header, int]:
    """Path, header and open file. Once open it stays readable, should a trainer remove the checkpoint."""
    while True:
        path = locate(source, warn)
        try:
            header = read_header(path)
            handle = os.open(path, os.O_RDONLY)
        except (InputError, FileNotFoundError):
            if path == source or os.path.exists(path):
                raise
            continue  # removed since it was found, as a newer one is there
        stack.callback(os.close, handle)
        return path, header, handle


def export(args, path: str, header: Header, handle: int, stack: contextlib.ExitStack):
    context = context_of(header, args.context, path)
    run = hf_export.run_of(path)
    if args.tokenizer:
        tokenizer = vocabulary.load(args.tokenizer, args.eot_token or EOT_TEXT)
        eot = tokenizer.eot
    else:
        tokenizer, eot = hf_export.tokenizer_of(run, args.eot_token, warn)
    if tokenizer:
        hf_export.check_tokenizer(run, tokenizer.name, tokenizer.tokens)
    if tokenizer and tokenizer.size > header.V:
        raise InputError(f"{tokenizer.name}: has {tokenizer.size:,} tokens, more than the model's {header.V:,}")
    if eot is None:
        eot = known_eot(header)
    dtype = args.dtype or header.dtype
    written = Header(**{**header.__dict__, "dtype": dtype})
    config = hf_config.config_of(written, context, eot, path)
    warn_of_rope(header, context)
    staged = stack.enter_context(Staged(args.back, True, args.force))
    entries, offset = [], len(header.pack())
    for part in header.parts(context):
        stored = Stored(handle, path, offset, header.dtype, part.shape)
        if part.padded:
            check_padding(stored, header, part)
        # Conv1D's (in, out) is the transpose of what the file holds.
        entries.append(entry_of(part, stored, header, dtype, context))
        offset += part.count() * ITEM_BYTES[header.dtype]
    hf_directory.write(staged.create, config, entries, dtype, args.shard_size)
    about = (f"A {FAMILY_NAME[header.family]} of {header.parameters():,} parameters in {dtype}, for up to {context:,} "
             "tokens, trained with Longhand.")
    texts = {hf_export.CARD: hf_export.card(os.path.basename(staged.target), about, run)}
    if tokenizer:
        texts[hf_directory.TOKENIZER] = tokenizer.text
        texts[hf_directory.TOKENIZER_CONFIG] = as_json(hf_export.tokenizer_config(tokenizer.eot_text, context))
    if eot is not None:
        texts[hf_directory.GENERATION] = as_json({"bos_token_id": eot, "eos_token_id": eot})
    for name, text in texts.items():
        with staged.create(name) as file:
            file.write(text.encode())
    staged.commit()
    say(args.back, written, sum(int(np.prod(entry.shape)) for entry in entries) * ITEM_BYTES[dtype])


def as_json(values: dict) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def known_eot(header: Header) -> Optional[int]:
    """The end of text of the published models, by their number of tokens; without a tokenizer no other is known."""
    if header.family == GPT2:
        return 50256 if header.V == 50257 else None
    return 0 if header.V >= 50277 else None


def say(path: str, header: Header, size: int):
    print(f"{path}: {FAMILY_NAME[header.family]}, {header.parameters():,} parameters, {header.dtype}, "
          f"{size / 1e6:,.1f} MB")


def tokenizer_binary(args):
    """The binary, and beside it a tokenizer.json of the same stem: the binary cannot encode (scripts/generate.py)."""
    made = vocabulary.load(args.tokenizer, args.eot_token or EOT_TEXT)
    twin = os.path.splitext(args.to)[0] + ".json"
    if args.to == twin:
        raise InputError(f"{args.to}: a tokenizer.json belongs beside the binary under this name; call it .bin")
    there = os.path.exists(twin) and os.path.samefile(twin, args.tokenizer)
    with contextlib.ExitStack() as stack:
        files = [(args.to, made.binary())] + ([] if there else [(twin, made.text.encode())])
        staged = [(stack.enter_context(Staged(path, False, args.force)), data) for path, data in files]
        for place, data in staged:
            with place.create("") as file:
                file.write(data)
        for place, _ in reversed(staged):  # where the binary is, the other is too
            place.commit()
    print(f"{args.to}: {made.size:,} tokens, end of text {made.eot}")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    value = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return value


def whole(text: str) -> int:
    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {2**31 - 1:,}")
    return value


def parser() -> argparse.ArgumentParser:
    options = OneLineParser(
        prog="convert_hf.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="exit codes: 0 done, 1 the conversion failed, 2 bad options or input; nothing is left half-written.",
    )
    options.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="with --to a HuggingFace directory of GPT-2 or GPT-NeoX (Pythia); with --back a weights file, llm.c's "
        "too, a checkpoint folder, or a run folder, of which the newest whole checkpoint is taken",
    )
    options.add_argument(
        "--to", metavar="FILE.bin", help="write a weights file, or with --tokenizer a tokenizer binary"
    )
    options.add_argument("--back", metavar="DIR", help="write a HuggingFace directory")
    options.add_argument(
        "--dtype",
        choices=list(ITEM_BYTES),
        help="of the weights written (that of the weights read); narrowing rounds to nearest even, and a weight that "
        "is too large for fp16 is refused",
    )
    options.add_argument(
        "--context",
        metavar="T",
        type=whole,
        help="with --back: the longest context that config.json promises (that of the weights file); tied positions "
        "of GPT-2 are expanded to T rows",
    )
    options.add_argument(
        "--tokenizer",
        metavar="FILE.json",
        help="a byte-level BPE tokenizer.json; with --back it is copied and names the end of text (the run's own, if "
        "it has one), with --to and no SOURCE it becomes FILE.bin and, beside it, FILE.json",
    )
    options.add_argument(
        "--eot-token", metavar="TEXT", help=f"the token of FILE.json that ends a text ({EOT_TEXT})"
    )
    options.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=size,
        default=size("5GB"),
        help="with --back: weights above it are split into files of at most this size, with an index (5GB)",
    )
    options.add_argument(
        "--force",
        action="store_true",
        help="replace what has the name of the output, but no folder that holds more than an export does",
    )
    return options


def action(args):
    """What the options ask for, and none that says nothing there."""
    if bool(args.to) == bool(args.back):
        absent = args.source and not os.path.exists(args.source)
        raise InputError("give either --to FILE.bin or --back DIR (--help lists the options)"
                         + (f"; {args.source} is not there: {hf_directory.DOWNLOAD}" if absent else ""))
    if args.back and not args.source:
        raise InputError("--back needs a weights file, a checkpoint or a run (--help lists the options)")
    if args.to and not args.source and not args.tokenizer:
        raise InputError("--to needs a HuggingFace directory, or --tokenizer FILE.json (--help lists the options)")
    if args.to and args.source and args.tokenizer:
        raise InputError("convert the weights and the tokenizer in two calls; --tokenizer with --to takes no SOURCE")
    if args.to and args.context:
        raise InputError("--context belongs to --back")
    if args.to and args.tokenizer and args.dtype:
        raise InputError("--dtype is of weights, and --tokenizer with --to writes none")
    run = back if args.back else to_binary if args.source else tokenizer_binary
    return functools.partial(run, args)


def terminate(*_):
    raise KeyboardInterrupt


def main(argv: Optional[list[str]] = None) -> int:
    try:
        action(parser().parse_args(argv))()
        return 0
    except InputError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 1, "stopped; nothing was written"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code, message = 1, f"{where}{error.strerror or error}" + (
            "; nothing was written, free some space and run again" if full else ""
        )
    print(f"convert_hf.py: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
