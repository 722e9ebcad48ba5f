"""Every command of README.md, in its order, in a folder where nothing is yet: small models, few steps, and a server with
random models in place of HuggingFace's hub. A command that is not run is excused here, with the reason."""

import functools
import http.server
import json
import os
import re
import shlex
import subprocess
import threading

import pytest
from recipe_testing import BARE, PYTHON, ROOT, call, hub_entry, run

# What is made smaller, and nothing else: README's own words run.
SMALLER = [
    (r"--model 124M(?= --tokenizer)", "--model 1,64,2"),
    (r"--train-tokenizer 8192", "--train-tokenizer 300"),
    (r"--context 1024", "--context 64"),
    (r"--context 8192", "--context 128"),
    (r"--tokens-per-step 65536", "--tokens-per-step 256"),
    (r" --steps \d+", ""),
    (r"multi_gpu\.sh 4", "multi_gpu.sh 2"),
    (r"--out runs/(\w+)$", r"--out runs/\1 --steps 2 --sample-tokens 8"),
    (r"--resume$", "--resume --steps 3"),
]
PUBLISHED = {"openai-community/gpt2": "train_gpt2", "EleutherAI/pythia-160m-deduped": "train_pythia"}
EXCUSED = {
    r"dev/setup\.sh build": "installs packages",
    r"make( demo| test| cpu PRECISION=bf16| simt| bench| simt-profile KERNEL=\w+)?": "builds or runs for minutes",
    r"make cuda( PRECISION=fp32)?": "needs nvcc",
    r"dev/assemble\.py": "needs nvcc",
    r"dev/bench/vs_llmc\.sh DIR": "needs a checkout of llm.c",
    r"python dev/bench/\w+_?torch\.py": "needs PyTorch",
    r"dev/bench/million\.sh": "takes an hour",
}


def commands():
    """The lines of README's code blocks, but for the one that draws the folders."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"## The house\n.*?(?=\n## |\nWhere it stands)", "", text, flags=re.S).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s+)# .*$", "", line) for line in re.findall(r"^    (.*)$", text, re.M)]
    return [" ".join(line.split()) for line in lines if line.strip()]


def excused(command):
    return any(re.fullmatch(pattern, command) for pattern in EXCUSED)


@pytest.fixture
def texts(tmp_path):
    """README's my_texts/."""
    folder = tmp_path / "my_texts"
    folder.mkdir()
    for i, path in enumerate(["README.md", "data/FORMATS.md", "data/prepare.py"]):
        (folder / f"{i}.txt").write_text((ROOT / path).read_text()[:25_000])
    return folder


@pytest.fixture
def hub(tmp_path, texts):
    """Where the models may be downloaded from: random ones that know 64 tokens, each with a tokenizer of its own."""
    for i, (name, trainer) in enumerate(PUBLISHED.items()):
        made, folder = tmp_path / f"made_{i}", tmp_path / "hub" / name
        run(PYTHON, "data/prepare.py", texts, "--out", made / "tokens", "--train-tokenizer", 310 + i)
        folder.parent.mkdir(parents=True)
        run(ROOT / "build/cpu" / trainer, "--model", "1,64,2", "--vocab", 310 + i, "--context", 64, "--steps", 0,
            "--out", made / "run")
        run(PYTHON, "scripts/convert_hf.py", made / "run", "--back", folder, "--tokenizer", made / "tokens/tokenizer.json")
        listing = tmp_path / "hub/api/models" / name / "tree"
        listing.mkdir(parents=True)
        files = [hub_entry(path.name, path.read_bytes()) for path in folder.iterdir()]
        (listing / "main").write_text(json.dumps(files))

    class Hub(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return super().translate_path(path.replace("/resolve/main/", "/"))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def option(command, name):
    words = shlex.split(command)
    return words[words.index(name) + 1] if name in words else None


def test_every_command_of_the_readme(tmp_path, texts, hub):
    for name in ("data", "scripts", "dev", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    for trainer in PUBLISHED.values():
        (tmp_path / trainer).symlink_to(ROOT / "build/cpu" / trainer)
    tokenizers = {}  # of the weights files
    ran = 0
    for command in commands():
        if excused(command):
            continue
        small = command
        for pattern, instead in SMALLER:
            small = re.sub(pattern, instead, small)
        done = subprocess.run(["bash", "-c", small], cwd=tmp_path, env=BARE | {"HF_ENDPOINT": hub}, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, f"{command}\nrun as: {small}\n{done.stdout}{done.stderr}"
        ran += 1
        if "convert_hf.py" in command and (weights := option(command, "--to")):
            tokenizers[weights] = tmp_path / shlex.split(command)[2] / "tokenizer.json"
        if "--init" in command and (shards := option(command, "--train")):
            # Token ids are numbers: a model takes another tokenizer's without a word, and learns noise.
            mine = tmp_path / os.path.dirname(shards) / "tokenizer.json"
            assert mine.read_bytes() == tokenizers[option(command, "--init")].read_bytes(), command
            assert float(option(command, "--lr") or "inf") <= 1e-4, f"{command}: a rate to start from scratch with"
    assert ran >= 20


def test_what_is_excused_is_there():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    lines = commands()
    for pattern in EXCUSED:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern} is not in README"
    for words in map(str.split, filter(excused, lines)):
        if words[0] == "make":
            assert len(words) == 1 or "=" in words[1] or words[1] in targets, words
        else:
            assert (ROOT / words[words[0] == "python"]).is_file(), words


@pytest.mark.parametrize("bench", ["vs_torch.py", "pythia_torch.py", "gpu_torch.py"])
def test_a_bench_beside_pytorch_without_it(bench, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    done = call(PYTHON, f"dev/bench/{bench}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"{bench}: error: the Python package torch is missing")
    assert done.stderr.count("\n") == 1
