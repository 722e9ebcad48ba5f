"""demo.sh on a text of one's own, up to the training."""

import shutil

from recipe_testing import ROOT, call


def test_a_demo_stays_until_a_new_text_proves_usable(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/demo.sh", tmp_path / "scripts")
    (tmp_path / "scripts/plot_loss.py").touch()
    for name in ("data", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "train_gpt2").write_text("#!/bin/sh\nmkdir demo/run\n")
    (tmp_path / "train_gpt2").chmod(0o755)
    (tmp_path / "good.txt").write_text((ROOT / "README.md").read_text() * 4)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "strange.txt").write_bytes(b"\xff" * 9000)
    assert call(tmp_path / "scripts/demo.sh", tmp_path / "good.txt").returncode == 0
    (tmp_path / "demo/run/mine").touch()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    for text in ("none.txt", "short.txt", "strange.txt"):
        done = call(tmp_path / "scripts/demo.sh", tmp_path / text)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before
    assert call(tmp_path / "scripts/demo.sh", tmp_path / "good.txt").returncode == 0
    assert not (tmp_path / "demo/run/mine").exists() and (tmp_path / "demo/tokens/train_000000.bin").exists()
