"""`expected.json`: what a study gave, where and from which commit, small enough to be kept beside its recipe."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vrpo.study.config import Cell
from vrpo.study.results import COMPARED, Row, compare
from vrpo.study.statistics import Estimate
from vrpo.train.files import read_json, replace_file

DIGITS = 4
MACHINE = ("platform", "cpus", "torch_threads", "gpu", "python")
"""Of a run's environment.json: what another machine may differ in."""
PACKAGES = ("torch", "transformers")


def record(
    cells: Sequence[Cell], rows: Sequence[Row], out: Path, *, command: Sequence[str], jobs: int
) -> dict[str, Any]:
    """The study in short.

    Args:
        cells: the study's runs.
        rows: what `collect` made of them.
        out: the study's folder.
        command: what ran it.
        jobs: runs at a time: seconds depend on it.

    Returns:
        command, date, commits (every one that a run came from; null for code outside a repository), machine, rows with
        estimates, the final accuracies seed by seed and their own commits, comparisons.
    """
    commits: dict[tuple[str, str], set[str | None]] = {}
    for cell in cells:
        environment = _environment(out, cell)
        commits.setdefault((cell.noise, cell.method), set()).add(environment["commit"])
    first = _environment(out, cells[0])
    return {
        "command": shlex.join(command),
        "date": datetime.now(UTC).date().isoformat(),
        "commits": sorted(set.union(*commits.values()), key=str),
        "machine": {name: first[name] for name in MACHINE}
        | {name: first["versions"][name] for name in PACKAGES}
        | {"runs_at_a_time": jobs},
        "rows": [_row(row) | {"commits": sorted(commits[row.noise, row.method], key=str)} for row in rows],
        "comparisons": [
            {"noise": c.noise, "method": c.method, "other": c.other, "by": c.by}
            | {"difference": _estimate(c.difference), "improvement": _estimate(c.improvement)}
            | {"apart": c.apart}
            for c in compare(rows)
        ],
    }


def write_record(
    path: Path, cells: Sequence[Cell], rows: Sequence[Row], out: Path, *, command: Sequence[str], jobs: int
) -> None:
    """Write what `record` gives as JSON."""
    short = record(cells, rows, out, command=command, jobs=jobs)
    replace_file(path, json.dumps(short, indent=1) + "\n")


def _environment(out: Path, cell: Cell) -> dict[str, Any]:
    return dict(read_json(out / cell.folder / "environment.json"))


def _row(row: Row) -> dict[str, Any]:
    return {
        "noise": row.noise,
        "method": row.method,
        "seeds": list(row.seeds),
        **{name: _estimate(estimate) for name, estimate in row.estimates.items()},
        **{
            f"{name}_by_seed": [_rounded(x) for x in row.values[name]]
            for name in COMPARED.values()
            if name in row.values
        },
    }


def _estimate(estimate: Estimate | None) -> Mapping[str, float | None] | None:
    return None if estimate is None else {name: _rounded(x) for name, x in asdict(estimate).items()}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, DIGITS)
