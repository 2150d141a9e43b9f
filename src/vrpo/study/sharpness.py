"""Is it knowledge or sharpness? Final policies, sampled at several temperatures.

A policy sampled from softmax(logits / T) with T < 1 is sharper, more often right, and knows no more. So a sampled accuracy at the
training temperature compares methods only where their entropies are alike; this compares them at one entropy.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vrpo.errors import CheckpointError
from vrpo.models import Policy, load_policy
from vrpo.study.config import Cell
from vrpo.train.files import read_json, replace_file
from vrpo.train.target import Target, open_target

SAMPLES = 4
"""Sampled completions a held-out prompt and temperature."""
FILE = "temperatures.json"
"""What a cell's folder keeps of it."""
EQUAL = "sampled_at_equal_entropy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A final policy at one temperature.

    Example: Sampled(temperature=1.0, accuracy=0.497, entropy=0.41, kl=0.68)
    """

    temperature: float
    accuracy: float
    """Clean, of sampled answers to held-out prompts."""
    entropy: float
    """Nats a token."""
    kl: float | None = None
    """To the initial model, nats a response, at the training temperature; None at others, and where an earlier version sampled."""


Curve = tuple[Sampled, ...]
"""One final policy, hottest first."""


def measure(
    cells: Sequence[Cell], out: Path, temperatures: Sequence[float], *, console: Console
) -> dict[str, Curve]:
    """Sample every cell's final policy at every temperature that its folder does not have yet.

    Returns:
        Cell folder name -> curve.
    """
    shown = track(cells, "at other temperatures", console=console, disable=not console.is_terminal)
    return {cell.folder: measure_cell(out / cell.folder, temperatures) for cell in shown}


def measure_cell(folder: Path, temperatures: Iterable[float]) -> Curve:
    """The same of one cell.

    Raises:
        CheckpointError: a temperature is missing, and so is the policy: the study does not keep checkpoints.
    """
    path = folder / FILE
    kept = read_json(path) if path.exists() else []
    known = {one["temperature"]: Sampled(**one) for one in kept}
    wanted = sorted(set(temperatures), reverse=True)
    if missing := [t for t in wanted if t not in known]:
        if not (folder / "checkpoints").is_dir():
            raise CheckpointError(
                f"{folder} keeps no checkpoint to sample at temperature {missing[0]:g}; take it out of `temperatures`, or remove "
                "the folder to run the cell again"
            )
        final = open_target(str(folder))
        with closing(final.rewards):  # reward functions of a file have a process of their own
            for t in missing:
                result = final.evaluate(temperature=t, samples=SAMPLES)
                kl = (
                    final.kl_to(initial_model(final), result)
                    if t == final.config.rollout.temperature
                    else None
                )
                known[t] = Sampled(temperature=t, accuracy=result.sampled, entropy=result.entropy, kl=kl)
        replace_file(path, json.dumps([asdict(one) for one in known.values()], indent=1) + "\n")
    return tuple(known[t] for t in wanted)


def initial_model(target: Target) -> Policy:
    """What a run started from."""
    assert target.config.model is not None, "a run's configuration names its model"
    return load_policy(target.config.model)


def common_entropy(curves: Iterable[Curve]) -> float:
    """The largest entropy that all of them reach: the least of their hottest ones."""
    return min(max(one.entropy for one in curve) for curve in curves)


def accuracy_at(curve: Curve, entropy: float) -> float | None:
    """Accuracy of a policy at an entropy, on the straight line between the temperatures around it; None outside of them."""
    points = sorted((one.entropy, one.accuracy) for one in curve)
    entropies, accuracies = zip(*points, strict=True)
    if not entropies[0] <= entropy <= entropies[-1]:
        return None
    return float(np.interp(entropy, entropies, accuracies))


def numbers_of(curves: Mapping[str, Curve], cells: Sequence[Cell]) -> dict[str, dict[str, float | None]]:
    """Cell folder name -> numbers: accuracy and entropy at each temperature, accuracy at the entropy all cells of its noise reach."""
    found: dict[str, dict[str, float | None]] = {}
    for cell in cells:
        level = common_entropy(curves[other.folder] for other in cells if other.noise == cell.noise)
        curve = curves[cell.folder]
        found[cell.folder] = {EQUAL: accuracy_at(curve, level), "equal_entropy": level}
        for one in curve:
            accuracy, entropy = names_at(one.temperature)
            found[cell.folder] |= {accuracy: one.accuracy, entropy: one.entropy}
            if one.kl is not None:  # training has it only where a reference model is loaded
                found[cell.folder]["kl"] = one.kl
    return found


def names_at(temperature: float) -> tuple[str, str]:
    """What a row calls accuracy and entropy at a temperature."""
    return f"sampled_at_{temperature:g}", f"entropy_at_{temperature:g}"
