"""Run a study's cells as processes of their own, and watch their run folders grow.

A finished cell (it has a summary.json and the same configuration) is not run again; an unfinished one is
resumed. A cell that fails stops the study after the running ones end, and its log is named.
"""

import json
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
from vrpo.errors import CheckpointError, VrpoError
from vrpo.study.config import Cell

POLL_SECONDS = 0.5


class StudyError(VrpoError, RuntimeError):
    """A cell of a study failed."""


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int,
    console: Console,
    ended: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Run what is not finished, `jobs` at a time, and tell `ended` of every cell whose run has ended well, then or before.

    Raises:
        CheckpointError: a cell's folder holds a run with another configuration.
        StudyError: a cell failed; names its log.
    """
    out.mkdir(parents=True, exist_ok=True)
    done_before = finished(cells, out)
    for cell in done_before:
        ended(cell)
    waiting = [cell for cell in cells if cell not in done_before]
    progress = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    )
    running: dict[str, _Running] = {}
    failed: list[Cell] = []
    try:
        with progress:
            while running or (waiting and not failed):
                while waiting and len(running) < jobs and not failed:
                    cell = waiting.pop(0)
                    name = f"{cell.method} · {cell.noise} · seed {cell.seed}"
                    task = progress.add_task(name, total=cell.config.train.steps, numbers="")
                    running[cell.folder] = _Running(cell, _launch(cell, out), name, task)
                time.sleep(POLL_SECONDS)
                for folder, run in list(running.items()):
                    gone = run.process.poll() is not None
                    done, numbers = _state(out / folder)
                    progress.update(run.task, completed=done, numbers=numbers)
                    if not gone:
                        continue
                    del running[folder]
                    progress.stop_task(run.task)
                    if not console.is_terminal:
                        console.print(f"{run.name}: {done} steps, {numbers}")
                    if run.process.returncode == 0:
                        ended(run.cell)
                    else:
                        failed.append(run.cell)
    finally:
        # whatever ended the study ends its cells too: each writes a checkpoint and can be resumed
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
    if failed:
        log = out / failed[0].folder / "log.txt"
        reason = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise StudyError(f"{failed[0].folder} failed: {reason} (log: {log})")


@dataclass(frozen=True, slots=True)
class _Running:
    """A cell at work."""

    cell: Cell
    process: "subprocess.Popen[bytes]"
    name: str
    task: TaskID


def _launch(cell: Cell, out: Path) -> subprocess.Popen[bytes]:
    """Start one cell; its output goes to log.txt in its folder."""
    folder = out / cell.folder
    resume = (folder / "config.yaml").exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.yaml").write_text(to_yaml(cell.config), encoding="utf-8")
    command = [sys.executable, "-m", "vrpo.cli", "train", str(folder / "cell.yaml"), "--out", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*command, *(["--resume"] if resume else [])], stdout=log, stderr=subprocess.STDOUT
        )


def finished(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells whose run has ended, in their order.

    Raises:
        CheckpointError: a cell's folder holds a run with another configuration.
    """
    return [cell for cell in cells if _finished(cell, out / cell.folder)]


def _finished(cell: Cell, folder: Path) -> bool:
    saved = folder / "config.yaml"
    if saved.exists() and filled_in(Config, read_yaml(saved)) != cell.config.model_dump(mode="json"):
        raise CheckpointError(
            f"{folder} holds a run with another configuration; remove it or choose another --out"
        )
    return (folder / "summary.json").exists()


def _state(folder: Path) -> tuple[int, str]:
    """Steps done and the latest clean accuracy, read from the run folder."""
    done = _last_line(folder / "metrics.jsonl").get("step", 0)
    accuracy = _last_line(folder / "evaluations.jsonl").get("clean_greedy")
    return int(done), f"clean accuracy {accuracy:.3f}" if accuracy is not None else ""


def _last_line(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return dict(json.loads(whole[-1])) if whole else {}
