"""From the cells' run folders to numbers over seeds: one row per method and noise, and comparisons with the first method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vrpo.study import sharpness
from vrpo.study.config import Cell
from vrpo.study.statistics import (
    FEWEST_FOR_TRIMMING,
    Estimate,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)
from vrpo.train.files import read_json
from vrpo.train.folder import RunFolder

Numbers = dict[str, float | None]
"""Name -> number of one run; None where the run has no such number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method under one noise, over its seeds."""

    method: str
    noise: str
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]
    """Name -> one number per seed."""
    estimates: Mapping[str, Estimate | None]
    """Name -> interquartile mean over the seeds that have the number; None where none has."""


COMPARED = {"greedy": "final_greedy", "sampled": "final_sampled", "equal entropy": sharpness.EQUAL}
"""What methods are compared by, and the number that is: final clean accuracy on held-out prompts. The last one where the
study samples at several temperatures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first method of a study against another, under one noise."""

    noise: str
    method: str
    other: str
    by: str
    """A key of `COMPARED`."""
    difference: Estimate
    """Paired by seed, over the seeds both have."""
    improvement: Estimate
    """Probability that a run of `method` ends above a run of `other`."""
    apart: bool | None
    """Whether the two methods' own intervals do not touch; None with too few seeds to say."""


def cell_numbers(folder: Path) -> Numbers:
    """The numbers of one finished run that a study compares."""
    summary = read_json(folder / "summary.json")
    accuracy = summary["clean_accuracy"]
    return {
        "first_greedy": accuracy["first"]["greedy"],
        "final_greedy": accuracy["final"]["greedy"],
        "final_sampled": accuracy["final"]["sampled"],
        "best_greedy": accuracy["best"]["greedy"],
        "judged": _where_some_are_not(accuracy["final"]),
        "final_denoiser": accuracy["final"].get("denoiser_greedy"),  # an earlier version did not ask
        "area": area_under_curve(RunFolder(folder).read_evaluations()),
        # nor did it write these
        **{name: summary.get(name) for name in ("calibration", "auc_end", "critic_accuracy")},
        **{
            name: summary[name]
            for name in (
                "seen_reward",
                "clean_reward",
                "explained_var",
                "explained_var_clean",
                "denoised_accuracy",
                "mean_length",
                "entropy",
                "kl",
                "tokens_per_second",
                "seconds_per_step",
            )
        },
    }


def _where_some_are_not(evaluation: Mapping[str, Any]) -> float | None:
    """Prompts that an accuracy is the mean of; None where it is of all."""
    judged = evaluation.get("judged")  # an earlier version did not count them
    return None if judged is None or judged == evaluation["prompts"] else float(judged)


def area_under_curve(evaluations: Sequence[Mapping[str, Any]]) -> float:
    """Mean greedy clean accuracy over the steps, by the trapezoid rule between evaluations."""
    steps = np.array([e["step"] for e in evaluations], dtype=np.float64)
    accuracy = np.array([e["clean_greedy"] for e in evaluations])
    if len(steps) == 1:
        return float(accuracy[0])
    return float(np.trapezoid(accuracy, steps) / (steps[-1] - steps[0]))


def collect(
    cells: Sequence[Cell], out: Path, curves: Mapping[str, sharpness.Curve] | None = None
) -> list[Row]:
    """One row per noise and method, in the study's order; with what `sharpness.measure` gave, if it did."""
    more = {} if curves is None else sharpness.numbers_of(curves, cells)
    grouped: dict[tuple[str, str], dict[int, Numbers]] = {}
    for cell in cells:
        numbers = cell_numbers(out / cell.folder) | more.get(cell.folder, {})
        grouped.setdefault((cell.noise, cell.method), {})[cell.seed] = numbers
    return [_row(method, noise, by_seed) for (noise, method), by_seed in grouped.items()]


def _row(method: str, noise: str, by_seed: Mapping[int, Numbers]) -> Row:
    names = list(next(iter(by_seed.values())))
    values = {name: tuple(numbers[name] for numbers in by_seed.values()) for name in names}
    known = {name: [x for x in column if x is not None] for name, column in values.items()}
    estimates = {name: interquartile_mean(column) if column else None for name, column in known.items()}
    return Row(method=method, noise=noise, seeds=tuple(by_seed), values=values, estimates=estimates)


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """The study's first method against each other one, under every noise that it has runs of."""
    found: list[Comparison] = []
    for first in (row for row in rows if row.method == first_method(rows)):
        found += [
            _comparison(first, other, by, pairs)
            for other in rows
            if other.noise == first.noise and other is not first
            for by, name in COMPARED.items()
            if (pairs := _pairs(first, other, name))
        ]
    return found


def first_method(rows: Sequence[Row]) -> str:
    """The one that no other comes before; under the first noise it may have no runs."""
    later = {row.method for before, row in pairwise(rows) if row.noise == before.noise}
    return next((row.method for row in rows if row.method not in later), rows[0].method)


def _pairs(first: Row, other: Row, name: str) -> list[tuple[float, float]]:
    """The number of both, for the seeds that have it of both."""
    ours, theirs = (dict(zip(row.seeds, row.values.get(name, ()), strict=False)) for row in (first, other))
    return [(a, b) for seed, a in ours.items() if a is not None and (b := theirs.get(seed)) is not None]


def _comparison(first: Row, other: Row, by: str, pairs: Sequence[tuple[float, float]]) -> Comparison:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    mine, its = (row.estimates[COMPARED[by]] for row in (first, other))
    assert mine is not None and its is not None, "there are pairs"
    return Comparison(
        noise=first.noise,
        method=first.method,
        other=other.method,
        by=by,
        difference=paired_difference(left, right),
        improvement=probability_of_improvement(left, right),
        apart=mine.apart_from(its) if len(pairs) >= FEWEST_FOR_TRIMMING else None,
    )


def summary(rows: Sequence[Row], *, seconds: float) -> dict[str, Any]:
    """What summary.json of a study holds: every number of every seed, estimates, comparisons."""
    return {
        "seconds": seconds,
        "rows": [
            {
                "noise": row.noise,
                "method": row.method,
                "seeds": row.seeds,
                "estimates": {k: None if e is None else asdict(e) for k, e in row.estimates.items()},
                "values": dict(row.values),
            }
            for row in rows
        ],
        "comparisons": [asdict(comparison) for comparison in compare(rows)],
    }
