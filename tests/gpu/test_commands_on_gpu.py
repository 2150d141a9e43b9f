"""`vrpo plan`, `vrpo sft` and `vrpo eval` on the device."""

import pytest
import torch

from tests.gpu.device import DEVICE, ON_THE_DEVICE, on_device
from tests.smoke.test_runs import SMALL
from vrpo.cli import main
from vrpo.config import SftConfig, build, to_yaml
from vrpo.train.plan import computes_on, matmul_speed
from vrpo.train.sft import sft
from vrpo.train.target import open_target

pytestmark = ON_THE_DEVICE


def test_the_plan_measures_the_device_the_run_would_use(tmp_path, capsys):
    config = on_device({"algorithm": "grpo"}, dtype="auto")
    device, dtype = computes_on(config)
    assert (device.type, dtype) == (DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    speeds = {kind: matmul_speed(device, kind) for kind in {dtype, torch.float32}}
    assert speeds[dtype] >= speeds[torch.float32]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "config.yaml")])
    assert caught.value.code == 0
    with capsys.disabled():
        print({str(kind): f"{speed / 1e12:.1f} TFLOP/s" for kind, speed in speeds.items()})
    assert "GFLOP/s measured here" in " ".join(capsys.readouterr().out.split())


def test_a_warm_start_and_its_evaluation(tmp_path):
    settings = {key: SMALL[key] for key in ("task", "rollout")} | {
        "model": {"path": "vrpo:tiny", "device": DEVICE},
        "rewards": {"functions": [{"type": "exact"}]},
    }
    config = build(
        SftConfig, settings | {"sft": {"steps": 4, "batch": 16, "eval_every": 2, "eval_prompts": 16}}
    )
    result = sft(config, out=tmp_path / "model")
    assert result["steps"] == 4
    grpo = on_device({"algorithm": "grpo"}, dtype="auto")
    (tmp_path / "config.yaml").write_text(to_yaml(grpo))
    target = open_target(str(tmp_path / "model"), config_path=tmp_path / "config.yaml")
    assert target.policy.device.type == DEVICE
    assert 0.0 <= target.evaluate().greedy <= 1.0
