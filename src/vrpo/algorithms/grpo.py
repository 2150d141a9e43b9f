"""GRPO (Shao et al. 2024, arXiv:2402.03300) and Dr. GRPO (arXiv:2503.20783): the group is the baseline.

Ours: token-mean over the whole optimizer step (no division by a response's own length), asymmetric clip,
KL in the loss with the k3 estimator.
"""

from typing import final

import torch
from torch import Tensor

from vrpo.algorithms.base import Sums
from vrpo.algorithms.surrogate import clipped_surrogate
from vrpo.config.learning import GrpoConfig
from vrpo.functional import group_advantages, kl_estimate, masked_sum
from vrpo.types import Batch


@final
class Grpo:
    """Every token of a response gets (r - group mean), divided by the group's std when scale = std."""

    uses_critic = False

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.uses_reference = config.kl_coef > 0

    def annotate(self, batch: Batch, *, kl_coef: float, explained_var: float | None = None) -> Batch:
        """A_t = (r - mean(group)) / std(group), the same for all tokens of a response.

        The KL is part of the loss and there is no critic, so `kl_coef` and `explained_var` change nothing here.
        """
        counts = batch.mask.any(dim=1)  # neither missing nor masked for truncation
        advantage = group_advantages(
            batch.policy_scores, batch.group_ids, scale=self.config.scale, valid=counts
        )
        tokens = torch.where(batch.mask, advantage[:, None], torch.zeros_like(batch.old_logp))
        return batch.with_(advantages=tokens)

    def next_kl_coef(self, kl_coef: float, *, kl: float | None, responses: int) -> float:
        """The same: the loss takes the configured weight."""
        return kl_coef

    def loss(self, logp: Tensor, entropy: Tensor, batch: Batch, *, num_tokens: int) -> tuple[Tensor, Sums]:
        """The clipped surrogate plus kl_coef * KL to the reference and belief_coef * KL to the denoiser's model per token."""
        loss, sums = clipped_surrogate(logp, entropy, batch, config=self.config, num_tokens=num_tokens)
        config = self.config
        for weight, other in ((config.kl_coef, batch.ref_logp), (config.belief_coef, batch.belief_logp)):
            if weight > 0:
                assert other is not None, "the log-probabilities of both models come first"
                kl = masked_sum(kl_estimate(logp, other, kind=config.kl_estimator), batch.mask)
                loss = loss + weight * kl / num_tokens
                sums["loss"] = float(loss.detach()) * num_tokens
        return loss, sums
