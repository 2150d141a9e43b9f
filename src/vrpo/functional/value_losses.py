"""The critic's regression: what a head's outputs mean as a value, and what is minimised.

mse        V = o                        1/2 (V - R)^2
bce        V = sigmoid(o)               -R log V - (1 - R) log(1 - V), for returns in [0, 1]
hl_gauss   V = sum_i p_i c_i            cross-entropy of p = softmax(o) with a Gaussian around R, in bins with centres c_i

A head of the first kind speaks in units of its own, V = offset + scale * o, where rewards are far from 0 to 1: `reward_units`.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vrpo.errors import ConfigError
from vrpo.functional.masked import masked_sum, zero_where_false

Regression = Literal["mse", "bce", "hl_gauss"]

BINS, LOWEST, HIGHEST = 51, -1.2, 1.2
"""Bins of `hl_gauss` and their support, for returns in [-1, 1]."""
SIGMA_IN_BINS = 0.75
"""Standard deviation of its target in bin widths, the ratio of arXiv:2403.03950."""


def outputs_of(kind: Regression) -> int:
    """Numbers a head gives for one value."""
    return BINS if kind == "hl_gauss" else 1


def read_values(raw: Float[Tensor, "N K"], kind: Regression) -> Float[Tensor, " N"]:
    """V from a head's outputs, fp32; of `mse` in the head's own units (`RewardUnits`)."""
    raw = raw.float()
    match kind:
        case "mse":
            return raw.squeeze(-1)
        case "bce":
            return raw.squeeze(-1).sigmoid()
        case "hl_gauss":
            return raw.softmax(dim=-1) @ _centres(raw.device)


def value_cross_entropy(
    raw: Float[Tensor, "N K"], targets: Float[Tensor, " N"], kind: Literal["bce", "hl_gauss"]
) -> Float[Tensor, " N"]:
    """Cross-entropy of each value with its target, nats.

    hl_gauss: the target's share of bin i is the mass of N(R, sigma^2) in it, divided by the mass in all bins. Source:
    Farebrother et al. 2024, arXiv:2403.03950, eq. 3.3. A 0/1 return with flips makes the optimum of bce rho+ + J p, an affine
    map of p that whitening removes.

    Args:
        raw: a head's outputs.
        targets: R; data, takes no gradient.
        kind: which of the two.

    Raises:
        ConfigError: a target lies outside what the loss can represent.
    """
    targets, raw = targets.detach().float(), raw.float()
    check_targets(targets, kind)
    if kind == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(
            raw.squeeze(-1), targets.clamp(0.0, 1.0), reduction="none"
        )
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, device=raw.device)
    sigma = SIGMA_IN_BINS * (HIGHEST - LOWEST) / BINS
    below = torch.special.ndtr((edges - targets[:, None]) / sigma)
    shares = below.diff(dim=1) / (below[:, -1:] - below[:, :1])
    return -(shares * raw.log_softmax(dim=-1)).sum(dim=-1)


def check_targets(targets: Float[Tensor, " N"], kind: Regression) -> None:
    """Refuse returns that the loss cannot represent: outside [0, 1] for bce, outside the bins for hl_gauss.

    Raises:
        ConfigError: there is one.
    """
    if kind == "mse":
        return
    low, high = (0.0, 1.0) if kind == "bce" else (LOWEST, HIGHEST)
    outside = (targets < low - TOLERANCE) | (targets > high + TOLERANCE)
    if bool(outside.any()):
        raise ConfigError(
            f"critic.regression={kind} got the return {targets[outside][0].item():g}, it takes returns from {low:g} to {high:g}; "
            "scale the reward (of -1 and 1 return (r + 1) / 2), lower algorithm.kl_coef and belief_coef, which are paid in it, or use critic.regression: mse"
        )


def _centres(device: torch.device) -> Float[Tensor, " K"]:
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, device=device)
    return (edges[:-1] + edges[1:]) / 2


TOLERANCE = 1e-4
"""Returns may lie this far outside: sums of fp32 numbers do."""


def value_mse_loss(
    values: Float[Tensor, "B T"],
    targets: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    num_tokens: int,
    old_values: Float[Tensor, "B T"] | None = None,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """Half the mean squared error, with PPO's value clipping when asked for.

        loss = 1/2 sum_t (v_t - R_t)^2 / num_tokens
        with clip: 1/2 sum_t max((v_t - R_t)^2, (c_t - R_t)^2) / num_tokens,
                   c_t = old_t + clip(v_t - old_t, -clip, clip)

    Source of the clipped form: OpenAI baselines' PPO2; it is not in the PPO paper.

    Args:
        values: v_t of the critic being trained, reward units.
        targets: R_t; data, takes no gradient.
        mask: True on tokens that count.
        num_tokens: tokens that count in the WHOLE optimizer step; 0 (an empty step) counts as 1.
        old_values: v_t before the update; needed with `clip`, takes no gradient. Of a bottleneck critic these
            are the mean's values, otherwise the latent's noise looks like an update.
        clip: half-width of the trust interval, reward units; None: off.

    Raises:
        ConfigError: one of old_values and clip is given without the other.
    """
    if (clip is None) != (old_values is None):
        raise ConfigError(
            f"value clipping needs both clip and old_values, got clip={clip} and old_values "
            f"{'missing' if old_values is None else 'present'}; give both, or neither to switch it off"
        )
    v, target = zero_where_false(values, mask), zero_where_false(targets, mask).detach()
    error = (v - target) ** 2
    if clip is not None and old_values is not None:
        old = zero_where_false(old_values, mask).detach()
        error = torch.maximum(error, (old + (v - old).clamp(-clip, clip) - target) ** 2)
    return 0.5 * masked_sum(error, mask) / max(num_tokens, 1)
