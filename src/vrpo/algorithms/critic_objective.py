"""What the critic minimises: the value loss, the bottleneck's price and the semantic losses.

    L_V = (1/2 mean_M (V_t - R_t)^2 + beta mean_M KL_t) / s^2 + L_sem       (or a cross-entropy: critic.regression)
    literal:  L_sem = lam_H mean_{S_H} H(p_t) + lam_P mean_{S_P} min(nll_t, 10)
    kl_ref:   L_sem = lam_H mean_{S_H} KL(p_ref || p_t) + lam_P mean_{S_P} KL(p_ref || p_t)

M are the tokens that count; s is the scale of the head's units (`functional.reward_units`), 1 for 0/1 rewards; p_t = softmax(W_lm h_t)
reads the value features h_t with the frozen language-model head. VRPO as described by arXiv:2508.03058; the coefficients and the exact form
of L_sem are ours (docs/algorithms/vrpo.md). With a scalar head and semantic mode `off` this is the PPO critic.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from vrpo.algorithms.base import Sums, read_sums
from vrpo.config.learning import BottleneckHead, CriticConfig
from vrpo.functional import (
    check_targets,
    clamped_nll,
    ema,
    explained_variance,
    linear_kl,
    linear_logprobs_and_entropy,
    masked_var,
    quantile_threshold,
    running_explained_variance,
    token_entropy_and_nll,
    uncertain_tokens,
    value_cross_entropy,
    value_mse_loss,
)
from vrpo.models.critic import Critic
from vrpo.models.heads import HeadOutput
from vrpo.rng import stream
from vrpo.types import Batch

RETURN_VARIANCE_DECAY = 0.9
"""Decay of the running variance of returns that scales beta: about ten steps of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticState:
    """What the objective remembers between steps; saved in every checkpoint."""

    updates: int = 0
    """Optimizer steps the critic has made."""
    return_variance: float | None = None
    """Running Var(R_t), reward units squared; None before the first step."""
    entropy_threshold: float | None = None
    """Running tau_H, nats."""
    nll_threshold: float | None = None
    """Running log tau_P, nats."""
    explained_var: float | None = None
    """Running explained variance of the returns by V before the updates (`algorithm.critic_trust` goes by it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Tokens each mean of L_V runs over, counted over the whole optimizer step."""

    tokens: int
    selected_entropy: int
    selected_nll: int

    @classmethod
    def of(cls, minibatch: Batch) -> "Denominators":
        """Counts of one optimizer step's data."""

        def count(selected: Tensor | None) -> int:
            return 0 if selected is None else int(selected.sum())

        return cls(
            tokens=minibatch.num_tokens,
            selected_entropy=count(minibatch.selected_entropy),
            selected_nll=count(minibatch.selected_nll),
        )


