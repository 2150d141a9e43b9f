"""Noise on rewards and its inverse. Clean reward r, seen reward r~, both in {0, 1}:

rho+ = P(r~ = 1 | r = 0) = false_positive      rho- = P(r~ = 0 | r = 1) = false_negative
J = 1 - rho+ - rho-,  E[r~ | r] = rho+ + J r   learning needs J > 0
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from vrpo.errors import ConfigError, RewardError

MIN_INFORMATIVENESS = 1e-9
"""J at or below this is 0: 1 - 0.7 - 0.3 is 6e-17 in floating point."""


def require_verdicts(rewards: Num[Tensor, "*shape"], who: str, fix: str) -> None:
    """Nothing, where every reward is 0 or 1.

    Args:
        rewards: any shape.
        who: needs them so.
        fix: what the user can do.

    Raises:
        RewardError: a reward is neither; names it, `who` and `fix`.
    """
    wrong = (rewards != 0) & (rewards != 1)
    if bool(wrong.any()):
        raise RewardError(
            f"{who} got the reward {rewards[wrong][0].item():g}, it needs rewards that are 0 or 1; {fix}"
        )


def flip_rewards(
    rewards: Num[Tensor, "*shape"],
    *,
    false_positive: float,
    false_negative: float,
    uniforms: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """r~: each reward inverted with the probability that its class has.

        r~ = 1 - r  if u < (rho- if r = 1 else rho+),  else r

    Args:
        rewards: clean, each 0 or 1.
        false_positive: rho+, in [0, 1].
        false_negative: rho-, in [0, 1].
        uniforms: one draw from U[0, 1) per reward, from a named stream: u decides, nothing else is random.

    Returns:
        fp32 in {0, 1}; `rewards` itself is untouched.

    Raises:
        RewardError: a reward is neither 0 nor 1.
    """
    require_verdicts(
        rewards, "flip noise", "use 0/1 reward functions with it, or `type: gaussian` noise for other rewards"
    )
    rate = torch.where(rewards == 1, false_negative, false_positive)
    clean = rewards.float()
    return torch.where(uniforms < rate, 1.0 - clean, clean)


def debias_rewards(
    rewards: Num[Tensor, "*shape"], *, false_positive: float, false_negative: float
) -> Float[Tensor, "*shape"]:
    """(r~ - rho+) / J: its expectation over the flips is the clean reward, its variance is 1 / J^2 times r~'s.

    Source: Natarajan et al. 2013, "Learning with noisy labels", lemma 1, for a reward instead of a loss.

    Args:
        rewards: seen, any real values.
        false_positive: rho+.
        false_negative: rho-.

    Returns:
        fp32, outside [0, 1] where J < 1.

    Raises:
        ConfigError: J <= 0, the seen reward says nothing or the reverse of the truth.
    """
    informativeness = _check_informative(false_positive, false_negative, "debiasing divides by J and")
    return (rewards.float() - false_positive) / informativeness


def _check_informative(false_positive: float, false_negative: float, what: str) -> float:
    """J, which must be above 0."""
    informativeness = 1.0 - false_positive - false_negative
    if informativeness <= MIN_INFORMATIVENESS:
        raise ConfigError(
            f"J = 1 - {false_positive:g} - {false_negative:g} = {informativeness:g}, {what} needs "
            "J > 0; lower the rates to the ones your reward has"
        )
    return informativeness


def zscore(x: Num[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(x - mean) / std with the population std; fp32. All zeros when the values are all equal, or none."""
    if len(x) == 0 or bool((x == x[0]).all()):
        return torch.zeros(len(x), device=x.device)
    centred = x.double() - x.double().mean()
    return (centred / centred.square().mean().sqrt()).float()


def length_bias(lengths: Num[Tensor, " N"]) -> Float[Tensor, " N"]:
    """What a judge that likes long answers adds, for coefficient 1: the z-score of the lengths in the batch.

    Args:
        lengths: tokens of each response.

    Returns:
        fp32; scale it and add it to a reward.
    """
    return zscore(lengths)
