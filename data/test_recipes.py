"""The recipes against a small web server in place of the hub, and without a network."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

import recipes
from common import RunError
from testing import HERE, decode, prose, run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files by path, one connection cut in the middle."""
    stories = "\n<|endoftext|>\n".join(prose(2000, i) for i in range(300))
    state = {"cut": True, "asked": []}
    raw = tmp_path / "made"
    (tmp_path / "any.txt").write_text(prose(3000))
    assert run(tmp_path / "any.txt", "--out", raw, "--raw-bytes", "--min-tokens", 1) == 0
    files = {
        "/datasets/x/stories.txt": stories.encode(),
        "/x/y/tokenizer.json": (raw / "tokenizer.json").read_bytes(),
        "/api/datasets/d/tree/main/data": json.dumps([{"path": "data/b.parquet"}, {"path": "data/readme"}]).encode(),
        "/api/page2": json.dumps([{"path": "data/a.parquet"}]).encode(),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["asked"].append((self.path, self.headers.get("Range")))
            if self.path not in files:
                return self.send_error(404)
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            body = files[self.path][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if self.path.endswith("/data"):
                self.send_header("Link", f'<http://{self.headers["Host"]}/api/page2>; rel="next"')
            self.end_headers()
            if self.path.endswith("stories.txt") and state["cut"]:
                state["cut"] = False
                body = body[:1000]
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(recipes, "HUB", address)
    monkeypatch.setattr(recipes.time, "sleep", lambda _: None)
    monkeypatch.setitem(
        recipes.RECIPES,
        "tinystories",
        recipes.Recipe(
            "",
            recipes.fixed(f"{address}/datasets/x/stories.txt"),
            1,
            "x/y/tokenizer.json",
            0.1,
            split_on="<|endoftext|>",
        ),
    )
    yield state, stories, address
    server.shutdown()
    server.server_close()


def test_recipe_downloads_continues_and_prepares(hub, tmp_path, capsys):
    state, stories, address = hub
    assert run("--recipe", "tinystories", "--out", tmp_path / "out") == 0
    documents = decode(tmp_path / "out", "train") + decode(tmp_path / "out", "val")
    assert sorted(documents) == sorted(story.strip().encode() for story in stories.split("<|endoftext|>"))
    assert ("/datasets/x/stories.txt", "bytes=1000-") in state["asked"]  # continued, not begun again
    asked = len(state["asked"])
    assert run("--recipe", "tinystories", "--out", tmp_path / "out", "--force") == 0
    assert len(state["asked"]) == asked  # the downloads are kept
    # A listing of several pages, in the order of names.
    assert recipes.listed("d", "data", ".parquet")(0) == [
        f"{address}/datasets/d/resolve/main/data/{name}.parquet" for name in "ab"
    ]
    with pytest.raises(RunError, match="cannot download"):
        recipes.download(f"{address}/missing", str(tmp_path / "missing"))
    assert not (tmp_path / "missing").exists()


def test_a_network_that_is_not_there_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.time, "sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(RunError, match="needs the network"):
        recipes.download("http://127.0.0.1:9/stories", str(tmp_path / "stories"))  # nothing listens here


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_offline_say_so_in_one_line(name, tmp_path):
    nowhere = "http://127.0.0.1:9"  # nothing listens here
    environment = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, f"{HERE}/prepare.py", "--recipe", name, "--out", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "this recipe needs the network" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*.bin"))
