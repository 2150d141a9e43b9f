"""The clipped surrogate and its metrics: the part of the policy loss that PPO and GRPO share."""

import torch
from torch import Tensor

from vrpo.algorithms.base import Sums, read_sums
from vrpo.config.learning import GrpoConfig, PpoConfig
from vrpo.functional import masked_sum, ppo_clip_loss
from vrpo.types import Batch


def clipped_surrogate(
    logp: Tensor, entropy: Tensor, batch: Batch, *, config: PpoConfig | GrpoConfig, num_tokens: int
) -> tuple[Tensor, Sums]:
    """PPO-clip loss of an annotated micro-batch, minus entropy_coef * H, and what `train.metrics` needs of it as sums."""
    assert batch.advantages is not None, "annotate comes before loss"
    policy = ppo_clip_loss(
        logp,
        batch.old_logp,
        batch.advantages,
        batch.mask,
        clip_low=config.cliprange,
        clip_high=config.cliprange_high,
        num_tokens=num_tokens,
    )
    loss = policy.loss
    if config.entropy_coef != 0.0:
        loss = loss - config.entropy_coef * masked_sum(entropy, batch.mask) / num_tokens
    with torch.no_grad():
        size = batch.advantages.abs()
        sums = {
            "loss": loss * num_tokens,
            "clip_low": policy.clip_low_count,
            "clip_high": policy.clip_high_count,
            "approx_kl": policy.approx_kl_sum,
            "ratio": policy.ratio_sum,
            "ratio_sq": policy.ratio_sq_sum,
            "entropy": masked_sum(entropy, batch.mask),
            # five moments of (|A|, H): their correlation says whether credit lands on undecided tokens
            "adv": masked_sum(size, batch.mask),
            "adv_sq": masked_sum(size**2, batch.mask),
            "entropy_sq": masked_sum(entropy**2, batch.mask),
            "adv_entropy": masked_sum(size * entropy, batch.mask),
        }
    return loss, read_sums(sums)
