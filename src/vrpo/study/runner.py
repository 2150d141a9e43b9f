"""Run a study's cells as processes of their own, and watch their run folders grow.

A finished cell (it has a summary.json and the same configuration) is not run again; an unfinished one is
resumed. A cell that fails does not keep the others from running; one that was told to stop, by a signal, ends the
study after the running ones end.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vrpo.config import Config, filled_in, read_yaml, to_yaml
from vrpo.errors import INPUT_ERRORS, CheckpointError, StorageError, VrpoError
from vrpo.study.config import Cell
from vrpo.train.same_run import changed_settings, reward_files

POLL_SECONDS = 0.5

WRONG_INPUT = 2
"""Exit status of a run whose input is wrong."""

STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
"""Exit statuses of a run that was told to stop: its own, and the system's before it listens or at a second signal."""

RAISED = re.compile(r"^Traceback \(most recent call last\):\n(?:(?:[ \t].*)?\n)*(\S.*)", re.MULTILINE)
"""A traceback and its error's first line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A cell whose run ended badly.

    Example: Failure(cell=..., status=1, cause="loss is nan at step 3", log=Path("out/ppo_none_s0/log.txt"))
    """

    cell: Cell
    status: int
    """Exit status of its process, or minus the signal that ended it."""
    cause: str
    """One line."""
    log: Path

    def __str__(self) -> str:
        return f"{self.cell.name}: {self.cause} (log: {self.log})"


class StudyError(VrpoError, RuntimeError):
    """Cells of a study failed, or one was stopped."""

    def __init__(self, message: str, *, failures: Sequence[Failure], exit_code: int) -> None:
        """Say what happened.

        Args:
            message: one line.
            failures: the cells that failed.
            exit_code: of the command.
        """
        super().__init__(message)
        self.failures = tuple(failures)
        self.exit_code = exit_code

    @classmethod
    def of(cls, failures: Sequence[Failure], *, whole: int) -> "StudyError":
        """Of the failed ones among `whole` cells; wrong input only if it is that in all of them."""
        return cls(
            f"{len(failures)} of {whole} runs failed; mend the cause, then run the same command again: it runs what is not finished "
            "(remove a run's folder to begin that run anew)",
            failures=failures,
            exit_code=WRONG_INPUT if all(f.status == WRONG_INPUT for f in failures) else 1,
        )


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int,
    console: Console,
    ended: Callable[[Cell], None] = lambda cell: None,
) -> list[Failure]:
    """Run what is not finished, `jobs` at a time, and tell `ended` of every cell whose run has ended well, then or before.

    Returns:
        The cells that failed.

    Raises:
        CheckpointError: a cell's folder holds a run with another configuration, or `out` can be no folder.
        StudyError: a cell was stopped by a signal.
        StorageError: the disk is full, or cannot be written.
    """
    _make_folder(out)
    done_before = finished(cells, out)
    failed = [failure for cell in done_before if (failure := _tell(ended, cell, out)) is not None]
    waiting = [cell for cell in cells if cell not in done_before]
    progress = _progress(console)
    running: list[_Running] = []
    stopped: Failure | None = None
    try:
        with progress:
            while running or (waiting and stopped is None):
                while waiting and len(running) < jobs and stopped is None:
                    running.append(_launch(waiting.pop(0), out, progress))
                time.sleep(POLL_SECONDS)
                for run in list(running):
                    if not _has_ended(run, progress):
                        continue
                    running.remove(run)
                    failure = _failure(run) or _tell(ended, run.cell, out)
                    if failure is not None and failure.status in STOPPED:
                        stopped = failure
                    elif failure is not None:
                        failed.append(failure)
    finally:
        # whatever ended the study ends its cells too: each writes a checkpoint and can be resumed
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
    if stopped is not None:
        message = (
            f"{stopped.cell.name} was stopped, and the study with it; run the same command again to go on"
        )
        status = stopped.status if stopped.status > 0 else 128 - stopped.status
        raise StudyError(message, failures=failed, exit_code=status)
    return failed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A cell at work."""

    cell: Cell
    folder: Path
    process: "subprocess.Popen[bytes]"
    task: TaskID
    log_start: int
    """Bytes that its log had before: earlier tries'."""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if path.is_file() else error.strerror
        raise CheckpointError(f"cannot make the folder {path}: {reason}; choose another --out") from error


def _launch(cell: Cell, out: Path, progress: Progress) -> _Running:
    """Start one cell; its output goes to log.txt in its folder."""
    folder = out / cell.folder
    resume = (folder / "config.yaml").exists()
    _make_folder(folder)
    command = [sys.executable, "-m", "vrpo.cli", "train", str(folder / "cell.yaml"), "--out", str(folder)]
    try:
        (folder / "cell.yaml").write_text(to_yaml(cell.config), encoding="utf-8")
        log = (folder / "log.txt").open("ab")
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}; make room, then run the same command again"
        ) from error
    with log:
        start = log.tell()
        # in a session of its own: Ctrl-C reaches the study alone, which tells each cell once; a second signal would end it at once
        process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    task = progress.add_task(cell.name, total=cell.config.train.steps, numbers="")
    return _Running(cell=cell, folder=folder, process=process, task=task, log_start=start)


