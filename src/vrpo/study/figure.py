"""The figures of a study: learning curves, accuracy against noise, and what the critics knew."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill, wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vrpo.config.rewards import FlipNoise
from vrpo.study.config import Cell
from vrpo.study.results import COMPARED, Row
from vrpo.study.sharpness import EQUAL
from vrpo.study.statistics import FEWEST_FOR_TRIMMING, Estimate, interquartile_mean
from vrpo.train.folder import RunFolder

COLOURS = (
    "#0b6e99", "#d9730d", "#6b6b6b", "#448361", "#9065b0", "#c14c8a", "#a3830b", "#3aa6a0", "#b5442c", "#5567c9", "#8c5a3c", "#1f1f1f",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "vrpo",
    "svg.fonttype": "none",  # text stays text: the browser has fonts for more scripts
    "text.parse_math": False,  # names are the user's: a $ in them begins no formula
}
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
"""Of the first dozen methods, and of those to which the colours come again."""
SMOOTHING = 10
"""Steps averaged in the curves of explained variance: a single step's is mostly noise."""

LABEL_WIDTH, TITLE_WIDTH, LEGEND_WIDTH = 16, 44, 36
"""Characters of a line of a label below an axis, of a panel's title, and of a method in a legend."""

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
            critics, {label: partial(_explained_variance, out=out)}, looks=_looks(cells)
        )
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        # the date would make every drawing another file
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    return [out / f"{name}.svg" for name in figures]


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn in every figure."""

    colour: str
    line: str
    marker: str


def _looks(cells: Sequence[Cell]) -> dict[str, Look]:
    methods = dict.fromkeys(cell.method for cell in cells)
    return {
        method: Look(
            COLOURS[i % len(COLOURS)], *(styles[i // len(COLOURS) % 4] for styles in (LINES, MARKERS))
        )
        for i, method in enumerate(methods)
    }


def _height(wanted: float, cells: Sequence[Cell]) -> float:
    """Inches: at least what the legend takes."""
    lines = sum(len(wrap(method, LEGEND_WIDTH)) or 1 for method in {cell.method for cell in cells})
    return max(wanted, 0.8 + 0.21 * lines)


def new_figure(width: float, height: float = 3.6) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(
    cells: Sequence[Cell],
    reads: Mapping[str, Callable[[Sequence[Cell]], Series]],
    *,
    looks: Mapping[str, Look] | None = None,
) -> Figure:
    """One column per noise, one row per number, one line per method with the interval of its interquartile mean over seeds."""
    noises = list(dict.fromkeys(cell.noise for cell in cells))
    looks = looks or _looks(cells)
    with mpl.rc_context(STYLE):
        figure = new_figure(2.8 + 4.2 * len(noises), _height(0.6 + 3.0 * len(reads), cells))
        grid = figure.subplots(len(reads), len(noises), sharex="col", sharey="row", squeeze=False)
        for row, (label, read) in zip(grid, reads.items(), strict=True):
            for panel, noise in zip(row, noises, strict=True):
                for method in dict.fromkeys(cell.method for cell in cells):
                    runs = [c for c in cells if c.noise == noise and c.method == method]
                    if runs:  # none of them may have finished
                        _line(panel, *read(runs), look=looks[method], label=method)
                panel.grid(alpha=0.25)
            row[0].set_ylabel(label)
        for top, bottom, noise in zip(grid[0], grid[-1], noises, strict=True):
            top.set_title(fill(noise, TITLE_WIDTH))
            bottom.set_xlabel("step")
        _legend(figure, grid.flat, _several_seeds(Counter((c.method, c.noise) for c in cells).values()))
    return figure


def _several_seeds(counts: Collection[int]) -> str | None:
    """What bands and bars are, over how many seeds; None where everything is one run."""
    fewest, most = min(counts), max(counts)
    if most == 1:
        return None
    what = (
        "interquartile mean and\n95 % interval"
        if fewest >= FEWEST_FOR_TRIMMING
        else "mean and interval\n(narrow with few seeds)"
    )
    return f"{what}, {most if fewest == most else f'{fewest} to {most}'} seeds"


def _legend(figure: Figure, panels: Iterable[Any], title: str | None = None) -> None:
    """Every method once: under one noise it may have no runs."""
    named = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    words = [fill(name, LEGEND_WIDTH) for name in named]
    figure.legend(list(named.values()), words, frameon=False, title=title, loc="outside right upper")


def _line(panel: Any, steps: np.ndarray, numbers: np.ndarray, *, look: Look, label: str) -> None:
    # a gap in one run is a gap in the line
    estimates = [
        interquartile_mean(column.tolist()) if np.isfinite(column).all() else None for column in numbers.T
    ]
    middle, low, high = np.array(
        [(e.value, e.low, e.high) if e else (None, None, None) for e in estimates], dtype=np.float64
    ).reshape(-1, 3).T  # fmt: skip
    marker = look.marker if len(steps) <= 30 else None
    panel.plot(
        steps, middle, color=look.colour, linestyle=look.line, label=label, linewidth=2, marker=marker, markersize=3
    )  # fmt: skip
    if np.isfinite(low).any():
        panel.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0)


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

    Over the flip rate, with lines between, when the noises of the study are symmetric flips of different rates, or none, and nothing
    else; side by side otherwise.
    """
    noises = list(dict.fromkeys(row.noise for row in rows))
    rates = _flip_rates([cell for cell in cells if cell.noise in noises])
    places = rates or {noise: float(i) for i, noise in enumerate(noises)}
    with mpl.rc_context(STYLE):
        known = {by: name for by, name in COMPARED.items() if any(row.estimates.get(name) for row in rows)}
        figure = new_figure(max(6.0, 3.0 + 1.3 * len(noises)), _height(3.3 * len(known), cells))
        panels = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (by, name) in zip(panels, known.items(), strict=True):
            _points(panel, rows, name, places, _looks(cells), between=rates is not None)
            panel.set_ylabel(f"final clean accuracy, {by}")
            panel.grid(alpha=0.25, axis="y")
        if rates:
            panels[-1].set_xlabel("share of rewards flipped")
        else:
            panels[-1].set_xticks(range(len(noises)), [fill(noise, LABEL_WIDTH) for noise in noises])
        _legend(figure, panels, _several_seeds([len(row.seeds) for row in rows]))
    return figure


