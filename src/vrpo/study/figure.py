"""The figures of a study: learning curves, accuracy against noise, and what the critics knew."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vrpo.config.rewards import FlipNoise
from vrpo.study.config import Cell
from vrpo.study.results import COMPARED, Row
from vrpo.study.sharpness import EQUAL
from vrpo.study.statistics import Estimate, interquartile_mean
from vrpo.train.folder import RunFolder

COLOURS = (
    "#0b6e99", "#d9730d", "#6b6b6b", "#448361", "#9065b0", "#c14c8a", "#a3830b", "#3aa6a0", "#b5442c", "#5567c9", "#8c5a3c", "#1f1f1f",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "vrpo",
}
SMOOTHING = 10
"""Steps averaged in the curves of explained variance: a single step's is mostly noise."""

LABEL_WIDTH = 16
"""Characters of a line of a label below an axis."""

Series = tuple[np.ndarray, np.ndarray]
"""Steps [E], numbers [seeds, E]."""


def draw_all(cells: Sequence[Cell], rows: Sequence[Row], out: Path) -> list[Path]:
    """Every figure of a study as PNG and SVG in `out`; the SVG paths."""
    figures = {
        "curves": _panels(
            cells,
            {
                f"clean accuracy, {answers}": partial(_accuracy, answers=answers, out=out)
                for answers in ("greedy", "sampled")
            },
        ),
        "noise": accuracy_against_noise(cells, rows),
    }
    if any(EQUAL in row.estimates for row in rows):
        figures["sharpness"] = accuracy_against_entropy(rows, cells)
    critics = [cell for cell in cells if cell.config.critic is not None]
    if critics:
        label = f"explained variance of clean outcomes,\nmean of {SMOOTHING} steps"
        figures["critics"] = _panels(
            critics, {label: partial(_explained_variance, out=out)}, colours=_colours(cells)
        )
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        # the date would make every drawing another file
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    return [out / f"{name}.svg" for name in figures]


def _colours(cells: Sequence[Cell]) -> dict[str, str]:
    methods = dict.fromkeys(cell.method for cell in cells)
    return dict(zip(methods, cycle(COLOURS), strict=False))


def new_figure(width: float, height: float = 3.6) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(
    cells: Sequence[Cell],
    reads: Mapping[str, Callable[[Sequence[Cell]], Series]],
    *,
    colours: dict[str, str] | None = None,
) -> Figure:
    """One column per noise, one row per number, one line per method with the interval of its interquartile mean over seeds."""
    noises = list(dict.fromkeys(cell.noise for cell in cells))
    colours = colours or _colours(cells)
    with mpl.rc_context(STYLE):
        figure = new_figure(2.8 + 4.2 * len(noises), 0.6 + 3.0 * len(reads))
        grid = figure.subplots(len(reads), len(noises), sharex="col", sharey="row", squeeze=False)
        for row, (label, read) in zip(grid, reads.items(), strict=True):
            for panel, noise in zip(row, noises, strict=True):
                for method in dict.fromkeys(cell.method for cell in cells):
                    runs = [c for c in cells if c.noise == noise and c.method == method]
                    if runs:  # none of them may have finished
                        _line(panel, *read(runs), colour=colours[method], label=method)
                panel.grid(alpha=0.25)
            row[0].set_ylabel(label)
        for top, bottom, noise in zip(grid[0], grid[-1], noises, strict=True):
            top.set_title(noise)
            bottom.set_xlabel("step")
        _legend(figure, grid.flat, _several_seeds(cells))
    return figure


def _several_seeds(cells: Sequence[Cell]) -> str | None:
    """What the bands are, over how many seeds; None where every line is one run."""
    counts = Counter((cell.method, cell.noise) for cell in cells).values()
    fewest, most = min(counts), max(counts)
    if most == 1:
        return None
    return f"interquartile mean and\n95 % interval, {most if fewest == most else f'{fewest} to {most}'} seeds"


def _legend(figure: Figure, panels: Iterable[Any], title: str | None = None) -> None:
    """Every method once: under one noise it may have no runs."""
    named = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(named.values()), list(named), frameon=False, title=title, loc="outside right upper")


def _line(panel: Any, steps: np.ndarray, numbers: np.ndarray, *, colour: str, label: str) -> None:
    whole = np.isfinite(numbers).all(axis=0)  # a gap in one run is a gap in the line
    steps, numbers = steps[whole], numbers[:, whole]
    estimates = [interquartile_mean(column.tolist()) for column in numbers.T]
    marker = "o" if len(steps) <= 30 else None
    panel.plot(
        steps,
        [e.value for e in estimates],
        color=colour,
        label=label,
        linewidth=2,
        marker=marker,
        markersize=3,
    )
    bands = [(e.low, e.high) for e in estimates]
    if bands and all(low is not None for low, _ in bands):
        low, high = zip(*bands, strict=True)
        panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _accuracy(runs: Sequence[Cell], *, answers: str, out: Path) -> Series:
    """Clean accuracy of `greedy` or `sampled` answers at the evaluations all runs share."""
    read = [
        {e["step"]: e[f"clean_{answers}"] for e in RunFolder(out / cell.folder).read_evaluations()}
        for cell in runs
    ]
    steps = sorted(set.intersection(*(set(r) for r in read)))
    return np.array(steps), np.array([[r[s] for s in steps] for r in read])


