"""What an export holds beside its weights: the tokenizer and the settings by which transformers loads and runs it, and
a model card. All of it comes from what the run recorded; what is not recorded is left out."""

import glob
import json
import os
import re
import zlib
from typing import Any, Callable, NamedTuple, Optional

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from weights_file import InputError, open_input

import dataset  # of data/, which weights_file puts on the path
import vocabulary

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CARD = "README.md"
MARK = re.compile(r"<!-- convert_hf\.py wrote this: ([0-9a-f]{8}) -->\n\Z")
# What the machine and its user need and no reader of the card does.
NOT_ON_CARD = {"out", "resume", "threads", "memory", "host-memory", "max-hours", "keep", "save-every", "sample-every",
               "sample-tokens", "temperature", "top-k", "prompt-tokens", "vocab"}


class Run(NamedTuple):
    """What a weights file's run says of itself; empty for a weights file by itself."""

    folder: str
    options: dict[str, Any]
    step: Optional[int]  # the checkpoint's
    tokenizer: dict[str, Any] = {}  # its number of tokens, end of text and hash, if the checkpoint knows its shards'


def read_object(path: str, load: Callable[[Any], Any]) -> dict[str, Any]:
    """A file that is there to help; {} where it does not."""
    try:
        with open_input(path) as file:
            made = load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return made if isinstance(made, dict) else {}


def run_of(weights: str) -> Run:
    checkpoint = os.path.dirname(os.path.abspath(weights))
    manifest = read_object(os.path.join(checkpoint, "manifest.json"), json.load)
    folder = os.path.dirname(checkpoint)
    if not manifest:
        return Run("", {}, None)
    step, known = manifest.get("step"), manifest
    for key in ("meta", "loader", "tokenizer"):
        known = known.get(key) if isinstance(known, dict) else None
    return Run(folder, read_object(os.path.join(folder, "options.toml"), tomllib.load),
               step if isinstance(step, int) else None, known if isinstance(known, dict) else {})


def found(run: Run, pattern: Any) -> Optional[str]:
    """A file that an option names: relative to where training was started, here or the root of this checkout."""
    if not isinstance(pattern, str) or not pattern:
        return None
    for base in ("", HOUSE, run.folder):
        if paths := sorted(glob.glob(os.path.join(base, pattern))):
            return paths[0]
        if os.path.exists(os.path.join(base, pattern)):
            return os.path.join(base, pattern)
    return None


def sources(run: Run) -> list[str]:
    """The globs of --train, without their weights."""
    given = run.options.get("train", "")
    words = given if isinstance(given, list) else str(given).split(",")
    return [re.sub(r":[0-9.eE+-]+$", "", str(word)) for word in words if word]


