"""vrpo: post-train language models with reinforcement learning when the reward cannot be trusted.

    import vrpo
    trainer = vrpo.Trainer(model=..., reward_funcs=[...], train_dataset=..., config=vrpo.Config(algorithm="vrpo"))
    trainer.train()

Names are imported when first used: `vrpo.Config` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrpo import train as train
    from vrpo.config import Config as Config
    from vrpo.config import SftConfig as SftConfig
    from vrpo.train.api import Trainer as Trainer
    from vrpo.types import EvalResult as EvalResult

_HOME = {
    "Config": "vrpo.config",
    "SftConfig": "vrpo.config",
    "Trainer": "vrpo.train.api",
    "EvalResult": "vrpo.types",
}

__all__ = ["Config", "EvalResult", "SftConfig", "Trainer", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("train", "functional", "errors", "types", "config", "models", "rewards", "tasks"):
        return importlib.import_module(f"vrpo.{name}")
    raise AttributeError(f"module 'vrpo' has no attribute {name!r}")