@final
class CriticObjective:
    """The loss above for one critic configuration.

    Args:
        config: the critic section.
        total_updates: optimizer steps of the critic in the whole run; beta's warm-up is a share of them.
        seed: the run's seed, root of the latent noise.
    """

    def __init__(self, config: CriticConfig, *, total_updates: int, seed: int) -> None:
        self.config = config
        self.total_updates = total_updates
        self.seed = seed

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen reference model takes part in the semantic losses or in the head's input."""
        return (
            self.config.semantic.mode == "kl_ref"
            or self.selects_by_reference
            or self.config.features == "uncertainty"
        )

    @property
    def selects_by_reference(self) -> bool:
        """Whether the frozen language model's entropy and perplexity choose the tokens."""
        return self.config.semantic.mode != "off" and self.config.semantic.selector == "reference"

    @property
    def selects_by_value(self) -> bool:
        """Whether the value features' own entropy and perplexity choose the tokens."""
        return self.config.semantic.mode != "off" and self.config.semantic.selector == "value"

    def beta(self, state: CriticState) -> float:
        """Weight of the bottleneck: a multiple of Var(R), rising linearly over the first updates."""
        head = self.config.head
        if not isinstance(head, BottleneckHead) or state.return_variance is None:
            return 0.0
        ramp_updates = head.beta_warmup * self.total_updates
        ramp = 1.0 if ramp_updates == 0 else min(1.0, state.updates / ramp_updates)
        return head.beta * state.return_variance * ramp

    def observe_returns(self, batch: Batch, state: CriticState) -> CriticState:
        """The state after seeing a step's targets: the scale of beta follows Var(R), and how much of it V explains is averaged.

        Raises:
            ConfigError: `critic.regression` cannot represent one of them. No weight has moved yet.
        """
        assert batch.targets is not None and batch.values is not None, "annotate comes first"
        if batch.num_tokens == 0:
            return state  # every reward of the step is missing: nothing was seen
        check_targets(batch.targets[batch.mask], self.config.regression)
        variance = float(masked_var(batch.targets, batch.mask))
        explained = float(explained_variance(batch.targets, batch.values, batch.mask))
        return replace(
            state,
            return_variance=ema(state.return_variance, variance, decay=RETURN_VARIANCE_DECAY),
            explained_var=running_explained_variance(state.explained_var, explained),
        )

    def select(
        self, entropy: Tensor, nll: Tensor, batch: Batch, state: CriticState
    ) -> tuple[Batch, CriticState]:
        """Choose S_H = {H_t > tau_H} and S_P = {nll_t > log tau_P}; then move the thresholds.

        Selection is made once per step, before any update, from the features that chose it, and is data from
        then on: no gradient flows through it and the denominators do not depend on how the step is split.
        """
        semantic = self.config.semantic
        if (
            batch.num_tokens == 0
        ):  # every reward of the step is missing: nothing to choose from, nothing learned
            return batch.with_(selected_entropy=batch.mask, selected_nll=batch.mask), state
        quantiles = [quantile_threshold(x, batch.mask, fraction=semantic.fraction) for x in (entropy, nll)]
        used = [
            now if before is None else before
            for before, now in zip((state.entropy_threshold, state.nll_threshold), quantiles, strict=True)
        ]
        chosen = [
            uncertain_tokens(x, batch.mask, fraction=semantic.fraction, threshold=tau)
            for x, tau in zip((entropy, nll), used, strict=True)
        ]
        state = replace(
            state,
            entropy_threshold=ema(state.entropy_threshold, quantiles[0], decay=semantic.threshold_decay),
            nll_threshold=ema(state.nll_threshold, quantiles[1], decay=semantic.threshold_decay),
        )
        return batch.with_(selected_entropy=chosen[0], selected_nll=chosen[1]), state

    def loss(
        self,
        critic: Critic,
        batch: Batch,
        *,
        denominators: Denominators,
        beta: float,
        noise_labels: tuple[str | int, ...],
        reference_states: Callable[[Batch, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Sums]:
        """L_V of a micro-batch as its share of the optimizer step, and metric sums over its tokens.

        Args:
            critic: the value model being trained.
            batch: annotated micro-batch.
            denominators: counts over the whole optimizer step.
            beta: weight of the bottleneck's KL, from `beta`.
            noise_labels: names the latent draw, together with the sample's id (step, pass).
            reference_states: (micro-batch, [B, L] positions) -> the frozen model's states there [N, d] and its head
                weight [V, d]; kl_ref only.
        """
        assert batch.targets is not None, "annotate comes first"
        at = pad(batch.mask, (0, 1))
        if batch.trunk_states is not None:
            states = batch.trunk_states[at]
        else:
            states = critic.states_at(batch.input_ids, batch.attention_mask, at, batch.shared_prompts)
        output = critic.forward_tokens(
            states,
            self._noise(critic, batch, noise_labels),
            None if batch.features is None else batch.features[at],
        )
        value = self._regression(output, batch, denominators.tokens, critic.scale)
        kl = output.kl.sum()
        semantic, selected = self._semantic(critic, states, batch, denominators, reference_states)
        loss = (value + beta * (kl / denominators.tokens)) / critic.scale**2 + semantic
        sums = read_sums({**selected, "loss": value, "kl": kl, "semantic": semantic})
        for name in ("loss", "semantic"):
            sums[name] *= denominators.tokens
        return loss, sums

    def _regression(self, output: HeadOutput, batch: Batch, tokens: int, scale: float) -> Tensor:
        """The value loss, reward units squared, as a share of the optimizer step's `tokens`; `scale` of the head's units."""
        assert batch.targets is not None, "annotate comes first"
        clip = self.config.cliprange_value
        if self.config.regression != "mse":
            losses = value_cross_entropy(output.raw, batch.targets[batch.mask], self.config.regression)
            return losses.sum() / tokens
        return value_mse_loss(
            torch.zeros_like(batch.old_logp).masked_scatter(batch.mask, output.values),
            batch.targets,
            batch.mask,
            num_tokens=tokens,
            old_values=None if clip is None else batch.values,
            clip=None if clip is None else clip * scale,
        )

    def _noise(self, critic: Critic, batch: Batch, labels: tuple[str | int, ...]) -> Tensor | None:
        """Standard normal draws [N, K] for the tokens that count, one named stream per sample."""
        head = self.config.head
        if not isinstance(head, BottleneckHead) or not head.sample:
            return None
        counts = batch.mask.sum(dim=1).tolist()
        draws = [
            torch.from_numpy(
                stream(self.seed, "latent", *labels, sample_id).standard_normal(
                    (count, critic.latent_dim), "f4"
                )
            )
            for sample_id, count in zip(batch.sample_ids, counts, strict=True)
        ]
        return torch.cat(draws).to(batch.old_logp.device)

    def _semantic(
        self,
        critic: Critic,
        states: Tensor,
        batch: Batch,
        denominators: Denominators,
        reference_states: Callable[[Batch, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_sem on the selected tokens only; the other tokens never meet the vocabulary. `states` [N, d] are those of
        the tokens that count."""
        config = self.config.semantic
        zero = states.new_zeros((), dtype=torch.float32)
        if config.mode == "off":
            return zero, {}
        assert batch.selected_entropy is not None and batch.selected_nll is not None, "select comes first"
        weight = critic.frozen_head
        either = (batch.selected_entropy | batch.selected_nll) & batch.mask
        chosen = states.index_select(0, either[batch.mask].nonzero().squeeze(1))
        in_entropy, in_nll = batch.selected_entropy[either], batch.selected_nll[either]
        if config.mode == "kl_ref":
            assert reference_states is not None, "kl_ref needs the reference model"
            ref, ref_weight = reference_states(batch, pad(either, (0, 1)))
            kl = linear_kl(ref, ref_weight, chosen, weight)
            on_entropy = on_nll = kl
        else:
            logp, on_entropy = linear_logprobs_and_entropy(
                chosen, weight, batch.input_ids[:, 1:][either], temperature=1.0
            )
            on_nll = clamped_nll(-logp)
        entropy_sum = torch.where(in_entropy, on_entropy, 0.0).sum()
        nll_sum = torch.where(in_nll, on_nll, 0.0).sum()
        loss = (
            zero
            + config.entropy_coef * entropy_sum / max(denominators.selected_entropy, 1)
            + config.nll_coef * nll_sum / max(denominators.selected_nll, 1)
        )
        return loss, {
            "selected_entropy": entropy_sum,
            "selected_entropy_count": in_entropy.sum(),
            "selected_nll": nll_sum,
            "selected_nll_count": in_nll.sum(),
        }


def value_feature_uncertainty(critic: Critic, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Entropy and negative log-likelihood [B, T] of p_t = softmax(W_lm h_t), without gradient.

    `states` [N, d] are the value features before each token that counts.
    """
    with torch.no_grad():
        ids = batch.input_ids[:, 1:][batch.mask]
        entropy, nll = token_entropy_and_nll(states[None], critic.frozen_head, ids[None])
    empty = torch.zeros_like(batch.old_logp)
    return empty.masked_scatter(batch.mask, entropy[0]), empty.masked_scatter(batch.mask, nll[0])
