"""Noise on 0/1 verdicts, and what every noise model has in common.

A noise model turns scored rollouts into scored rollouts with another `reward`. It never touches
`clean_reward`, never turns a missing reward into a number, keeps order and length, and holds no state: each
draw comes from a stream named by the run's seed, the kind, the position in the list of noises, and what is
drawn for (the sample, or the prompt, or the answer). So a sample's draw does not depend on which samples are
scored with it. The flips here follow  r~ = 1 - r with probability rho+ where r = 0 and rho- where r = 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch

from vrpo.config.rewards import (
    AdversarialNoise,
    FlipNoise,
    FlipRates,
    PersistentNoise,
    PromptFlipNoise,
    SourceNoise,
)
from vrpo.errors import RewardError
from vrpo.functional.noise import flip_rewards
from vrpo.rng import stream, stream_uniform
from vrpo.types import Rollout, ScoredRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the reward functions say about one rollout.

    Example: Verdict(parts={"exact": 1.0}, reward=1.0, errors=())
    """

    parts: Mapping[str, float | None]
    """Value of each function before weighting; None where it is missing."""
    reward: float | None
    """Weighted sum; None when a part is missing."""
    errors: tuple[str, ...]


Judge = Callable[[Sequence[Rollout], Mapping[str, Sequence[Any]]], list[Verdict]]
"""(rollouts, columns to replace) -> clean verdicts: how label noise judges against another reference."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The random stream of one noise model in one run.

    Example: Draws(0, "flip", 1).uniform("s12/p7/k3") is the draw of that sample for the second noise in the list.
    """

    seed: int
    kind: str
    index: int
    """Position in the list of noises: two of a kind draw independently."""

    def uniform(self, *labels: str | int) -> float:
        """One draw from U[0, 1)."""
        return stream_uniform(self.seed, "noise", self.kind, self.index, *labels)

    def normal(self, *labels: str | int) -> float:
        """One draw from N(0, 1)."""
        return float(stream(self.seed, "noise", self.kind, self.index, *labels).standard_normal())


@runtime_checkable
class NoiseModel(Protocol):
    """One kind of noise."""

    kind: str
    """Name in the configuration and of the random stream."""
    needs: frozenset[str]
    """Columns it reads."""

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """The same rollouts in the same order with noisy rewards.

        Args:
            scored: rollouts whose `reward` is what the noise before this one left.
            step: number of the training step.
            draws: the random stream.
            judge: asks the reward functions again.
        """
        ...


def with_rewards(
    scored: Sequence[ScoredRollout], change: Callable[[ScoredRollout, float], float | None]
) -> list[ScoredRollout]:
    """Each present reward replaced by `change(item, reward)`; missing ones stay missing."""
    return [
        item if item.reward is None else replace(item, reward=change(item, item.reward)) for item in scored
    ]


def flip_each(
    scored: Sequence[ScoredRollout],
    *,
    kind: str,
    rates: Callable[[ScoredRollout], FlipRates],
    uniform: Callable[[ScoredRollout], float],
) -> list[ScoredRollout]:
    """Every present reward through the binary channel of its rates; RewardError when one is neither 0 nor 1."""
    result = list(scored)
    channels: dict[tuple[float, float], list[int]] = {}
    for row, item in enumerate(scored):
        if item.reward is None:
            continue
        if item.reward not in (0.0, 1.0):
            raise RewardError(
                f"{kind} noise got the reward {item.reward:g} of {item.rollout.sample_id}, it inverts rewards that are 0 "
                "or 1; use one 0/1 function of weight 1 (of -1 and 1 return (r + 1) / 2), and put this noise before kinds that add to the reward"
            )
        channel = rates(item)
        channels.setdefault((channel.false_positive, channel.false_negative), []).append(row)
    for (false_positive, false_negative), rows in channels.items():
        seen = flip_rewards(
            torch.tensor([scored[row].reward for row in rows]),
            false_positive=false_positive,
            false_negative=false_negative,
            uniforms=torch.tensor([uniform(scored[row]) for row in rows], dtype=torch.float64),
        )
        for row, reward in zip(rows, seen.tolist(), strict=True):
            result[row] = replace(scored[row], reward=reward)
    return result


@final
class Flip:
    """`flip` and `adversarial`: one draw per rollout."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: FlipNoise | AdversarialNoise) -> None:
        self._rates = config
        self.kind: str = config.type

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by the sample id."""

        return flip_each(
            scored,
            kind=self.kind,
            rates=lambda item: self._rates,
            uniform=lambda item: draws.uniform(item.rollout.sample_id),
        )


@final
class PromptFlip:
    """`prompt_flip`: one draw per prompt and step inverts its whole group, r~ = 1 - r. Centred on its group a
    reward is then exactly negated."""

    kind = "prompt_flip"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: PromptFlipNoise) -> None:
        self._rates = FlipRates(false_positive=config.rate, false_negative=config.rate)

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by step and prompt id."""

        return flip_each(
            scored,
            kind=self.kind,
            rates=lambda item: self._rates,
            uniform=lambda item: draws.uniform(step, item.rollout.prompt.prompt_id),
        )


@final
class Persistent:
    """`persistent`: prompt and answer decide, so that the same answer is always judged the same, rightly or
    wrongly. White space around the answer makes no difference."""

    kind = "persistent"
    needs: frozenset[str] = frozenset()

    def __init__(self, config: PersistentNoise) -> None:
        self._rates = config

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by prompt id and completion."""

        def uniform(item: ScoredRollout) -> float:
            return draws.uniform(item.rollout.prompt.prompt_id, item.rollout.completion.strip())

        return flip_each(scored, kind=self.kind, rates=lambda item: self._rates, uniform=uniform)


@final
class Source:
    """`source`: one draw per rollout, with the rates of the row's data source."""

    kind = "source"

    def __init__(self, config: SourceNoise) -> None:
        self._column = config.column
        self._rates = config.rates
        self.needs = frozenset({config.column})

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Named by the sample id; RewardError for a source without rates."""

        return flip_each(
            scored,
            kind=self.kind,
            rates=self._rates_of,
            uniform=lambda item: draws.uniform(item.rollout.sample_id),
        )

    def _rates_of(self, item: ScoredRollout) -> FlipRates:
        prompt = item.rollout.prompt
        source = str(prompt.columns.get(self._column))
        if source not in self._rates:
            raise RewardError(
                f"source noise: prompt {prompt.prompt_id} has {self._column}={source!r}, rates are given for "
                f"{sorted(self._rates)}; add it, with rates 0 if it is clean"
            )
        return self._rates[source]
