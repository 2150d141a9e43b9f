"""Sums, means and spreads over the positions that count. A mask is True where a position counts.

Everything selects with `where`, so NaN or inf under mask=False cannot leak, neither into a result nor,
through 0 * NaN, into a gradient.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

WHITEN_EPS = 1e-8
"""Added to the variance by `masked_whiten`, in squared units of x."""


def zero_where_false(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x in fp32, 0 where mask is False."""
    x = x.float()
    return torch.where(mask, x, torch.zeros_like(x))


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of x where mask is True; fp32, 0 when nothing counts."""
    return zero_where_false(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of x where mask is True; fp32.

    When nothing counts the mean is 0.0, not NaN, so that a step of missing rewards adds nothing.
    """
    return _mean_fp64(x, mask).float()


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Population variance (divided by n, not n - 1) of x where mask is True; fp32, 0.0 when nothing counts."""
    x = torch.where(mask, x.double(), 0.0)
    return _mean_fp64((x - _mean_fp64(x, mask)) ** 2, mask).float()


def masked_whiten(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, center: bool
) -> Float[Tensor, "*shape"]:
    """x scaled to unit variance over the positions that count.

        center=True:  (x - mean) / sqrt(var + 1e-8)             mean 0, variance 1
        center=False: (x - mean) / sqrt(var + 1e-8) + mean      mean kept, variance 1

    mean and var are the masked population moments. Same convention as the whitening of Ziegler et al. 2019
    (arXiv:1909.08593) and TRL's PPO, whose variance divides by n - 1.

    Args:
        x: any unit.
        mask: True where a position counts; every such value may be the same (the result is then 0 or mean).
        center: whether the mean is removed.

    Returns:
        fp32; exactly 0 where mask is False.
    """
    x = torch.where(mask, x.double(), 0.0)
    mean = _mean_fp64(x, mask)
    # fp64, because 1e4 * (rounding error of the mean) would make a constant x look like a signal
    scaled = (x - mean) * torch.rsqrt(_mean_fp64((x - mean) ** 2, mask) + WHITEN_EPS)
    return zero_where_false(scaled if center else scaled + mean, mask)


def _mean_fp64(x: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    x = torch.where(mask, x.double(), 0.0)
    return x.sum() / mask.sum().clamp(min=1)
