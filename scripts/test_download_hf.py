"""download_hf.py against a small web server in place of the hub."""

import http.server
import json
import threading

import pytest

import download_hf
import recipes

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


@pytest.fixture
def hub(monkeypatch):
    """Models by name, and what was asked for."""
    models = {"x/small": FILES, "x/large": SHARDS, "x/bare": {"config.json": b"{}", "pytorch_model.bin": b""}}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            for name, files in models.items():
                if self.path == f"/api/models/{name}/tree/main":
                    return self.answer(json.dumps([{"type": "file", "path": path} for path in files]).encode())
                file = self.path.removeprefix(f"/{name}/resolve/main/")
                if file in files:
                    return self.answer(files[file])
            self.send_error(404)

        def answer(self, body):
            self.send_response(200)
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