def datasets(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """(folder, dataset.json) of the shards that the run was trained on, as far as they are still there."""
    made = []
    for source in sources(run):
        shard = found(run, source)
        if shard and (record := read_object(os.path.join(os.path.dirname(shard), "dataset.json"), json.load)):
            made.append((os.path.dirname(shard), record))
    return made


def check_tokenizer(run: Run, name: str, tokens: list[bytes]):
    """Refuses a tokenizer that is not the one whose tokens the run was trained on."""
    if run.tokenizer.get("hash") not in (None, dataset.tokenizer_hash(tokens)):
        raise InputError(f"{name}: is not the tokenizer of the tokens that {run.folder} was trained on; name that one's "
                         "tokenizer.json with --tokenizer")


def tokenizer_of(run: Run, eot_text: Optional[str], warn: Callable[[str], None]
                 ) -> tuple[Optional[vocabulary.Vocabulary], Optional[int]]:
    """The run's own tokenizer, else that of its shards, and its end of text, which a binary without its tokenizer.json
    still knows."""
    named = run.options.get("tokenizer")
    binary = found(run, named)
    if named and not binary:
        warn(f"{run.folder} names the tokenizer {named}, which is not there; name its tokenizer.json with --tokenizer")
    if not named:
        beside = [os.path.join(folder, "tokenizer.bin") for folder, _ in datasets(run)]
        binary = next(filter(os.path.isfile, beside), None)
    if not binary:
        known = run.tokenizer.get("end_of_text")
        return None, known if isinstance(known, int) else None
    tokens, eot = vocabulary.read_binary(binary)
    twin = os.path.splitext(binary)[0] + ".json"
    if not os.path.isfile(twin):
        warn(f"{twin} is not there, so the export has no tokenizer; name it with --tokenizer")
        return None, eot
    if eot_text is None and eot is not None and 0 <= eot < len(tokens):
        eot_text = tokens[eot].decode(errors="replace")
    made = vocabulary.load(twin, eot_text or vocabulary.EOT_TEXT)
    if made.tokens != tokens:
        raise InputError(f"{twin} and {binary} are not of the same tokens; name the right one with --tokenizer")
    return made, made.eot


def tokenizer_config(eot_text: str, context: int) -> dict[str, Any]:
    """Without it transformers takes the tokenizer's class from config.json's model_type. 5.x then rebuilds GPT-2's or
    GPT-NeoX's from vocabulary and merges alone: without normalizer and pre-tokenizer, and with special tokens of its
    own beyond the model's vocabulary. By its general class 4.57 makes token_type_ids unless told what a model takes:
    GPT-NeoX's generate refuses them, and GPT-2 adds their embedding, that of token 0, at each position."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot_text,
        "eos_token": eot_text,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def shown(value: Any) -> Any:
    """An option's value without what only this machine has: of an absolute path the file and its folder."""
    if not isinstance(value, str):
        return [shown(part) for part in value] if isinstance(value, list) else value
    parts = []
    for part in value.split(","):
        if os.path.isabs(part):
            folder, name = os.path.split(part)
            above, folder = os.path.split(folder)
            private = above in ("/", "/home", "/Users") or part.startswith(os.path.expanduser("~") + "/" + name)
            part = name if private else os.path.join(folder, name)
        parts.append(part.replace("../", ""))
    return ",".join(parts)


def losses(run: Run) -> list[str]:
    """The newest of each kind that the checkpoint has behind it."""
    last: dict[str, dict[str, Any]] = {}
    try:
        with open_input(os.path.join(run.folder, "log.jsonl")) as file:
            for line in file:
                try:
                    event = json.loads(line)
                    kind, step, loss = event["event"], event["step"], float(event["loss"])
                except (ValueError, KeyError, TypeError):
                    continue
                if kind in ("step", "val") and (run.step is None or step <= run.step):
                    last[kind] = {"step": step, "loss": loss}
    except OSError:
        pass
    names = {"val": "on the validation text", "step": "on the last training step"}
    return [f"{last[kind]['loss']:.4f} {names[kind]}, after step {last[kind]['step']:,}" for kind in names if kind in last]


def toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # the same text for numbers, strings, booleans and lists of them


def card(title: str, about: str, run: Run) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {title}", "", about]
    if run.options:
        start = run.options.get("init")
        lines += ["", "## Training", "", f"- Started from: {f'`{shown(start)}`' if start else 'random weights'}"]
        texts = [f"`{shown(source)}`" for source in sources(run)]
        for _, record in datasets(run):
            train = record.get("train")
            if isinstance(train, dict) and isinstance(train.get("tokens"), int):
                texts.append(f"{train['tokens']:,} tokens")
        lines.append(f"- Text: {', '.join(texts)}")
        if run.step is not None:
            each = run.options.get("tokens-per-step")
            read = f", {run.step * each:,} tokens read" if isinstance(each, int) else ""
            lines.append(f"- Steps: {run.step:,}{read}")
        lines += [f"- Loss: {loss}" for loss in losses(run)]
        lines += ["", "The options of the trainer:", "", "```toml"]
        lines += [f"{key} = {toml(shown(value))}" for key, value in run.options.items()
                  if key not in NOT_ON_CARD and value not in ("", [], -1)]  # -1: left open
        lines += ["```"]
    body = "\n".join(lines) + "\n\n"
    return f"{body}<!-- convert_hf.py wrote this: {zlib.crc32(body.encode()):08x} -->\n"


def is_ours(path: str) -> bool:
    """Whether this is a model card as we wrote it, so that replacing it loses nobody's words."""
    if os.path.basename(path) != CARD:
        return False
    try:
        with open_input(path, "r", encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, ValueError):
        return False
    mark = MARK.search(text)
    return bool(mark) and zlib.crc32(text[: mark.start()].encode()) == int(mark[1], 16)