def _has_ended(run: _Running, progress: Progress) -> bool:
    """Look after a run, and show how far it is."""
    status = run.process.poll()
    done, numbers = _state(run.folder)
    numbers = "failed" if status else numbers
    progress.update(run.task, completed=done, numbers=numbers)
    if status is None:
        return False
    progress.stop_task(run.task)
    if not progress.console.is_terminal:
        progress.console.print(f"{run.cell.name}: {done} steps, {numbers}", markup=False)
    return True


def _tell(ended: Callable[[Cell], None], cell: Cell, out: Path) -> Failure | None:
    """Call `ended`; what it raises is this cell's failure, and no other cell's."""
    try:
        ended(cell)
    except VrpoError as error:
        status = WRONG_INPUT if isinstance(error, INPUT_ERRORS) else 1
        return Failure(cell=cell, status=status, cause=str(error), log=out / cell.folder / "log.txt")
    return None


def _failure(run: _Running) -> Failure | None:
    """None for a run that has ended well."""
    status, log = run.process.returncode, run.folder / "log.txt"
    if status == 0:
        return None
    with log.open("rb") as file:
        file.seek(run.log_start)
        text = file.read().decode("utf-8", "replace")
    return Failure(cell=run.cell, status=status, cause=_cause(status, text), log=log)


def _cause(status: int, text: str) -> str:
    """Why a run failed, in one line, from its exit status and what it wrote."""
    if status < 0:
        memory = "; the system does that where memory runs out" if status == -signal.SIGKILL else ""
        return f"ended by signal {-status} ({signal.strsignal(-status)}){memory}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("vrpo: ") for line in lines if line.startswith("vrpo: ")]
    # after its error a process may still write warnings
    return [f"exit status {status} and no output", *lines[-1:], *RAISED.findall(text)[-1:], *told[-1:]][-1]


def finished(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells whose run has ended, in their order.

    Raises:
        CheckpointError: a cell's folder holds a run with another configuration.
    """
    done = [cell for cell in cells if _finished(cell, out / cell.folder)]
    _check_one_data(done, out)
    return done


def _check_one_data(cells: Sequence[Cell], out: Path) -> None:
    """Cells of one task have read the same rows and reward files, and these are still what they were."""
    first: dict[tuple[str, str], tuple[str, Path]] = {}
    for cell in cells:
        path = out / cell.folder / "run.json"
        inputs = json.loads(path.read_text(encoding="utf-8"))["inputs"] if path.exists() else {}
        try:
            now = reward_files(cell.config)
        except OSError:  # gone: nothing is run with them here
            now = {}
        for name, digest in inputs.items():
            if name == "initial model":  # with an adapter the seed has a part in it
                continue
            key = (name, repr(cell.config.task) if name == "data" else "")
            before, folder = first.setdefault(key, (digest, out / cell.folder))
            if digest != before:
                raise CheckpointError(
                    f"{name} is another in {folder} than in {out / cell.folder}: their numbers belong to different studies; remove the "
                    "folders of one kind to run their cells anew, or choose another --out"
                )
            if now.get(name, digest) != digest:
                raise CheckpointError(
                    f"{name} has changed since {out / cell.folder} was run; take the change back, remove the folders of finished cells "
                    "to run them anew, or choose another --out"
                )


def _finished(cell: Cell, folder: Path) -> bool:
    saved = folder / "config.yaml"
    if saved.exists():
        changed = changed_settings(filled_in(Config, read_yaml(saved)), cell.config.model_dump(mode="json"))
        if changed:
            key, (old, new) = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise CheckpointError(
                f"{folder} holds a run with another configuration: {key}={old!r}, now it is {new!r}{more}; take the change back, "
                "remove that folder to run the cell anew, or choose another --out"
            )
    return (folder / "summary.json").exists()


def _state(folder: Path) -> tuple[int, str]:
    """Steps done and the latest clean accuracy, read from the run folder."""
    done = _last_line(folder / "metrics.jsonl").get("step", 0)
    accuracy = _last_line(folder / "evaluations.jsonl").get("clean_greedy")
    return int(done), f"clean accuracy {accuracy:.3f}" if accuracy is not None else ""


TAIL = 1 << 16
"""Bytes of a record's end that are read for its last line, twice a second: many times one line."""


def _last_line(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with path.open("rb") as file:
        start = max(file.seek(0, os.SEEK_END) - TAIL, 0)
        file.seek(start)
        lines = file.read().splitlines(keepends=True)
    # the first may have lost its beginning, the last is perhaps being written
    whole = [line for line in (lines[1:] if start else lines) if line.endswith(b"\n")]
    return dict(json.loads(whole[-1])) if whole else {}
