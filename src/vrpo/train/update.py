"""Minibatches, micro-batches, one optimizer step each: the only place that splits a step's data.

    batch ──shuffle──> minibatches ──split──> micro-batches ──loss / whole minibatch's tokens──> gradient ──clip──> step

A loss is always handed its minibatch, so that it divides by the minibatch's counts: the gradient then does
not depend on how the minibatch was split.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vrpo.algorithms.base import Sums
from vrpo.errors import NumericsError
from vrpo.rng import stream
from vrpo.train.optim import parameters_of
from vrpo.types import Batch

LossFn = Callable[[Batch, Batch, int], tuple[Tensor, Sums]]
"""(micro-batch, its minibatch, pass over the data) -> its share of the loss, sums over its tokens."""


@dataclass(slots=True)
class UpdateStats:
    """What one step's passes over the data gave."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Metric -> sum over all tokens seen; a token counts once per pass."""
    tokens: int = 0
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping, one per optimizer step."""
    skipped: int = 0
    """Optimizer steps not made because the gradient was not finite."""
    first: dict[str, float] = field(default_factory=dict)
    """The sums of the first minibatch, divided by its tokens: the weights have not moved yet there."""

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
    microbatch: int,
    max_grad_norm: float,
    seed: int,
    labels: tuple[str | int, ...],
) -> UpdateStats:
    """`epochs` passes over the batch in minibatches of `minibatch` sequences, each one optimizer step.

    The order is drawn from the stream (seed, *labels, pass). A minibatch in which no token counts makes no
    step. A gradient that is not finite makes no step either and is counted.

    Raises:
        NumericsError: no gradient of the whole batch was finite.
    """
    stats = UpdateStats()
    parameters = list(parameters_of(optimizer))
    for epoch in range(epochs):
        order = torch.from_numpy(stream(seed, *labels, epoch).permutation(len(batch)))
        for rows in order.split(minibatch):
            whole = batch.select(rows.to(batch.input_ids.device))
            if whole.num_tokens == 0:
                continue
            optimizer.zero_grad(set_to_none=True)
            sums = _accumulate(whole, loss_fn, microbatch=microbatch, epoch=epoch)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
            if not stats.first:  # minibatches without tokens make no step, so the weights have not moved
                stats.first = {name: value / whole.num_tokens for name, value in sums.items()}
            if math.isfinite(norm):
                optimizer.step()
                stats.grad_norms.append(norm)
                stats.tokens += whole.num_tokens
                for name, value in sums.items():
                    stats.sums[name] += value
            else:
                stats.skipped += 1
    if stats.skipped and not stats.grad_norms:
        raise NumericsError(
            f"no gradient of the {labels[0]} in this step was finite ({stats.skipped} optimizer steps skipped); lower its "
            "learning rate, or look for extreme rewards in rollouts.jsonl"
        )
    optimizer.zero_grad(set_to_none=True)
    return stats


def _accumulate(whole: Batch, loss_fn: LossFn, *, microbatch: int, epoch: int) -> dict[str, float]:
    """Backward through every micro-batch of one optimizer step; the sums of its metrics."""
    sums: dict[str, float] = defaultdict(float)
    for micro in split(whole, microbatch):
        if micro.num_tokens == 0:
            continue
        loss, part = loss_fn(micro, whole, epoch)
        loss.backward()
        for name, value in part.items():
            sums[name] += value
    return sums


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive pieces of `size` sequences, each trimmed to its longest."""
    rows = torch.arange(len(batch), device=batch.input_ids.device)
    for piece in rows.split(size):
        yield batch.select(piece)
