"""A step's data, ready to learn from: what stages 1 to 5 made, and how far stage 6 has come.

Until a `Prepared` exists nothing of the learner has changed, so a stop before that loses a step's sampling and
nothing else. From then on the weights move: a stop in between writes the `Prepared` beside the half-learned
weights, and the resumed run goes on with the very same data at the very next minibatch.

    paused/batch.safetensors   the tensors of the annotated batch
    paused/step.json           everything else
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vrpo.algorithms.critic_objective import CriticState
from vrpo.train.clock import Clock
from vrpo.train.update import UpdateStats
from vrpo.types import Batch, Metrics

BATCH_FILE, STEP_FILE = "batch.safetensors", "step.json"


@dataclass(slots=True, kw_only=True)
class Prepared:
    """Everything a step needs from here on."""

    step: int
    batch: Batch
    """Annotated: advantages and value targets are in it."""
    metrics: Metrics
    """What is known before the first weight moves."""
    rows: Sequence[dict[str, Any]]
    """Lines for rollouts.jsonl."""
    tokens: int
    """Completion tokens."""
    critic_state: CriticState
    """The critic objective's memory after it has seen this batch."""
    critic: UpdateStats = field(default_factory=UpdateStats)
    """The critic's passes so far."""
    denoiser: UpdateStats = field(default_factory=UpdateStats)
    """The denoiser's pass so far."""
    policy: UpdateStats = field(default_factory=UpdateStats)
    """The policy's passes so far."""
    clock: Clock = field(default_factory=Clock)

    def save(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        tensors = {
            # a copy: two names of one tensor, such as rewards nothing has denoised yet, are refused
            name: value.detach().cpu().contiguous().clone()
            for name in Batch.__dataclass_fields__
            if isinstance(value := getattr(self.batch, name), Tensor)
        }
        save_file(tensors, folder / BATCH_FILE)
        # the critic's memory is the learner's by then, and is saved with it
        data = {
            "step": self.step,
            "sample_ids": self.batch.sample_ids,
            "metrics": self.metrics,
            "rows": self.rows,
            "tokens": self.tokens,
            "critic": self.critic.to_json(),
            "denoiser": self.denoiser.to_json(),
            "policy": self.policy.to_json(),
            "seconds": self.clock.seconds,
        }
        (folder / STEP_FILE).write_text(json.dumps(data), encoding="utf-8")


def load_prepared(folder: Path, critic_state: CriticState) -> Prepared:
    """What `Prepared.save` wrote, on the CPU.

    Args:
        folder: the checkpoint.
        critic_state: the critic objective's memory as the same checkpoint has it.
    """
    data = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
    return Prepared(
        step=data["step"],
        batch=Batch(sample_ids=tuple(data["sample_ids"]), **load_file(folder / BATCH_FILE)),
        metrics=data["metrics"],
        rows=data["rows"],
        tokens=data["tokens"],
        critic_state=critic_state,
        critic=UpdateStats.from_json(data["critic"]),
        denoiser=UpdateStats.from_json(data["denoiser"]),
        policy=UpdateStats.from_json(data["policy"]),
        clock=Clock(data["seconds"]),
    )
