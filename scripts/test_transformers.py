"""Exports through the loaders that people use: AutoTokenizer and AutoModelForCausalLM of transformers 4.57 and 5.x, and
how both read rotary settings. Torch and both releases are installed once into build/transformers; where pip cannot, the
tests are skipped. The product needs neither."""

import json
import shutil
import subprocess
import sys

import pytest
from recipe_testing import PYTHON, ROOT, run

import hf_config
import hf_testing as t
from test_convert_hf import OLD_AND_NEW
from weights_file import InputError

FOLDER = ROOT / "build/transformers"
TORCH, RELEASES, ROOM = "torch==2.8.0", ("4.57.6", "5.23.0"), 12e9  # bytes, where only a torch with CUDA is to be had
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TRAINER = {"gpt2": ROOT / "build/cpu/train_gpt2", "pythia": ROOT / "build/cpu/train_pythia"}
TEXTS = ["It's 12.5 of  naïve 漢字 🙂\r\n\r\n\tthe king's\n", " and", "unto\n\n\n    for it was", "the",
         "cafe\u0301 <|endoftext of|> the Lord's 1611"]


def pip(python, *arguments):
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *map(str, arguments)], capture_output=True,
                          text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


@pytest.fixture(scope="session", params=RELEASES)
def transformers(request):
    """Calls Python with torch and a release of transformers."""
    python, packages = FOLDER / "venv/bin/python", FOLDER / request.param
    done = FOLDER / f"{request.param}.installed"
    if not done.exists():
        if not (FOLDER / "torch.installed").exists():
            subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
            if pip(python, "--retries", 0, "--index-url", CPU_INDEX, TORCH):
                if shutil.disk_usage(FOLDER).free < ROOM:
                    pytest.skip(f"{FOLDER}: {ROOM / 1e9:.0f} GB are needed to install {TORCH}")
                if failed := pip(python, TORCH):
                    pytest.skip(f"pip cannot install {TORCH}: {failed}")
            (FOLDER / "torch.installed").touch()
        if failed := pip(python, "--target", packages, f"transformers=={request.param}"):
            pytest.skip(f"pip cannot install transformers {request.param}: {failed}")
        done.touch()

    def start(*command):
        # Models and tokenizers are local, and a release that asks the hub for more should fail here.
        return run(python, *command, PYTHONPATH=str(packages), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    start.release = request.param
    return start


def edited(tokenizer, change):
    made = json.loads(tokenizer.read_text())
    change(made)
    tokenizer.write_text(json.dumps(made))


def normalized(made):  # as GPT-NeoX-20B's
    made["normalizer"] = {"type": "NFC"}


def split_otherwise(made):  # as Llama 3's: a pre-tokenizer that GPT-2's class does not have
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|[^\\s\\p{N}]+|\\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def ends_with_s(made):
    for token in made["added_tokens"]:
        token["content"] = "</s>"
    made["model"]["vocab"]["</s>"] = made["model"]["vocab"].pop("<|endoftext|>")


CASES = {
    "gpt2": ("gpt2", None, None),
    "pythia": ("pythia", normalized, None),
    "another pre-tokenizer": ("gpt2", split_otherwise, None),
    "another end of text": ("pythia", ends_with_s, "</s>"),
    "raw bytes": ("pythia", None, None),
}


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """{case: a run's export}, by the tokenizer that the run recorded."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "text.txt").write_text("\n".join(TEXTS) * 400)
    run(PYTHON, "data/prepare.py", folder / "text.txt", "--out", folder / "first", "--val-fraction", 0,
        "--train-tokenizer", 400)
    for name, (family, change, eot) in CASES.items():
        place = folder / name
        place.mkdir()
        kind = ["--raw-bytes"]
        if name != "raw bytes":
            shutil.copy(folder / "first/tokenizer.json", place)
            if change:
                edited(place / "tokenizer.json", change)
            kind = ["--tokenizer", place / "tokenizer.json", *(["--eot-token", eot] if eot else [])]
        run(PYTHON, "data/prepare.py", folder / "text.txt", "--out", place / "tokens", "--val-fraction", 0,
            *kind)
        run(TRAINER[family], "--model", "2,64,2", "--tokenizer", place / "tokens/tokenizer.bin", "--context", 128, "--train",
            place / "tokens/train_*.bin", "--steps", 20, "--lr", 1e-2, "--warmup", 0, "--val-every", 0, "--sample-every",
            0, "--threads", 1, "--out", place / "run")
        run(PYTHON, "scripts/convert_hf.py", place / "run", "--back", place / "hf")
    return {name: folder / name for name in CASES}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_an_export_as_its_loaders_see_it(transformers, exports, case, tmp_path):
    place, (family, _, eot) = exports[case], CASES[case]
    texts, logits, tokens = tmp_path / "texts.json", tmp_path / "logits.txt", ",".join(map(str, range(1, 60)))
    texts.write_text(json.dumps(TEXTS))
    logits.write_text(run(TRAINER[family], "--init", place / "run", "--eval", "logits", "--prompt-tokens", tokens))
    said = transformers("scripts/check_hf.py", place / "hf", "--tokens", tokens, "--logits", logits, "--texts", texts,
                        "--tokenizer", place / "tokens/tokenizer.json", *(["--eot-token", eot] if eot else []))
    assert "within the bound" in said and f"{len(TEXTS)} texts" in said


ROTATE = """
import json, sys
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding
made = []
for config in json.load(open(sys.argv[1])):
    try:
        config = GPTNeoXConfig.from_dict(config)
        rotary = GPTNeoXRotaryEmbedding(config)
        dims = GPTNeoXAttention(config, 0).rotary_ndims
        made.append([dims, rotary.attention_scaling, rotary.rope_type, rotary.inv_freq.tolist()])
    except Exception as error:
        made.append(str(error))
print(json.dumps(made))
"""
TOLD_TWICE = [
    {"rope_theta": 500000},
    {"rotary_emb_base": ..., "rope_theta": 500000},
    {"rotary_pct": ..., "partial_rotary_factor": 0.5},
    {"rope_scaling": {"type": "linear", "factor": 2.0},
     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rotary_emb_base": ...},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    {"head_dim": 16},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 10},
]


@pytest.mark.long
def test_rotary_settings_are_read_as_transformers_does(transformers, tmp_path):
    """What we take, we take as it does: our own config.json for it rotates alike."""
    (tmp_path / "rotate.py").write_text(ROTATE)
    configs = []
    for changes in [changes for changes, _ in OLD_AND_NEW] + TOLD_TWICE:
        config = {key: value for key, value in (t.NEOX_CONFIG | changes).items() if value is not ...}
        try:
            ours = hf_config.config_of(hf_config.header_of(config, "fp32", "config.json"), t.T, 0, "config.json")
        except InputError:
            assert changes in TOLD_TWICE
            continue
        assert changes not in TOLD_TWICE
        configs += [config, ours]
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    read = json.loads(transformers(tmp_path / "rotate.py", tmp_path / "configs.json"))
    for config, theirs, ours in zip(configs[::2], read[::2], read[1::2], strict=True):
        assert not isinstance(ours, str), ours
        # What 5.x writes has neither base nor mode in the places where 4.57 looks.
        of_5 = "rope_parameters" in config and not config.get("rope_scaling")
        assert theirs == ours or (of_5 and transformers.release < "5"), config