def _points(
    panel: Any,
    rows: Sequence[Row],
    name: str,
    places: Mapping[str, float],
    looks: Mapping[str, Look],
    *,
    between: bool,
) -> None:
    """The number `name` of every method at each noise's place on the axis, with lines `between` them."""
    # all methods of a noise stand nearer to its place than to the next one's
    width = min(0.004, 0.03 / len(looks)) if between else min(0.12, 0.8 / len(looks))
    for number, (method, look) in enumerate(looks.items()):
        aside = (number - (len(looks) - 1) / 2) * width
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
        _with_intervals(panel, x, estimates, look, label=method, linestyle=look.line if between else "none")


def _with_intervals(
    panel: Any, x: Sequence[float], estimates: Sequence[Estimate], look: Look, **style: Any
) -> None:
    y = np.array([e.value for e in estimates])
    ends = np.array(
        [[e.low, e.high] for e in estimates], dtype=np.float64
    ).T  # one run has none: NaN is not drawn
    panel.errorbar(
        x, y, yerr=np.abs(ends - y), color=look.colour, marker=look.marker, markersize=4, capsize=3, **style
    )


def accuracy_against_entropy(rows: Sequence[Row], cells: Sequence[Cell]) -> Figure:
    """Sampled accuracy over entropy, a panel per noise, a line per method through its temperatures, hottest right."""
    noises = list(dict.fromkeys(row.noise for row in rows))
    looks = _looks(cells)
    with mpl.rc_context(STYLE):
        figure = new_figure(2.8 + 4.2 * len(noises), _height(3.8, cells))
        grid = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
        for panel, noise in zip(grid, noises, strict=True):
            for row in (row for row in rows if row.noise == noise):
                _sharpness_line(panel, row, looks[row.method])
            level = next(row.estimates["equal_entropy"] for row in rows if row.noise == noise)
            assert level is not None, "it is of the noise, not of the run"
            panel.axvline(level.value, color="#999999", linewidth=1, linestyle=":")
            panel.set_title(fill(noise, TITLE_WIDTH))
            panel.set_xlabel("entropy, nats a token")
            panel.grid(alpha=0.25)
        grid[0].set_ylabel("final clean accuracy, sampled")
        seeds = _several_seeds([len(row.seeds) for row in rows])
        _legend(figure, grid, "final policies at\nseveral temperatures" + (f":\n{seeds}" if seeds else ""))
    return figure


def _sharpness_line(panel: Any, row: Row, look: Look) -> None:
    names = [name.removeprefix("entropy_at_") for name in row.estimates if name.startswith("entropy_at_")]
    both = [(row.estimates[f"entropy_at_{t}"], row.estimates[f"sampled_at_{t}"]) for t in names]
    points = [(entropy.value, accuracy) for entropy, accuracy in both if entropy and accuracy]
    entropies, accuracies = zip(*points, strict=True)
    _with_intervals(panel, entropies, accuracies, look, label=row.method, linestyle=look.line)


def _flip_rates(cells: Sequence[Cell]) -> dict[str, float] | None:
    """Noise -> rate, if all are symmetric flips of different rates, or none, of the same judge on the same task."""
    rates: dict[str, float] = {}
    first = cells[0].config
    for cell in cells:
        config = cell.config
        judge = config.rewards.model_copy(update={"noise": first.rewards.noise})
        if (config.task, judge) != (first.task, first.rewards):
            return None
        match cell.config.rewards.noise:
            case ():
                rates[cell.noise] = 0.0
            case (FlipNoise(false_positive=a, false_negative=b),) if a == b:
                rates[cell.noise] = a
            case _:
                return None
    return rates if len(rates) > 1 and len(set(rates.values())) == len(rates) else None
