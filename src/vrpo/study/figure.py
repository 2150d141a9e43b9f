"""Clean accuracy against steps: one panel per noise, one line per method, a band over seeds."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vrpo.study.config import Cell
from vrpo.train.folder import RunFolder

COLOURS = ("#0b6e99", "#d9730d", "#6b6b6b", "#448361", "#9065b0", "#c14c8a")


def learning_curves(cells: Sequence[Cell], out: Path, path: Path) -> None:
    """Draw held-out clean accuracy (greedy) of every cell of a study and save it as PNG."""
    noises = list(dict.fromkeys(cell.noise for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.2 + 4.6 * len(noises), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(1, len(noises), sharey=True))
        for panel, noise in zip(panels, noises, strict=True):
            for method, colour in zip(methods, cycle(COLOURS), strict=False):
                runs = [c for c in cells if c.noise == noise and c.method == method]
                steps, accuracy = _curves(runs, out)
                panel.plot(
                    steps,
                    accuracy.mean(axis=0),
                    color=colour,
                    label=method,
                    linewidth=2,
                    marker="o",
                    markersize=3,
                )
                if len(runs) > 1:
                    panel.fill_between(
                        steps,
                        accuracy.min(axis=0),
                        accuracy.max(axis=0),
                        color=colour,
                        alpha=0.15,
                        linewidth=0,
                    )
            panel.set_title(noise)
            panel.set_xlabel("step")
            panel.grid(alpha=0.25)
        seeds = len({cell.seed for cell in cells})
        panels[0].set_ylabel("clean accuracy, held out")
        panels[0].legend(frameon=False, title=None if seeds == 1 else f"mean and range, {seeds} seeds")
        figure.savefig(path, dpi=150)


def _curves(runs: Sequence[Cell], out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps [E] and accuracies [seeds, E] of the evaluations all runs share."""
    read = [
        {e["step"]: e["clean_greedy"] for e in RunFolder(out / cell.folder).read_evaluations()}
        for cell in runs
    ]
    steps = sorted(set.intersection(*(set(r) for r in read)))
    return np.array(steps), np.array([[r[s] for s in steps] for r in read])
