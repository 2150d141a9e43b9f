"""The policy's loss: PPO's clipped surrogate, for any advantage."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vrpo.errors import ConfigError
from vrpo.functional.kl import MAX_LOG_RATIO, kl_estimate
from vrpo.functional.masked import masked_sum, zero_where_false


class PolicyLoss(NamedTuple):
    """The loss, and what it did as *sums over the tokens that count*: add them up over micro-batches, then
    divide by the step's number of tokens to get means. All are scalars; all but `loss` are detached."""

    loss: Float[Tensor, ""]
    """This micro-batch's share of the optimizer step's loss: already divided by num_tokens."""
    clip_low_count: Float[Tensor, ""]
    """Tokens with A < 0 whose gradient the clip removed (ratio below 1 - clip_low)."""
    clip_high_count: Float[Tensor, ""]
    """Tokens with A > 0 whose gradient the clip removed (ratio above 1 + clip_high)."""
    approx_kl_sum: Float[Tensor, ""]
    """Sum of k3 estimates of KL(old || new), nats."""
    ratio_sum: Float[Tensor, ""]
    """Sum of rho_t; divided by the tokens it should be near 1."""
    ratio_sq_sum: Float[Tensor, ""]
    """Sum of rho_t^2, for the variance of the ratio."""


def ppo_clip_loss(
    logp: Float[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    num_tokens: int,
) -> PolicyLoss:
    """PPO's clipped surrogate, averaged over the tokens of the optimizer step.

        rho_t = exp(logp_t - old_logp_t)
        loss  = -sum_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) / num_tokens

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; clip_high > clip_low is DAPO's clip-higher,
    arXiv:2503.14476. The log-ratio is clamped to +-20 nats before exp (no gradient beyond), so that a token
    the policy has all but forbidden cannot turn the loss into inf. Advantages are used as they come.

    Args:
        logp: log-probability under the weights being trained, nats.
        old_logp: log-probability under the weights that sampled, nats; data, takes no gradient.
        advantages: A_t; data, takes no gradient.
        mask: True on tokens that count.
        clip_low: lower clip range, >= 0.
        clip_high: upper clip range, >= 0.
        num_tokens: tokens that count in the WHOLE optimizer step, over micro-batches and ranks, so that the
            gradient does not depend on how the step was split. 0 (an empty step) counts as 1.

    Raises:
        ConfigError: shapes differ; one advantage per response would be read as one per column.
    """
    if not logp.shape == old_logp.shape == advantages.shape == mask.shape:
        shapes = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "mask": mask}
        raise ConfigError(
            f"shapes differ: {', '.join(f'{name} {list(x.shape)}' for name, x in shapes.items())}; give one number per token, such as "
            "advantages[:, None].expand_as(logp)"
        )
    advantages = zero_where_false(advantages, mask).detach()
    log_ratio = zero_where_false(logp, mask) - zero_where_false(old_logp, mask).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        clip_low_count = ((advantages < 0) & (ratio < 1.0 - clip_low)).sum().float()
        clip_high_count = ((advantages > 0) & (ratio > 1.0 + clip_high)).sum().float()
        # KL(old || new) from samples of old: old takes the policy's place in the estimator
        approx_kl = kl_estimate(torch.zeros_like(log_ratio), log_ratio, kind="k3")
        approx_kl_sum = masked_sum(approx_kl, mask)
        ratio_sum, ratio_sq_sum = masked_sum(ratio, mask), masked_sum(ratio**2, mask)
    loss = -masked_sum(surrogate, mask) / max(num_tokens, 1)
    return PolicyLoss(loss, clip_low_count, clip_high_count, approx_kl_sum, ratio_sum, ratio_sq_sum)