def _explained_variance(runs: Sequence[Cell], *, out: Path) -> Series:
    """val/explained_var_clean, averaged over the known ones of blocks of SMOOTHING steps; NaN where a block has none."""
    lines = [RunFolder(out / cell.folder).read_metrics() for cell in runs]
    length = min(map(len, lines))
    width = min(SMOOTHING, length)
    blocks = length // width if width else 0
    numbers = np.array(
        [[line.get("val/explained_var_clean") for line in run[: blocks * width]] for run in lines],
        dtype=np.float64,  # None becomes NaN
    ).reshape(len(lines), blocks, width)
    known = np.isfinite(numbers).sum(axis=2)
    mean = np.where(known > 0, np.nansum(numbers, axis=2) / np.maximum(known, 1), np.nan)
    return (np.arange(blocks) + 1) * width, mean


def accuracy_against_noise(cells: Sequence[Cell], rows: Sequence[Row]) -> Figure:
    """Final clean accuracy, one row per way to compare, one point per method and noise with its interval.

    Over the flip rate, with lines between, when every noise of the study is a symmetric flip or none; else side by side.
    """
    noises = list(dict.fromkeys(row.noise for row in rows))
    rates = _flip_rates(cells)
    places = rates or {noise: float(i) for i, noise in enumerate(noises)}
    with mpl.rc_context(STYLE):
        known = {by: name for by, name in COMPARED.items() if any(row.estimates.get(name) for row in rows)}
        figure = new_figure(max(6.0, 3.0 + 1.3 * len(noises)), 3.3 * len(known))
        panels = figure.subplots(len(known), 1, sharex=True)
        for panel, (by, name) in zip(panels, known.items(), strict=True):
            _points(panel, rows, name, places, _colours(cells), between=rates is not None)
            panel.set_ylabel(f"final clean accuracy, {by}")
            panel.grid(alpha=0.25, axis="y")
        if rates:
            panels[-1].set_xlabel("share of rewards flipped")
        else:
            panels[-1].set_xticks(range(len(noises)), [fill(noise, LABEL_WIDTH) for noise in noises])
        _legend(figure, panels)
    return figure


def _points(
    panel: Any,
    rows: Sequence[Row],
    name: str,
    places: Mapping[str, float],
    colours: Mapping[str, str],
    *,
    between: bool,
) -> None:
    """The number `name` of every method at each noise's place on the axis, with lines `between` them."""
    width, line = (0.004, "-") if between else (0.12, "none")
    for number, (method, colour) in enumerate(colours.items()):
        aside = (number - (len(colours) - 1) / 2) * width
        points = [
            (places[noise] + aside, estimate)
            for noise in sorted(places, key=places.__getitem__)
            for row in rows
            if (row.method, row.noise) == (method, noise)
            and (estimate := row.estimates.get(name)) is not None
        ]
        if not points:
            continue
        x, estimates = zip(*points, strict=True)
        _with_intervals(panel, x, estimates, color=colour, label=method, linestyle=line)


def _with_intervals(panel: Any, x: Sequence[float], estimates: Sequence[Estimate], **style: Any) -> None:
    y = np.array([e.value for e in estimates])
    ends = np.array([[e.value if end is None else end for end in (e.low, e.high)] for e in estimates]).T
    panel.errorbar(x, y, yerr=np.abs(ends - y), marker="o", markersize=4, capsize=3, **style)


def accuracy_against_entropy(rows: Sequence[Row], cells: Sequence[Cell]) -> Figure:
    """Sampled accuracy over entropy, a panel per noise, a line per method through its temperatures, hottest right."""
    noises = list(dict.fromkeys(row.noise for row in rows))
    colours = _colours(cells)
    with mpl.rc_context(STYLE):
        figure = new_figure(2.8 + 4.2 * len(noises), 3.8)
        grid = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
        for panel, noise in zip(grid, noises, strict=True):
            for row in (row for row in rows if row.noise == noise):
                _sharpness_line(panel, row, colours[row.method])
            level = next(row.estimates["equal_entropy"] for row in rows if row.noise == noise)
            assert level is not None, "it is of the noise, not of the run"
            panel.axvline(level.value, color="#999999", linewidth=1, linestyle=":")
            panel.set_title(noise)
            panel.set_xlabel("entropy, nats a token")
            panel.grid(alpha=0.25)
        grid[0].set_ylabel("final clean accuracy, sampled")
        _legend(figure, grid, "final policies at\nseveral temperatures")
    return figure


def _sharpness_line(panel: Any, row: Row, colour: str) -> None:
    names = [name.removeprefix("entropy_at_") for name in row.estimates if name.startswith("entropy_at_")]
    both = [(row.estimates[f"entropy_at_{t}"], row.estimates[f"sampled_at_{t}"]) for t in names]
    points = [(entropy.value, accuracy) for entropy, accuracy in both if entropy and accuracy]
    entropies, accuracies = zip(*points, strict=True)
    _with_intervals(panel, entropies, accuracies, color=colour, label=row.method)


def _flip_rates(cells: Sequence[Cell]) -> dict[str, float] | None:
    """Noise -> rate, if all are symmetric flips or none, and there are several."""
    rates: dict[str, float] = {}
    for cell in cells:
        match cell.config.rewards.noise:
            case ():
                rates[cell.noise] = 0.0
            case (FlipNoise(false_positive=a, false_negative=b),) if a == b:
                rates[cell.noise] = a
            case _:
                return None
    return rates if len(rates) > 1 else None
