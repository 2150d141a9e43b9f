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
    """Lines of rollouts.jsonl."""


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
        responses=[line for line, _ in read_lines(folder.rollouts)],
    )
