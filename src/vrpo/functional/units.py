"""On which scale rewards lie, judged by those of a step, which may hold an outlier."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

MOST = 1.0
"""Largest root mean square of rewards that a head learns as they are: 0/1 rewards, and what noise makes of them. Small ones too: where
nothing is right yet, a small penalty may be all that differs."""
RENEWED = 4.0
"""Times the scale in force, either way, from which on another one takes its place."""
EXTREME, FAR = 0.01, 3.0
"""Share of the rewards at either end that may be outliers, and how many times as far out as the others they then are."""


class RewardUnits(NamedTuple):
    """What takes a head's output o to reward units: V = offset + scale * o."""

    offset: float = 0.0
    scale: float = 1.0

    def far_from(self, others: "RewardUnits") -> bool:
        """Whether numbers near 0 in these units are not near 0 in the others."""
        times = max(self.scale / others.scale, others.scale / self.scale)
        return times > RENEWED or abs(self.offset - others.offset) > RENEWED * max(self.scale, others.scale)


def typical_rewards(rewards: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
    """The rewards without outliers, which would set a scale that all others are lost in.

    The hundredth at either end, one at least, is left out if it lies more than three times as far from the mean of the others as any of
    these. Where the others are all equal, as when one response in a hundred is right, nothing is.

    Args:
        rewards: reward units.
    """
    ends = max(round(EXTREME * len(rewards)), 1)
    inner = rewards.sort().values[ends : len(rewards) - ends]
    if len(inner) == 0 or bool((inner == inner[0]).all()):
        return rewards
    distance = (rewards - inner.mean()).abs()
    return rewards[distance <= FAR * (inner - inner.mean()).abs().max()]


def reward_units(rewards: Float[Tensor, " N"]) -> RewardUnits | None:
    """Units in which a head with outputs near 0, and a learning rate made for rewards of 0 and 1, learns these as easily.

        rms(r) at most 1:  V = o
        else:              V = mean(r) + max|r - mean(r)| o

    An optimizer of Adam's kind moves an output by about its learning rate a step whatever the loss, so rewards of 0 to 100 would be out
    of a critic's reach. After Popart (van Hasselt et al. 2016, arXiv:1602.07714), but with the largest deviation, which keeps rare rewards
    within 1, and renewed only where it is far off (`far_from`).

    Args:
        rewards: of a step's responses, reward units; r are the `typical_rewards` among them.

    Returns:
        The units; None while all rewards are equal, or there are none: nothing is known of their scale.
    """
    rewards = typical_rewards(rewards.detach().double())
    if len(rewards) == 0 or bool((rewards == rewards[0]).all()):
        return None
    if float(rewards.square().mean().sqrt()) <= MOST:
        return RewardUnits()
    return RewardUnits(float(rewards.mean()), float((rewards - rewards.mean()).abs().max()))
