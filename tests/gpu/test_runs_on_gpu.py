"""Every method takes a few steps on the device in the default precision, and what it writes is sound."""

import json
from typing import Any

import pytest
import torch

from tests.gpu.device import DENOISED, DEVICE, ON_THE_DEVICE, on_device
from tests.smoke.test_runs import lines, run, weights
from vrpo.train.catalogue import explain_metric

pytestmark = ON_THE_DEVICE

JUDGE = {"noise": [{"type": "length_bias", "coef": 0.3}]}
CASES: dict[str, dict[str, Any]] = {
    "grpo, KL in the loss": {"algorithm": {"type": "grpo", "kl_coef": 0.05}, "critic": None},
    "ppo": {"algorithm": "ppo"},
    "vrpo": {"algorithm": "vrpo", "critic": {"semantic": {"mode": "literal"}}},
    "vrpo, kl_ref": {
        "algorithm": {
            "type": "vrpo",
            "kl_coef": 0.05,
            "sibling_coverage": True,
            "lam_covered": 0.1,
            "sibling_correction": True,
        },
        "critic": {"semantic": {"mode": "kl_ref", "selector": "reference"}, "regression": "hl_gauss"},
    },
    "denoiser, flips": DENOISED | {"critic": {"features": "belief", "regression": "bce"}},
    "denoiser, gaussian, tokens": {
        "algorithm": "vrpo",
        "rewards": JUDGE,
        "critic": {"features": "uncertainty"},
        "denoiser": {"learning_rate": 1e-3, "channel": "gaussian", "nuisance": "tokens"},
    },
    "grpo, denoiser": {"algorithm": "grpo", "denoiser": {"learning_rate": 1e-3}},
    "borrowed trunk": {"critic": {"trunk": "policy", "semantic": {"mode": "off"}}},
    "lora": {"model": {"lora": {"rank": 4}}, "denoiser": {"learning_rate": 1e-3}},
    "activations computed again": {"train": {"activation_checkpointing": True}},
    "exact values": {"algorithm": "ppo", "critic": {"oracle": "answer"}},
}
FINITE = (
    "loss/",
    "objective/",
    "sampling/",
    "time/",
    "policy/grad_norm",
    "val/grad_norm",
    "denoiser/grad_norm",
)


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_ends_and_writes_its_summary(tmp_path, name):
    config = on_device(CASES[name], dtype="bfloat16", steps=3, checkpoint_every=0)
    summary = run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert 0.0 <= summary["clean_accuracy"]["final"]["greedy"] <= 1.0
    assert summary["skipped_updates"] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    bad = {key for record in records for key, x in record.items() if x is None and key.startswith(FINITE)}
    assert bad == set()
    assert {key for record in records for key in record if explain_metric(key) is None} == set()
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run", 3).values())
    print(f"{name}: sampler and trainer differ by a KL of {summary['sampler_trainer_kl_max']:.1e} at most")
    assert summary["sampler_trainer_kl_max"] < 0.01


def test_a_judge_is_found_out(tmp_path):
    """The channel's slopes come back from the device as text and numbers."""
    summary = run(on_device(CASES["denoiser, gaussian, tokens"], dtype="float32"), tmp_path / "run")
    liked = summary["judge_pays_for"]
    assert liked["a_token_more"] != 0.0
    assert len(liked["occurring"]) == 5


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has the process's peak")
def test_the_peak_is_that_of_the_device(tmp_path):
    run(on_device({"algorithm": "grpo"}, dtype="bfloat16", steps=1), tmp_path / "run")
    peak = torch.cuda.max_memory_allocated() / 2**30
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.0 < record["memory/peak_gib"] <= peak
    assert "memory/peak_gib" not in lines(tmp_path / "run")[-1]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["gpu"]
