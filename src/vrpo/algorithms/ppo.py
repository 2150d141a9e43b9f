"""PPO with a critic (Schulman et al. 2017, arXiv:1707.06347), as used for language models.

Decoupled GAE (VC-PPO, arXiv:2503.01491): `lam` for the advantages, `lam_value` for the critic's targets.
VRPO (arXiv:2508.03058) is this rule with a critic that filters noise: see `algorithms.critic_objective`.
"""

import math
from typing import final

import torch
from torch import Tensor

from vrpo.algorithms.base import Sums
from vrpo.algorithms.surrogate import clipped_surrogate
from vrpo.config.learning import PpoConfig
from vrpo.functional import (
    adaptive_kl_coef,
    covered_values,
    explained_variance,
    gae,
    kl_estimate,
    length_adaptive_lambda,
    masked_mean,
    masked_whiten,
    running_explained_variance,
    sibling_correction,
    token_rewards,
)
from vrpo.types import Batch


@final
class Ppo:
    """PPO-clip on GAE advantages; the KL to the reference or to the denoiser's belief, if any, is part of the reward."""

    uses_critic = True

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        self.uses_reference = config.kl_coef > 0

    def annotate(self, batch: Batch, *, kl_coef: float, explained_var: float | None = None) -> Batch:
        """A_t = GAE(lam) on what critic and siblings say, whitened over the step; R_t = GAE(lam_value) + v_t."""
        config = self.config
        assert batch.values is not None and batch.bootstrap is not None, "the critic's values come first"
        rewards = self._rewards(batch, kl_coef)
        # a response that ended has nothing after it; one that was cut may be worth V of where it was cut
        cut = batch.truncated if config.truncation == "bootstrap" else torch.zeros_like(batch.truncated)
        bootstrap = torch.where(cut, batch.bootstrap, torch.zeros_like(batch.bootstrap))
        _, targets = gae(
            rewards, batch.values, bootstrap, batch.mask, gamma=config.gamma, lam=config.lam_value
        )
        explained = float(explained_variance(targets, batch.values, batch.mask)) if self._gated else 1.0
        trust = self._trust(explained, explained_var)
        # what a cut response is worth is the critic's word: others are judged by responses that ended, and it by them
        ended = batch.mask & ~cut[:, None]
        mean = masked_mean(targets, ended if bool(ended.any()) else batch.mask)
        values = trust * batch.values + (1.0 - trust) * mean
        bootstrap = torch.where(cut, trust * bootstrap + (1.0 - trust) * mean, bootstrap)
        if config.sibling_correction:
            values = values + self._correction(targets - values, batch, ended)[:, None]
        if config.sibling_coverage:
            values, batch = self._cover(values, rewards, bootstrap, batch)
        advantages, _ = gae(
            rewards,
            values,
            bootstrap,
            batch.mask,
            gamma=config.gamma,
            lam=self._lam(batch, trust),
        )
        if math.isnan(explained):
            # all returns are equal, there is nothing to learn: what is left is rounding, which whitening would scale to 1
            advantages = torch.zeros_like(advantages)
        elif config.whiten_advantages:
            advantages = masked_whiten(advantages, batch.mask, center=True)
        return batch.with_(advantages=advantages, targets=targets)

    def _correction(self, residuals: Tensor, batch: Batch, ended: Tensor) -> Tensor:
        """[B] What siblings say of the critic's error, from each response's residual [B, T] at its first token; 0 where it was cut."""
        first = batch.mask.float().argmax(dim=1, keepdim=True)
        return sibling_correction(
            residuals.gather(1, first).squeeze(1), batch.group_ids, valid=ended.any(dim=1)
        )

    def _cover(
        self, values: Tensor, rewards: Tensor, bootstrap: Tensor, batch: Batch
    ) -> tuple[Tensor, Batch]:
        """The values [B, T] where siblings complete them, and the batch with what they covered."""
        nothing = torch.zeros_like(values)
        returns, _ = gae(rewards, nothing, bootstrap, batch.mask, gamma=self.config.gamma, lam=1.0)
        values, coverage = covered_values(
            values, returns, batch.old_logp, batch.input_ids, batch.mask, group_ids=batch.group_ids
        )
        return values, batch.with_(coverage=coverage)

    def _lam(self, batch: Batch, trust: float) -> float | Tensor:
        """GAE's lambda: one for all, one per response, or one per state that is `lam_covered` as far as siblings cover it.

        Distrust of the critic raises it to 1, but not where siblings speak in the critic's place.
        """
        lam: float | Tensor = self.config.lam
        if self.config.length_adaptive_alpha is not None:
            lengths = batch.mask.sum(dim=1)
            lam = length_adaptive_lambda(lengths, alpha=self.config.length_adaptive_alpha)
        lam = 1.0 - trust * (1.0 - lam)
        if self.config.lam_covered is None:
            return lam
        assert batch.coverage is not None, "the configuration has asked siblings"
        lam = torch.as_tensor(lam, device=batch.coverage.device).reshape(-1, 1)
        return lam + batch.coverage * (self.config.lam_covered - lam)

    @property
    def _gated(self) -> bool:
        return self.config.critic_trust != "full"

    def _trust(self, explained: float, before: float | None) -> float:
        """g in [0, 1]: what share of the values is the critic's, the rest is the step's mean return; lambda follows.

        At g = 0 the advantage is R_t - mean(R), at g = 1 it is GAE. Gate of EVPO (arXiv:2604.19485), by the explained variance before
        the update; ours are the running mean over the steps, without which the gate flaps, `soft`, and the lambda between.
        """
        if not self._gated:
            return 1.0
        if math.isnan(explained):
            return 0.0
        explained = running_explained_variance(before, explained)
        return float(explained > 0.0) if self.config.critic_trust == "gate" else min(max(explained, 0.0), 1.0)

    def next_kl_coef(self, kl_coef: float, *, kl: float | None, responses: int) -> float:
        """The same, unless `kl_target` steers it."""
        config = self.config
        if config.kl_target is None or kl is None or not math.isfinite(kl):
            return kl_coef
        return adaptive_kl_coef(
            kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, responses=responses
        )

    def loss(self, logp: Tensor, entropy: Tensor, batch: Batch, *, num_tokens: int) -> tuple[Tensor, Sums]:
        """The clipped surrogate."""
        return clipped_surrogate(logp, entropy, batch, config=self.config, num_tokens=num_tokens)

    def _rewards(self, batch: Batch, kl_coef: float) -> Tensor:
        """r_t that policy and critic learn from, denoised where that is done, minus kl_coef times the KL to the initial model and belief_coef
        times that to the denoiser's, on the tokens that count."""
        rewards = batch.rewards if batch.denoised is None else token_rewards(batch.denoised, batch.mask)
        if self.uses_reference:
            assert batch.ref_logp is not None, "the reference's log-probabilities come first"
            rewards = rewards - kl_coef * self._kl_to(batch.ref_logp, batch)
        if self.config.belief_coef > 0:
            assert batch.belief_logp is not None, "the denoiser's model reads the responses first"
            rewards = rewards - self.config.belief_coef * self._kl_to(batch.belief_logp, batch)
        return rewards

    def _kl_to(self, other: Tensor, batch: Batch) -> Tensor:
        """[B, T] KL of the policy that sampled to another model, from the log-probabilities of the sampled tokens."""
        kl = kl_estimate(batch.old_logp, other, kind=self.config.kl_estimator)
        return torch.where(batch.mask, kl, torch.zeros_like(kl))
