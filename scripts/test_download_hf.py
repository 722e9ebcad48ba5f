"""download_hf.py against a small web server in place of the hub."""

import http.server
import json
import threading

import pytest

import download_hf
import recipes
from recipe_testing import hub_entry

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "README.md": b"nothing",
    "model.safetensors": bytes(range(256)) * 40,
}
SHARDS = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
    }}).encode(),
}
OTHER = {name: body[::-1] + b" " for name, body in FILES.items()}  # another model's, under the same names


@pytest.fixture
def hub(monkeypatch):
    """Models by name, and what was asked for."""
    models = {"x/small": FILES, "x/large": SHARDS, "x/other": OTHER, "x/bare": {"config.json": b"{}", "pytorch_model.bin": b""}}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            for name, files in models.items():
                if self.path == f"/api/models/{name}/tree/main":
                    return self.answer(json.dumps([hub_entry(*file) for file in files.items()]).encode())
                file = self.path.removeprefix(f"/{name}/resolve/main/")
                if file in files:
                    begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
                    return self.answer(files[file][int(begin):], 206 if int(begin) else 200)
            self.send_error(404)

        def answer(self, body, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(recipes, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(recipes, "ATTEMPTS", 1)
    yield asked
    server.shutdown()


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["download_hf.py", *map(str, arguments)])
    return download_hf.main()


@pytest.mark.parametrize("name, files", [("x/small", FILES), ("x/large", SHARDS)])
def test_a_model_comes_whole_and_once(hub, monkeypatch, tmp_path, name, files):
    assert run(monkeypatch, name, tmp_path / "model") == 0
    got = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert got == {file: body for file, body in files.items() if file != "README.md"}
    before = len(hub)
    assert run(monkeypatch, name, tmp_path / "model") == 0
    assert len(hub) == before + 1  # the listing alone


@pytest.mark.parametrize(
    "name, said", [("x/bare", "x/bare has no tokenizer.json, model.safetensors"), ("x/none", "cannot reach")]
)
def test_what_cannot_be_had_is_said_in_one_line(hub, monkeypatch, tmp_path, capsys, name, said):
    assert run(monkeypatch, name, tmp_path / "model") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("download_hf.py: error: ") and said in printed and printed.count("\n") == 1
    assert not list((tmp_path / "model").iterdir())


def test_a_folder_holds_one_model(hub, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "x/small", tmp_path / "model") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert run(monkeypatch, "x/other", tmp_path / "model") == 2
    printed = capsys.readouterr().err
    assert "is not x/other's config.json" in printed and "choose another folder" in printed and printed.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    # Nor does a damaged file pass for a whole one.
    (tmp_path / "model/model.safetensors").write_bytes(before["model.safetensors"][:-1] + b"x")
    assert run(monkeypatch, "x/small", tmp_path / "model") == 2


def test_what_was_interrupted_goes_on_only_with_its_own_bytes(hub, monkeypatch, tmp_path):
    folder, real = tmp_path / "model", recipes.fetch

    class Cut:
        """An answer of which 1,000 bytes come."""

        def __init__(self, answer):
            self.answer, self.left = answer, 1000
            self.status, self.headers = answer.status, answer.headers

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.answer.close()

        def read(self, count):
            data, self.left = self.answer.read(min(count, self.left)), self.left - min(count, self.left)
            return data

    def cut(url, start=0):
        return Cut(real(url, start)) if url.endswith("/model.safetensors") else real(url, start)

    for name in ("x/other", "x/small"):
        monkeypatch.setattr(recipes, "fetch", cut)
        assert run(monkeypatch, name, folder) == 1
        [part] = [path for path in folder.iterdir() if path.name.endswith(".part")]
        assert part.stat().st_size == 1000
        for file in ("config.json", "tokenizer.json"):
            (folder / file).unlink()
    (folder / "model.safetensors.part").write_bytes(OTHER["model.safetensors"][:1000])  # an earlier program's
    monkeypatch.setattr(recipes, "fetch", real)
    assert run(monkeypatch, "x/small", folder) == 0
    got = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert got == {file: body for file, body in FILES.items() if file != "README.md"}
