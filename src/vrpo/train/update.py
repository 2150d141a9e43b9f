"""Minibatches, micro-batches, one optimizer step each: the only place that splits a step's data.

    batch ──shuffle prompts──> minibatches ──split──> micro-batches ──loss / minibatch's tokens──> gradient ──clip──> step

Samples of one prompt stay together, so that a model can read it once for all of them.

A loss is always handed its minibatch, so that it divides by the minibatch's counts: the gradient then does
not depend on how the minibatch was split.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vrpo.algorithms.base import Sums
from vrpo.errors import NumericsError
from vrpo.rng import stream
from vrpo.train.optim import parameters_of
from vrpo.types import Batch

LossFn = Callable[[Batch, Batch, int], tuple[Tensor, Sums]]
"""(micro-batch, its minibatch, pass over the data) -> its share of the loss, sums over its tokens."""

Split = Callable[[Batch], Iterable[tuple[Tensor, Batch]]]
"""A batch -> its micro-batches, each with its row numbers."""

MAX_SKIPPED_IN_A_ROW = 8
"""Optimizer steps that may be skipped one after the other, over steps of the loop too, before the run stops."""


class Paused(Exception):
    """The run was asked to stop between two micro-batches; the statistics say how far the update came."""


@dataclass(slots=True)
class UpdateStats:
    """What one step's passes over the data gave, and how far they are: enough to go on from a pause."""

    minibatches: int = 0
    """Minibatches dealt with so far, over all passes."""
    skipped_in_a_row: int = 0
    """Optimizer steps skipped since the last one that was made, earlier steps of the loop included."""
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Metric -> sum over all tokens seen; a token counts once per pass."""
    tokens: int = 0
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping, one per optimizer step."""
    skipped: int = 0
    """Optimizer steps not made because the gradient was not finite."""
    first: dict[str, float] = field(default_factory=dict)
    """The sums of the first minibatch, divided by its tokens: the weights have not moved yet there."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; floats come back bit for bit."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "UpdateStats":
        """What `to_json` gave."""
        stats = cls(**data)
        stats.sums = defaultdict(float, stats.sums)
        return stats

    def mean(self, name: str) -> float:
        """Token mean of a metric; NaN when no token was seen."""
        return self.sums[name] / self.tokens if self.tokens else math.nan

    @property
    def grad_norm(self) -> float:
        """Mean norm before clipping; NaN without a step."""
        return sum(self.grad_norms) / len(self.grad_norms) if self.grad_norms else math.nan


def update(
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss_fn: LossFn,
    *,
    epochs: int,
    minibatch: int,
    split: Split,
    max_grad_norm: float,
    seed: int,
    labels: tuple[str | int, ...],
    stats: UpdateStats | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> UpdateStats:
    """`epochs` passes over the batch in minibatches of `minibatch` sequences, each one optimizer step.

    The order of the prompts is drawn from the stream (seed, *labels, pass). A minibatch in which no token counts makes no
    step. A loss or gradient that is not finite makes no step either and is counted.

    Args:
        optimizer: of the weights that `loss_fn` differentiates.
        batch: the step's data, annotated.
        loss_fn: see `LossFn`.
        epochs: passes over the batch.
        minibatch: sequences of an optimizer step.
        split: cuts a minibatch into forward-backward passes; memory and time only.
        max_grad_norm: gradients are scaled down to this norm.
        seed: the run's seed.
        labels: name of the stream the order is drawn from; the first names the network in messages.
        stats: what is added to; one that has seen minibatches already goes on after them.
        pause: asked before every micro-batch.

    Raises:
        Paused: `pause` said so. The weights are those after `stats.minibatches`.
        NumericsError: MAX_SKIPPED_IN_A_ROW optimizer steps in a row were skipped. Its `batch` is the last minibatch.
    """
    stats = UpdateStats() if stats is None else stats
    parameters = list(parameters_of(optimizer))
    number = 0
    for epoch in range(epochs):
        order = _shuffle(batch, stream(seed, *labels, epoch))
        for rows in order.split(minibatch):
            number += 1
            if number <= stats.minibatches:
                continue
            whole = batch.select(rows.to(batch.input_ids.device))
            if whole.num_tokens:
                optimizer.zero_grad(set_to_none=True)
                loss, sums = _accumulate(whole, loss_fn, split=split, epoch=epoch, pause=pause)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
                finite = math.isfinite(norm) and math.isfinite(loss)
                if finite:
                    optimizer.step()
                _count(stats, whole, sums, norm=norm, finite=finite)
                if stats.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise NumericsError(
                        f"{stats.skipped_in_a_row} losses or gradients of the {labels[0]} in a row were not finite; lower its "
                        "learning rate, or look for extreme rewards among the tokens in worst_tokens.json",
                        batch=whole,
                    )
            stats.minibatches = number
    optimizer.zero_grad(set_to_none=True)
    return stats


def _accumulate(
    whole: Batch, loss_fn: LossFn, *, split: Split, epoch: int, pause: Callable[[], bool]
) -> tuple[float, dict[str, float]]:
    """Backward through every micro-batch of one optimizer step; the loss and the sums of its metrics."""
    total, sums = 0.0, defaultdict[str, float](float)
    for _, micro in split(whole):
        if pause():
            raise Paused
        if micro.num_tokens == 0:
            continue
        loss, part = loss_fn(micro, whole, epoch)
        loss.backward()
        total += float(loss.detach())
        for name, value in part.items():
            sums[name] += value
    return total, sums


def _count(stats: UpdateStats, whole: Batch, sums: Mapping[str, float], *, norm: float, finite: bool) -> None:
    """Add one minibatch to the statistics."""
    if not stats.first:  # minibatches without tokens make no step, so the weights have not moved
        stats.first = {name: value / whole.num_tokens for name, value in sums.items()}
    if not finite:
        stats.skipped += 1
        stats.skipped_in_a_row += 1
        return
    stats.skipped_in_a_row = 0
    stats.grad_norms.append(norm)
    stats.tokens += whole.num_tokens
    for name, value in sums.items():
        stats.sums[name] += value


def _shuffle(batch: Batch, random: np.random.Generator) -> Tensor:
    """Row numbers, prompts in random order, each with its samples."""
    groups = batch.group_ids.cpu().numpy()
    rank = random.permutation(int(groups.max()) + 1)
    return torch.from_numpy(np.argsort(rank[groups], kind="stable"))
