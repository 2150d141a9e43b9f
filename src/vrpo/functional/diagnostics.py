"""How good is the critic? Numbers without a gradient, as 0-d fp32 tensors; NaN where the question has no answer.

None of them may be computed from values predicted *after* an update on the same data: a critic that
memorised the batch looks perfect then.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vrpo.functional.semantic import ema

ROUNDING = 1e-5
"""Targets A + V of equal returns differ by what fp32 rounds, a few 1e-7 of the larger of both: no variance to explain."""


def _nan_unless(condition: Bool[Tensor, ""], x: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.where(condition, x, torch.nan).float()


def explained_variance(
    targets: Float[Tensor, "*shape"], predictions: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 - Var(R - V) / Var(R) over the positions that count.

    1: perfect; 0: no better than a constant; below 0: worse than a constant. A constant offset of V costs
    nothing, see the bias for that.

    Args:
        targets: R, reward units.
        predictions: V before the update, reward units.
        mask: True on positions that count.

    Returns:
        NaN when the returns are equal, to `ROUNDING` of their size or that of the values (also: when nothing counts), where every
        critic would explain "all" of nothing.
    """
    mask = mask.bool()  # of 0 and 1, as tokenizers give it, it would be taken for positions
    r, v = targets[mask].double(), predictions[mask].double()
    if len(r) == 0:
        return targets.new_tensor(torch.nan, dtype=torch.float32)
    error = r - v
    varies = r.max() - r.min() > ROUNDING * torch.maximum(r.abs().max(), v.abs().max())
    return _nan_unless(varies, 1.0 - error.var(correction=0) / r.var(correction=0))


def running_explained_variance(before: float | None, explained: float) -> float:
    """0.8 * before + 0.2 * explained: explained variance over about five steps, since that of one step is noisy.

    Args:
        before: of the steps before; None in the first.
        explained: of this step, before the update; NaN (all returns are equal) changes nothing.
    """
    return ema(before, explained, decay=0.8)


def explained_variance_by_position(
    targets: Float[Tensor, "B T"],
    predictions: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    bins: int = 10,
) -> Float[Tensor, " bins"]:
    """Explained variance in each `bins`-th of the responses, from first tokens to last.

    The i-th of a response's n tokens (i from 0) falls into bin floor(i * bins / n), so responses of any
    length line up; a response shorter than `bins` leaves some bins empty.

    Args:
        targets: R, reward units.
        predictions: V before the update.
        mask: True on positions that count.
        bins: how many; 10 gives deciles.

    Returns:
        one number per bin, NaN where a bin is empty or its targets are all equal.
    """
    mask = mask.bool()
    rank, length = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True).clamp(min=1)
    place = rank * bins // length
    return torch.stack([explained_variance(targets, predictions, mask & (place == i)) for i in range(bins)])


def expected_calibration_error(
    values: Float[Tensor, " N"], outcomes: Float[Tensor, " N"], *, bins: int = 10
) -> Float[Tensor, ""]:
    """sum_b n_b / N * |mean V in b - mean outcome in b| over equal-width bins of [0, 1].

    Source: Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning".

    Args:
        values: predicted success. Values outside [0, 1] fall into the first or last bin, and count there as
            what they are.
        outcomes: 0 or 1.
        bins: how many.

    Returns:
        in the unit of the outcomes; NaN when N = 0.
    """
    values, outcomes = values.double(), outcomes.double()
    place = (values * bins).floor().clamp(0, bins - 1).long()
    gap = values.new_zeros(bins).index_add(0, place, values - outcomes)
    return (gap.abs().sum() / len(values)).float()


def auc(scores: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> Float[Tensor, ""]:
    """P(score of a random positive > score of a random negative), ties count 1/2: area under the ROC curve.

    Args:
        scores: any unit; only their order matters.
        labels: True on positives.

    Returns:
        in [0, 1], 0.5 is chance; NaN when one class is missing.
    """
    labels = labels.bool()
    positives, negatives = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negatives, positives).double()
    at_most = torch.searchsorted(negatives, positives, right=True).double()
    pairs = len(positives) * len(negatives)
    return (0.5 * (below + at_most).sum() / pairs).float()


def sibling_ranking_accuracy(
    values: Float[Tensor, " B"], outcomes: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Share of pairs of siblings with different outcomes in which V is higher for the better one.

    Args:
        values: V, one per sequence.
        outcomes: clean outcome, any real values; a NaN outcome is in no pair.
        group_ids: samples of one prompt share an id.

    Returns:
        in [0, 1], ties of V count 1/2, 0.5 is chance; NaN when there is no such pair.
    """
    # [B, B]: entry (i, j) is one ordered pair "i did better than j", so every pair counts once
    better = (group_ids[:, None] == group_ids[None, :]) & (outcomes[:, None] > outcomes[None, :])
    right = (values[:, None] > values[None, :]).float() + 0.5 * (values[:, None] == values[None, :]).float()
    return torch.where(better, right, 0.0).sum() / better.sum()


def masked_correlation(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Pearson correlation of x and y over the positions that count.

    Args:
        x: any unit.
        y: any unit.
        mask: True on positions that count.

    Returns:
        in [-1, 1]; NaN when x or y does not vary.
    """
    mask = mask.bool()
    a, b = x[mask].double(), y[mask].double()
    if len(a) == 0:
        return x.new_tensor(torch.nan, dtype=torch.float32)
    varies = (a.max() > a.min()) & (b.max() > b.min())
    a, b = a - a.mean(), b - b.mean()
    return _nan_unless(varies, (a * b).sum() / (a.norm() * b.norm())).clamp(-1.0, 1.0)


def frac_zero_std(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], valid: Bool[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Share of groups whose valid scores are all equal: they teach GRPO nothing.

    A group of one valid score is such a group; a group without one is not counted at all.

    Args:
        scores: one per sequence.
        group_ids: samples of one prompt share an id.
        valid: False where the score is missing.

    Returns:
        in [0, 1]; NaN when no score is valid.
    """
    valid = valid.bool()
    scores = scores[valid]
    _, group = group_ids[valid].unique(return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    low = scores.new_full((groups,), torch.inf).scatter_reduce(0, group, scores, "amin")
    high = scores.new_full((groups,), -torch.inf).scatter_reduce(0, group, scores, "amax")
    return (low == high).float().mean()
