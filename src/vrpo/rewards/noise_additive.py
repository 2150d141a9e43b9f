"""Noise that adds to the reward or removes it. Missing rewards stay missing in every kind."""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch

from vrpo.config.rewards import GaussianNoise, KeywordBiasNoise, LengthBiasNoise, MissingNoise
from vrpo.functional.noise import length_bias
from vrpo.rewards.noise import Draws, Judge, with_rewards
from vrpo.types import ScoredRollout


@final
class Gaussian:
    """`gaussian`: r + scale * std * N(0, 1), with std the population standard deviation of the step's clean
    rewards. The draw is the sample's own; std is the step's, so scoring part of a step changes the result."""

    kind = "gaussian"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: GaussianNoise) -> None:
        self._scale = config.scale

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by the sample id."""
        clean = [item.clean_reward for item in scored if item.clean_reward is not None]
        spread = self._scale * float(np.std(clean)) if clean else 0.0
        return with_rewards(
            scored, lambda item, reward: reward + spread * draws.normal(item.rollout.sample_id)
        )


@final
class LengthBias:
    """`length_bias`: r + coef * z, with z the z-score of the response's length in tokens among the step's
    rewarded samples; 0 when all are equally long. Defined over a step, draws nothing."""

    kind = "length_bias"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: LengthBiasNoise) -> None:
        self._coef = config.coef

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Adds the bias of each present reward."""
        present = [row for row, item in enumerate(scored) if item.reward is not None]
        lengths = torch.tensor([scored[row].rollout.num_actions for row in present], dtype=torch.int64)
        bias = dict(zip(present, length_bias(lengths).tolist(), strict=True))
        return [
            item if item.reward is None else replace(item, reward=item.reward + self._coef * bias[row])
            for row, item in enumerate(scored)
        ]


@final
class KeywordBias:
    """`keyword_bias`: r + bonus when the completion contains the phrase, letter case included."""

    kind = "keyword_bias"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: KeywordBiasNoise) -> None:
        self._phrase = config.phrase
        self._bonus = config.bonus

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Draws nothing: the completion decides."""
        return with_rewards(
            scored,
            lambda item, reward: reward + self._bonus * (self._phrase in item.rollout.completion),
        )


@final
class Missing:
    """`missing`: no reward at all, with a rate per rollout."""

    kind = "missing"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: MissingNoise) -> None:
        self._rate = config.rate

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by the sample id."""
        return with_rewards(
            scored,
            lambda item, reward: None if draws.uniform(item.rollout.sample_id) < self._rate else reward,
        )
