"""Prompts to sampled responses, and responses to padded batches."""

from vrpo.rollout.collate import collate
from vrpo.rollout.engine import Engine
from vrpo.rollout.torch_engine import TorchEngine

__all__ = ["Engine", "TorchEngine", "collate"]
