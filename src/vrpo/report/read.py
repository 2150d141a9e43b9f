"""A run folder as a report reads it. It writes nothing there, and takes no lock: a run may still be going on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrpo.config import Config, filled_in, read_yaml
from vrpo.errors import CheckpointError
from vrpo.train.files import read_lines
from vrpo.train.folder import RunFolder

Line = Mapping[str, Any]

STEPS_SHOWN = 4
"""Steps whose responses a page shows."""
BY_TOKEN = "by_token"
"""Key of a line with numbers for each token: the first few of a step, not those that are there for their errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run.

    Example: Record(name="a", method="vrpo", seed=0, steps=200, metrics=[{"step": 1, ...}], evaluations=[...], ...)
    """

    name: str
    method: str
    """The algorithm's name, and whether there is a denoiser."""
    seed: int
    steps: int
    """Steps that the configuration asks for."""
    metrics: Sequence[Line]
    """One a step."""
    evaluations: Sequence[Line]
    warnings: Sequence[Line]
    responses: Sequence[Line]
    """Lines of rollouts.jsonl: the first responses of a few steps, as many as a page shows."""


def read_run(path: Path, name: str) -> Record:
    """What a run has recorded so far.

    Args:
        path: the run folder.
        name: what to call it.

    Raises:
        CheckpointError: it holds no run, or a line of it is damaged.
    """
    if not (path / "config.yaml").is_file() or not (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} holds no run; give a folder that `vrpo train` or a Trainer has written"
        )
    folder = RunFolder(path)
    config = filled_in(Config, read_yaml(path / "config.yaml"))
    algorithm = config["algorithm"]["type"]
    return Record(
        name=name,
        method=f"{algorithm} with denoiser" if config.get("denoiser") else algorithm,
        seed=config["train"]["seed"],
        steps=config["train"]["steps"],
        metrics=folder.read_metrics(),
        evaluations=folder.read_evaluations(),
        warnings=folder.read_warnings(),
        responses=_shown(folder.rollouts),
    )


def _shown(rollouts: Path) -> list[Line]:
    """Lines of a few steps, from the first to the last. A long run has more tokens than memory wants to hold, so it is read twice."""
    steps = sorted({line["step"] for line, _ in read_lines(rollouts) if BY_TOKEN in line})
    last = len(steps) - 1
    chosen = {steps[round(i * last / (STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)} if steps else set()
    return [line for line, _ in read_lines(rollouts) if BY_TOKEN in line and line["step"] in chosen]
