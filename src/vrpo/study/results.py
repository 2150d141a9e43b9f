"""From the cells' run folders to one row per method and noise, and summary.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vrpo.study.config import Cell

COLUMNS = {
    "before": "first_greedy",
    "final": "final_greedy",
    "best": "best_greedy",
    "seen": "seen_reward",
    "clean": "clean_reward",
    "EV": "explained_var",
    "EV clean": "explained_var_clean",
    "tok/s": "tokens_per_second",
}
"""Table heading -> number of a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method under one noise, over its seeds."""

    method: str
    noise: str
    seeds: int
    mean: dict[str, float | None]
    low: dict[str, float | None]
    """Smallest over seeds."""
    high: dict[str, float | None]


def cell_numbers(summary: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of one run that a study compares."""
    accuracy = summary["clean_accuracy"]
    return {
        "first_greedy": accuracy["first"]["greedy"],
        "final_greedy": accuracy["final"]["greedy"],
        "final_sampled": accuracy["final"]["sampled"],
        "best_greedy": accuracy["best"]["greedy"],
        **{
            name: summary[name]
            for name in (
                "seen_reward",
                "clean_reward",
                "explained_var",
                "explained_var_clean",
                "mean_length",
                "entropy",
                "tokens_per_second",
                "seconds_per_step",
            )
        },
    }


def collect(cells: Sequence[Cell], out: Path) -> list[Row]:
    """One row per noise and method, in the study's order."""
    grouped: dict[tuple[str, str], list[dict[str, float | None]]] = {}
    for cell in cells:
        summary = json.loads((out / cell.folder / "summary.json").read_text())
        grouped.setdefault((cell.noise, cell.method), []).append(cell_numbers(summary))
    return [_row(method, noise, numbers) for (noise, method), numbers in grouped.items()]


def _row(method: str, noise: str, numbers: list[dict[str, float | None]]) -> Row:
    def over_seeds(reduce: Any) -> dict[str, float | None]:
        known = {name: [x for n in numbers if (x := n[name]) is not None] for name in numbers[0]}
        return {name: reduce(values) if values else None for name, values in known.items()}

    return Row(
        method=method,
        noise=noise,
        seeds=len(numbers),
        mean=over_seeds(lambda values: math.fsum(values) / len(values)),
        low=over_seeds(min),
        high=over_seeds(max),
    )


def table(rows: Sequence[Row]) -> Table:
    """Means over seeds; under an accuracy its smallest and largest when there are several seeds.

    before, final, best: held-out clean accuracy, greedy. seen, clean: mean reward of training samples over the
    last steps, with and without the noise. EV: the critic's explained variance of seen returns and clean outcomes.
    """
    noises = list(dict.fromkeys(row.noise for row in rows))
    result = Table(
        title=noises[0] if len(noises) == 1 else None,
        caption="before, final, best: held-out clean accuracy, greedy. seen, clean: mean reward of the last training "
        "samples with and without noise. EV: explained variance of the critic before its update.",
    )
    for heading in ("noise", "method") if len(noises) > 1 else ("method",):
        result.add_column(heading, no_wrap=True)
    for heading in COLUMNS:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        names = (row.noise, row.method) if len(noises) > 1 else (row.method,)
        result.add_row(*names, *(_cell(row, name) for name in COLUMNS.values()))
    return result


def _cell(row: Row, name: str) -> str:
    mean = row.mean[name]
    if mean is None:
        return "-"
    if name == "tokens_per_second":
        return f"{mean:,.0f}"
    if row.seeds > 1 and name.endswith("greedy"):
        return f"{mean:.3f}\n{row.low[name]:.3f}..{row.high[name]:.3f}"
    return f"{mean:.3f}"


def summary(rows: Sequence[Row], *, seconds: float) -> dict[str, Any]:
    """What summary.json of a study holds."""
    return {
        "seconds": seconds,
        "rows": [
            {
                "noise": r.noise,
                "method": r.method,
                "seeds": r.seeds,
                "mean": r.mean,
                "min": r.low,
                "max": r.high,
            }
            for r in rows
        ],
    }
