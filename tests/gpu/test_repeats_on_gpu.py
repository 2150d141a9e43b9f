"""The same run twice, a run that was interrupted, and a run that changes its device: how far apart they end."""

import shutil
import signal

import pytest

import vrpo
from tests.gpu.device import DENOISED, ON_THE_DEVICE, largest_difference, on_device
from tests.smoke.test_runs import lines, run, same, weights
from vrpo.train import update
from vrpo.train.progress import Quiet
from vrpo.train.signals import Stopped

pytestmark = ON_THE_DEVICE

CLOSE = 1e-4
"""Weights of fp32 runs: one update of the policy moves a weight by as much."""

CASES = {
    "grpo": {"algorithm": "grpo"},
    "vrpo, denoiser, KL": DENOISED | {"algorithm": {"type": "vrpo", "kl_coef": 0.05}},
}


def compare(name, out, step: int, a: str, b: str) -> float:
    """Print whether the runs `a` and `b` are the same bits; how far apart their weights are."""
    found, wanted = weights(out / a, step), weights(out / b, step)
    apart = largest_difference(found, wanted)
    exact = same(found, wanted) and lines(out / a) == lines(out / b)
    print(f"{name}: {'the same bits' if exact else f'weights differ by up to {apart:.1e}'}")
    return apart


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_twice(tmp_path, name, dtype):
    config = on_device(CASES[name], dtype=dtype, checkpoint_every=0)
    for out in ("a", "b"):
        run(config, tmp_path / out)
    apart = compare(f"twice, {name}, {dtype}", tmp_path, 4, "a", "b")
    assert dtype == "bfloat16" or apart < CLOSE


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    config = on_device(CASES["vrpo, denoiser, KL"], dtype="float32")
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    run(config, tmp_path / "resumed", resume=True)
    assert compare("resumed between two steps", tmp_path, 4, "whole", "resumed") < CLOSE


def test_a_run_goes_on_from_the_middle_of_a_step(tmp_path, monkeypatch):
    """SIGTERM in the sixth pass over data, the denoiser's in step 2: `paused` holds the step, back on the device after."""
    config = on_device(CASES["vrpo, denoiser, KL"], dtype="float32")
    run(config, tmp_path / "whole")
    passes, shuffle = [], update._shuffle

    def interrupting(batch, random):
        passes.append(len(passes))
        if len(passes) == 6:
            signal.raise_signal(signal.SIGTERM)
        return shuffle(batch, random)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(update, "_shuffle", interrupting)
        run(config, tmp_path / "resumed")
    assert (tmp_path / "resumed" / "checkpoints" / "paused" / "manifest.json").is_file()
    run(config, tmp_path / "resumed", resume=True)
    assert compare("resumed inside a step", tmp_path, 4, "whole", "resumed") < CLOSE


def test_a_run_goes_on_on_a_cpu_and_comes_back(tmp_path):
    config = on_device(CASES["vrpo, denoiser, KL"], dtype="float32", steps=2)
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    for steps, settings in ((2, config), (3, elsewhere), (4, config)):
        train = settings.train.model_copy(update={"steps": steps})
        resumed = settings.model_copy(update={"train": train})
        vrpo.train(resumed, out=tmp_path / "run", resume=steps > 2, display=Quiet())
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2, 3, 4]
