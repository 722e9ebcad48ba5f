"""The CUDA kernels train both families as the CPU's do: the same ten steps of a tiny model, under dev/simt and on the CPU."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import compare_losses  # noqa: E402

# fp32: the same sums in another order; the difference is carried through ten updates.
# bf16: the two builds round at other places (P is a float on the CPU, bf16 for the tensor cores). About 14 roundings of
# 2^-9 lie between a token and its logit, whose C = 128 terms they reach independently: 2^-9 · sqrt(14 / 128) = 6.5e-4
# of a logit, which is about 1 where the loss is 5, so 1.3e-4 of the loss; three times that for two builds and ten
# updates.
BOUNDS = {"": 1e-5, "-bf16": 4e-4}


def train(trainer, build, folder, shard, *options, **environment):
    done = subprocess.run(
        [ROOT / "build" / build / trainer, "--model", "tiny", "--vocab", "256", "--train", shard, "--out", folder,
         "--context", "70", "--batch", "2", "--tokens-per-step", "140", "--steps", "10", "--lr", "3e-3", "--warmup", "2",
         "--seed", "3", "--save-every", "0", *options], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], done.stdout + done.stderr


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("trainer", ["train_gpt2", "train_pythia"])
def test_ten_steps_under_simt_have_the_losses_of_the_cpu(tmp_path, trainer, precision):
    shard = tmp_path / "train.bin"
    subprocess.run([sys.executable, ROOT / "dev" / "markov_shard.py", shard, "--tokens", "4000"], check=True)
    cpu, _ = train(trainer, "cpu" + precision, tmp_path / "cpu", shard)
    simt, said = train(trainer, "simt" + precision, tmp_path / "simt", shard)
    assert "simt " + (precision[1:] or "fp32") in said
    want, got = ([line["loss"] for line in log if line["event"] == "step"] for log in (cpu, simt))
    assert len(want) == 10 and want[-1] < want[0] - 0.15
    worst = compare_losses.difference(want, got)
    print(f"largest relative difference: {worst:.2e}")
    assert worst <= BOUNDS[precision]
    norms = [[line["grad_norm"] for line in log if line["event"] == "step"] for log in (cpu, simt)]
    assert compare_losses.difference(*norms) <= 20 * BOUNDS[precision]


def test_any_order_of_dq_is_said_at_the_start_and_changes_the_losses_by_rounding_alone(tmp_path):
    shard = tmp_path / "train.bin"
    subprocess.run([sys.executable, ROOT / "dev" / "markov_shard.py", shard, "--tokens", "4000"], check=True)
    losses = {}
    for build, on_off in (("simt-bf16", "on"), ("simt-bf16", "off"), ("cpu-bf16", "off")):
        launches = tmp_path / f"launches-{build}-{on_off}"
        log, said = train("train_gpt2", build, tmp_path / f"{build}-{on_off}", shard, "--deterministic", on_off,
                          SIMT_LAUNCHES=str(launches))
        losses[build, on_off] = [line["loss"] for line in log if line["event"] == "step"]
        assert ("cannot be repeated to the bit" in said) == ((build, on_off) == ("simt-bf16", "off"))
        assert ("--deterministic off changes nothing here" in said) == (build == "cpu-bf16")
        if build == "simt-bf16":  # dQ in a fixed order has a kernel of its own
            assert ("dq_kernel" in launches.read_text()) == (on_off == "on")
    assert compare_losses.difference(losses["simt-bf16", "on"], losses["simt-bf16", "off"]) <= BOUNDS["-bf16"]
