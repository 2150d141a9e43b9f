"""The device these tests run on, and short runs on it with the model in the package.

VRPO_GPU_TESTS_DEVICE=cpu runs the same tests on a CPU, so that they can be written without a GPU.
"""

import os
from typing import Any

import pytest
import torch

from tests.smoke.test_runs import small
from vrpo.config import Config
from vrpo.config.presets import merge

DEVICE = os.environ.get("VRPO_GPU_TESTS_DEVICE", "cuda")

ON_THE_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # a warning of CUDA's libraries is to be seen, and is no failure of ours
    pytest.mark.filterwarnings("default"),
]
"""What every module of this folder sets as its `pytestmark`."""

DENOISED = {"algorithm": "vrpo", "denoiser": {"learning_rate": 1e-3, "capacity": 48}}
"""Policy, critic and denoiser: everything that a run can have three of."""


def on_device(settings: dict[str, Any], *, dtype: str, **train: Any) -> Config:
    """A run of four steps on the device; `settings` and `train` change the base of the smoke tests."""
    forced = {"model": {"device": DEVICE, "dtype": dtype}, "train": train}
    return small(**merge(settings, forced))


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over the weights of two checkpoints as `tests.smoke.test_runs.weights` reads them; moments and replay left out."""
    assert a.keys() == b.keys()
    names = [name for name in a if "optimizer" not in name and "state.safetensors" not in name]
    return max(float((a[name] - b[name]).abs().max()) for name in names)
