"""The run folder: what a run leaves behind.

config.yaml        the resolved configuration
run.json           format of this folder, and hashes of what the configuration only names
environment.json   machine, versions, commit
sessions.jsonl     one line a process that worked on the run: when, where, from which step, what had changed
metrics.jsonl      one line a step, written when the step is complete
rollouts.jsonl     some responses of every step with both rewards, and what the critic made of their tokens
evaluations.jsonl  one line an evaluation on held-out prompts
warnings.jsonl     what the collapse watch saw
checkpoints/       step-N/, and paused/ after a stop in the middle of a step
summary.json       final numbers
"""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vrpo.config import Config, filled_in, read_yaml
from vrpo.errors import CheckpointError
from vrpo.train.files import append_line, finite, flush_file, read_lines, replace_file, storing
from vrpo.train.lock import RunLock
from vrpo.train.same_run import changed_settings, check_changes, not_exact_because
from vrpo.types import EvalResult

LABELS_FILE = "majority_labels.json"
"""Votes of the initial model, where noise asks for them."""

FORMAT = 2
"""Version of the layout above. 1 had no run.json."""


SUMMARY = "summary.json"
ENDS = (SUMMARY, "temperatures.json")
"""What is written of a run that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """What a process writes into the folder it has opened."""

    config_yaml: str
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    changes: Sequence[str]


class RunFolder:
    """Writes and reads one run folder. Every line is one write; whole files are replaced at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.warnings = self.path / "warnings.jsonl"
        self.sessions = self.path / "sessions.jsonl"
        self._lock: RunLock | None = None
        self._to_sign: _Session | None = None

    @property
    def records(self) -> tuple[Path, ...]:
        """Files with lines that belong to a step."""
        return (self.metrics, self.rollouts, self.evaluations, self.warnings)

    @property
    def ended(self) -> bool:
        """Whether the run has come to its last step."""
        return (self.path / SUMMARY).exists()

    def open(
        self, *, config_yaml: str, inputs: Mapping[str, str], resume: bool, allow_changes: bool = False
    ) -> list[str]:
        """Make the folder, or take one up again, and lock it until `close`. What it holds stays as it is until `sign`.

        Args:
            config_yaml: the resolved configuration.
            inputs: hashes of what it only names.
            resume: go on with the run the folder holds.
            allow_changes: whatever has changed.

        Returns:
            What has changed since the run was started, a line each.

        Raises:
            CheckpointError: the folder holds a run and is not to be resumed, or holds none and is; another
                process works in it; another version wrote it; changes that make it another run.
            StorageError: it cannot be written.
        """
        saved = self.path / "config.yaml"
        if saved.exists() and not resume and self._has_begun():
            raise CheckpointError(
                f"{self.path} already holds a run; add --resume (in Python resume=True) to continue it, or choose another --out (output_dir)"
            )
        if not resume and (other := self._not_a_runs()) is not None:
            raise CheckpointError(
                f"{self.path} holds {other!r}, which is no run's and would be written over; choose another --out (output_dir), or move "
                "it away"
            )
        if resume and not saved.exists():
            raise CheckpointError(
                f"{self.path} holds no run to go on with; leave out --resume (resume=True), or correct --out (output_dir)"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the run folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        self._lock = RunLock(self.path)
        changes, now = [], environment()
        identity = {"format": FORMAT, "inputs": dict(inputs)}
        if resume:
            before = self._read_run()
            changed = changed_settings(filled_in(Config, read_yaml(saved)), yaml.safe_load(config_yaml))
            names = dict.fromkeys([*inputs, *before["inputs"]])  # what is no longer there has changed too
            differing = [name for name in names if before["inputs"].get(name) != inputs.get(name)]
            changes = check_changes(self.path, changed, differing, allow_changes=allow_changes)
            changes += [f"not exact to the bit: {x}" for x in not_exact_because(self._environment(), now)]
        self._to_sign = _Session(config_yaml=config_yaml, identity=identity, environment=now, changes=changes)
        return changes

    def sign(self) -> None:
        """Write who works on what from here on, once nothing can refuse it any more; the end that a run had before is no end now."""
        session = self._to_sign
        assert session is not None, "open() comes first"
        for path in self.records:
            with storing(path):
                path.touch()
        for name in ENDS:
            (self.path / name).unlink(missing_ok=True)
        # config.yaml comes last: a folder that has it has everything
        self.write_json("run.json", session.identity)
        self.write_json("environment.json", session.environment)
        line = {"since": _now(), "pid": os.getpid(), "changes": session.changes, **session.environment}
        append_line(self.sessions, line)
        self.write("config.yaml", session.config_yaml)

    def _has_begun(self) -> bool:
        """Whether anything was recorded: a run that was refused at its first verdict can be started again."""
        kept = [*self.records, self.path / LABELS_FILE]
        return any(path.exists() and path.stat().st_size for path in kept) or any(self.checkpoints.glob("*"))

    def _not_a_runs(self) -> str | None:
        """A file that has one of our names although no run has been here; None where there is none."""
        if (self.path / "run.json").exists():
            return None
        names = ("config.yaml", "environment.json", self.sessions.name, LABELS_FILE, *ENDS)
        ours = [*(self.path / name for name in names), *self.records]
        return next((path.name for path in ours if path.exists() and path.stat().st_size), None)

    def close(self) -> None:
        """Give the lock back; again is no error."""
        if self._lock is not None:
            self._lock.release()

    def write(self, name: str, text: str) -> None:
        """Replace a file at once: a reader sees the old text or the new, never half of it."""
        replace_file(self.path / name, text)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Replace a JSON file at once; NaN is written as null."""
        self.write(name, json.dumps(finite(data), indent=2) + "\n")

    def append_step(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a complete step: its rows of rollouts.jsonl, then its line of metrics.jsonl."""
        for row in rows:
            append_line(self.rollouts, {"step": step, **row})
        append_line(self.metrics, {"step": step, **metrics})

    def append_evaluation(self, step: int, result: EvalResult) -> None:
        """Add the clean accuracy at a step."""
        record = {
            "step": step,
            "clean_greedy": result.greedy,
            "clean_sampled": result.sampled,
            "sampled_entropy": result.entropy,
            "best_sampled": result.best_sampled,
            "prompts": result.prompts,
            "judged": result.judged,
            "samples": result.samples,
            "missing": result.missing,
        }
        if result.denoiser_greedy is not None:
            record["denoiser_greedy"] = result.denoiser_greedy
        append_line(self.evaluations, record)

    def append_warning(self, step: int, kind: str, message: str) -> None:
        """Add what the collapse watch saw."""
        append_line(self.warnings, {"step": step, "kind": kind, "message": message})

    def flush(self) -> None:
        """Wait until the disk has every line: a checkpoint must not be safer than the records it continues."""
        for path in self.records:
            flush_file(path)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a torn one: a resumed run writes them again."""
        for path in self.records:
            if path.exists():
                kept = [line for record, line in read_lines(path) if record["step"] <= step]
                replace_file(path, "".join(kept))

    def check_record(self, step: int) -> None:
        """CheckpointError where metrics.jsonl lacks a step up to `step`, or has one twice."""
        found = [record["step"] for record in self.read_metrics() if record["step"] <= step]
        if found != list(range(1, step + 1)):
            wrong = next((i for i, s in enumerate(found, start=1) if s != i), len(found) + 1)
            raise CheckpointError(
                f"{self.metrics} has no step {wrong} in its place, the checkpoint is of step {step}; restore the file, or "
                "start the run again in another --out"
            )

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [record for record, _ in read_lines(self.metrics)]

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return [record for record, _ in read_lines(self.evaluations)]

    def read_warnings(self) -> list[dict[str, Any]]:
        """The lines of warnings.jsonl."""
        return [record for record, _ in read_lines(self.warnings)]

    def _read_run(self) -> dict[str, Any]:
        """run.json, of this version."""
        path = self.path / "run.json"
        try:
            data = dict(json.loads(path.read_text(encoding="utf-8")))
            written, inputs = data["format"], dict(data["inputs"])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path} has folder format 1, this version of vrpo goes on with format {FORMAT}; use the version "
                "that wrote it, or choose another --out"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged; choose another --out") from error
        if written != FORMAT:
            raise CheckpointError(
                f"{self.path} has folder format {written}, this version of vrpo goes on with format {FORMAT}; use the "
                "version that wrote it, or choose another --out"
            )
        return {"inputs": inputs}

    def _environment(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "environment.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # only says whether the result will be exact
            return {}


def environment() -> dict[str, Any]:
    """Machine, library versions and commit, for the record."""
    names = ("vrpo", "torch", "transformers", "numpy", "datasets", "peft", "math-verify", "pydantic")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": cuda,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": _commit(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _commit() -> str | None:
    """Commit of the source tree this package is imported from; None for an installed wheel."""
    tracked = _git(
        "ls-files", "--error-unmatch", Path(__file__).name
    )  # a virtual environment may lie in someone else's tree
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*arguments: str) -> str | None:
    """What git says in this file's folder; None where it does not answer, or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
