"""A run's curves: a panel for each question a person has about it. Of several runs, a colour each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vrpo.report.read import Record
from vrpo.study.figure import COLOURS, SMOOTHING, STYLE, new_figure
from vrpo.train.closing import name_of_clean

DASHES = ("-", "--", ":", "-.")
COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that are read together.

    Example: Panel("reward of the samples", {"as seen": "objective/scores", "clean": "objective/scores_clean"})
    """

    title: str
    lines: Mapping[str, str]
    """What a line is called -> its metric."""
    evaluated: bool = False
    """Whether they are numbers of evaluations, not of steps."""


PANELS = (
    Panel(
        "held-out clean accuracy",
        {"greedy": "clean_greedy", "sampled": "clean_sampled", "denoiser's model": "denoiser_greedy"},
        evaluated=True,
    ),
    Panel("reward of the samples", {"as seen": "objective/scores", "clean": "objective/scores_clean"}),
    Panel(
        "share of verdicts right",
        {
            "as seen": "noise/seen_accuracy",
            "denoised": "denoiser/accuracy",
            "critic's value": "val/verdict_accuracy",
        },
    ),
    Panel(
        "explained variance, before the update",
        {"of what it learns from": "val/explained_var", "of clean outcomes": "val/explained_var_clean"},
    ),
    Panel(
        "value ranks right above wrong (AUC)",
        {"last token": "val/auc_end", "middle": "val/auc_middle", "first": "val/auc_start"},
    ),
    Panel("calibration error of the value", {"": "val/calibration"}),
    Panel("entropy, nats a token", {"": "policy/entropy_avg"}),
    Panel("tokens a response", {"": "completions/mean_length"}),
    Panel("KL, nats a response", {"initial model": "objective/kl", "denoiser's model": "denoiser/kl"}),
    Panel(
        "prompts with equal rewards only",
        {"as seen": "noise/frac_zero_std_seen", "clean": "noise/frac_zero_std_clean"},
    ),
    Panel(
        "estimated error rates of the reward",
        {"rho+ learned": "denoiser/false_positive", "rho- learned": "denoiser/false_negative"},
    ),
    Panel(
        "gradient norm",
        {"policy": "policy/grad_norm", "critic": "val/grad_norm", "denoiser": "denoiser/grad_norm"},
    ),
)


def draw(records: Sequence[Record]) -> str:
    """The panels that any run has numbers for, as SVG. Numbers of steps are means over the last SMOOTHING steps."""
    panels = [panel for panel in PANELS if any(_known(record, panel) for record in records)]
    rows = max(-(-len(panels) // COLUMNS), 1)
    with mpl.rc_context(STYLE):
        figure = new_figure(4.4 * COLUMNS, 2.9 * rows)
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _fill(axes, panel, records)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if len(records) > 1:
            _name_runs(figure, records)
        drawing = StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue()


def _fill(axes: Any, panel: Panel, records: Sequence[Record]) -> None:
    axes.set_title(_title(panel, records), fontsize=10)
    axes.grid(alpha=0.25)
    drawn: dict[str, str] = {}
    for (label, name), dash in zip(panel.lines.items(), DASHES, strict=False):
        for record, colour in zip(records, cycle(COLOURS), strict=False):
            if name in _known(record, panel):
                axes.plot(*_curve(record, panel, name), dash, color=colour, linewidth=1.6)
                drawn[label] = dash
    if any(drawn):
        colour = COLOURS[0] if len(records) == 1 else "#555555"
        lines = [Line2D([], [], color=colour, linestyle=dash) for dash in drawn.values()]
        axes.legend(lines, list(drawn), frameon=False, fontsize=8)


def _title(panel: Panel, records: Sequence[Record]) -> str:
    """The panel's, but no accuracy where it cannot be a share."""
    if not panel.evaluated:
        return panel.title
    lines = [line for record in records for line in record.evaluations]
    known = [line[name] for name in panel.lines.values() for line in lines if line.get(name) is not None]
    return panel.title.replace("clean accuracy", name_of_clean(*known))


def _name_runs(figure: Figure, records: Sequence[Record]) -> None:
    """Which colour is which run, once for all panels."""
    lines = [Line2D([], [], color=colour) for _, colour in zip(records, cycle(COLOURS), strict=False)]
    names = [record.name for record in records]
    figure.legend(lines, names, frameon=False, loc="outside upper left", ncols=min(len(names), 4))


def _known(record: Record, panel: Panel) -> list[str]:
    """The panel's metrics that the run has a number of."""
    lines = record.evaluations if panel.evaluated else record.metrics
    return [name for name in panel.lines.values() if any(line.get(name) is not None for line in lines)]


def _curve(record: Record, panel: Panel, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and numbers; those of steps smoothed, NaN where there is none."""
    lines = record.evaluations if panel.evaluated else record.metrics
    x = np.array([line["step"] for line in lines], dtype=np.float64)
    y = np.array([np.nan if line.get(name) is None else line[name] for line in lines], dtype=np.float64)
    if panel.evaluated:
        return x, y
    known = ~np.isnan(y)
    sums, counts = (
        np.cumsum(np.insert(part, 0, 0.0)) for part in (np.where(known, y, 0.0), known.astype(float))
    )
    start = np.maximum(np.arange(len(y)) + 1 - SMOOTHING, 0)
    total, count = sums[1:] - sums[start], counts[1:] - counts[start]
    return x, np.where(count > 0, total / np.maximum(count, 1), np.nan)
