"""The run folder: what a run leaves behind.

config.yaml        the resolved configuration
environment.json   machine, versions, commit
metrics.jsonl      one line a step, written when the step is complete
rollouts.jsonl     some responses of every step with both rewards
evaluations.jsonl  one line an evaluation on held-out prompts
checkpoints/       step-N/
summary.json       final numbers
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from vrpo.config import read_yaml
from vrpo.errors import CheckpointError
from vrpo.types import EvalResult, ScoredRollout

ROLLOUTS_KEPT = 8
"""Responses of each step written to rollouts.jsonl."""

MAY_CHANGE = frozenset(
    f"train.{key}"
    for key in (
        "steps",
        "eval_every",
        "eval_prompts",
        "eval_samples",
        "checkpoint_every",
        "keep_checkpoints",
        "microbatch",
        "threads",
    )
) | {"model.device", "rollout.batch_size"}
"""Settings a resumed run may have otherwise than before; any other change would make it another run.

`train.steps` stretches what is a share of the run from there on: decaying learning rates and beta's warm-up.
"""


class RunFolder:
    """Writes and reads one run folder. Every line is flushed when it is written; whole files are replaced at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"

    def create(self, *, config_yaml: str, resume: bool) -> None:
        """Make the folder, or refuse one that already holds a run unless it is to be resumed."""
        saved = self.path / "config.yaml"
        if saved.exists() and not resume:
            raise CheckpointError(
                f"{self.path} already holds a run; add --resume to continue it, or choose another --out"
            )
        if resume and not saved.exists():
            raise CheckpointError(
                f"{self.path} holds no run to go on with; leave out --resume, or correct --out"
            )
        if resume:
            _check_same_run(read_yaml(saved), yaml.safe_load(config_yaml), self.path)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the run folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        for path in (self.metrics, self.rollouts, self.evaluations):
            path.touch()
        self.write("config.yaml", config_yaml)
        self.write_json("environment.json", environment())

    def write(self, name: str, text: str) -> None:
        """Replace a file at once: a reader sees the old text or the new, never half of it."""
        replace_file(self.path / name, text)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Replace a JSON file at once; NaN is written as null."""
        self.write(name, json.dumps(_finite(data), indent=2) + "\n")

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Add one line."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")

    def append_rollouts(self, step: int, scored: Sequence[ScoredRollout]) -> None:
        """Add the first few responses of a step, and every one whose reward failed."""
        for index, s in enumerate(scored):
            if index < ROLLOUTS_KEPT or s.errors:
                self.append(self.rollouts, {"step": step, **_readable(s)})

    def append_evaluation(self, step: int, result: EvalResult) -> None:
        """Add the clean accuracy at a step."""
        record = {
            "step": step,
            "clean_greedy": result.greedy,
            "clean_sampled": result.sampled,
            "prompts": result.prompts,
            "samples": result.samples,
            "missing": result.missing,
        }
        self.append(self.evaluations, record)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after `step`: a resumed run writes them again."""
        for path in (self.metrics, self.rollouts, self.evaluations):
            if path.exists():
                kept = [line for record, line in _lines(path) if record["step"] <= step]
                replace_file(path, "".join(kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [record for record, _ in _lines(self.metrics)]

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return [record for record, _ in _lines(self.evaluations)]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Complete lines of a JSONL file, parsed and raw; a last line without its newline was torn off and is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                record["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"line {number} of {path} is damaged; remove that line, or start the run again in another --out"
                ) from error
            yield record, line


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Machine, library versions and commit, for the record."""
    names = ("vrpo", "torch", "transformers", "numpy", "datasets", "peft", "math-verify", "pydantic")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": cuda,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree this package is imported from; None for an installed wheel."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _readable(s: ScoredRollout) -> dict[str, Any]:
    prompt = s.rollout.prompt
    return {
        "sample_id": s.rollout.sample_id,
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt if isinstance(prompt.prompt, str) else [dict(m) for m in prompt.prompt],
        "completion": s.rollout.completion,
        "stop": s.rollout.stop,
        "tokens": s.rollout.num_actions,
        "parts": dict(s.parts),
        "clean_reward": s.clean_reward,
        "reward": s.reward,
        "errors": list(s.errors),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume with settings that would make it another run."""
    old, new = _flat(before), _flat(now)
    changed = [
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key not in MAY_CHANGE
    ]
    if changed:
        key = min(changed)
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{folder} was started with {key}={old.get(key)!r}, now it is {new.get(key)!r}{more}; resume with the run's own "
            "config.yaml, or choose another --out"
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
