"""Which tokens the semantic losses of VRPO (arXiv:2508.03058) act on, and the thresholds that move.

S = {t : score_t > tau},  score = entropy or negative log-likelihood,  tau = EMA of a batch quantile
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_NLL = 10.0
"""Nats at which a token's negative log-likelihood stops counting: e^-10 is one in 22,000. Without it one
token the frozen head finds absurd owns the batch."""


def quantile_threshold(
    scores: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, fraction: float
) -> float:
    """The (1 - fraction)-quantile of the scores that count, linearly interpolated as numpy does.

    Args:
        scores: entropy or nll, nats.
        mask: True on tokens that count.
        fraction: share of tokens wanted above the threshold, in [0, 1].

    Returns:
        tau in the scores' unit; NaN when no token counts.
    """
    chosen = scores.detach().float()[mask.bool()].sort().values  # torch.quantile stops at 2^24 tokens
    if len(chosen) == 0:
        return math.nan
    place = (1.0 - fraction) * (len(chosen) - 1)
    below, above = math.floor(place), math.ceil(place)
    low, high = chosen[below].item(), chosen[above].item()
    return low if below == above else low + (place - below) * (high - low)


def uncertain_tokens(
    scores: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    fraction: float,
    threshold: float | None = None,
) -> Bool[Tensor, "*shape"]:
    """The tokens that count and whose score is strictly above the threshold.

    Ties with the threshold are left out: when all scores are equal nothing is selected, so a batch with many
    equal scores selects fewer than `fraction`, never the whole batch.

    Args:
        scores: entropy or nll, nats; no gradient flows through the selection.
        mask: True on tokens that count.
        fraction: share of tokens selected when `threshold` is None; not used otherwise.
        threshold: tau; None: the batch's own (1 - fraction)-quantile.

    Returns:
        True on selected tokens; False wherever mask is.
    """
    tau = quantile_threshold(scores, mask, fraction=fraction) if threshold is None else threshold
    return mask & (scores.detach() > tau)


def ema(previous: float | None, value: float, *, decay: float) -> float:
    """decay * previous + (1 - decay) * value: the running average after one more value.

    Args:
        previous: the average so far; None (nothing seen yet) or NaN gives `value`.
        value: the new one; NaN (nothing was measured) leaves the average as it is.
        decay: in [0, 1]; 0.9 remembers about ten values.
    """
    if previous is None or math.isnan(previous):
        return value
    return previous if math.isnan(value) else decay * previous + (1.0 - decay) * value


def clamped_nll(nll: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """min(nll, 10 nats), fp32; no gradient beyond."""
    return torch.clamp(nll.float(), max=MAX_NLL)
