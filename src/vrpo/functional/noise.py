"""Noise on rewards and its inverse. Clean reward r, seen reward r~, both in {0, 1}:

rho+ = P(r~ = 1 | r = 0) = false_positive      rho- = P(r~ = 0 | r = 1) = false_negative
J = 1 - rho+ - rho-,  E[r~ | r] = rho+ + J r   learning needs J > 0
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from vrpo.errors import ConfigError, RewardError

TINY = 1e-6
"""Least probability under a logarithm."""

MIN_INFORMATIVENESS = 1e-9
"""J at or below this is 0: 1 - 0.7 - 0.3 is 6e-17 in floating point."""


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
    wrong = (rewards != 0) & (rewards != 1)
    if bool(wrong.any()):
        raise RewardError(
            f"flip noise got the reward {rewards[wrong][0].item():g}, it inverts rewards that are 0 or 1; "
            "use 0/1 reward functions with it, or `type: gaussian` noise for other rewards"
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


def posterior_rewards(
    rewards: Num[Tensor, " N"],
    clean_probability: Float[Tensor, " N"],
    *,
    false_positive: float,
    false_negative: float,
) -> Float[Tensor, " N"]:
    """P(r = 1 | r~, s): what a noisy verdict and a prior belief say together.

        L1 = P(r~ | r = 1),  L0 = P(r~ | r = 0)
        q L1 / (q L1 + (1 - q) L0),  q = P(r = 1 | s)

    Its mean over the noise is q, that of the debiased reward (r~ - rho+) / J, at less variance; without noise it is the
    seen reward itself.

    Args:
        rewards: seen, each 0 or 1.
        clean_probability: q, strictly between 0 and 1.
        false_positive: rho+.
        false_negative: rho-.

    Returns:
        fp32 in [0, 1].

    Raises:
        ConfigError: J <= 0.
        RewardError: a reward is neither 0 nor 1.
    """
    _check_informative(false_positive, false_negative, "a posterior")
    wrong = (rewards != 0) & (rewards != 1)
    if bool(wrong.any()):
        raise RewardError(
            f"the denoiser got the reward {rewards[wrong][0].item():g}, it needs rewards that are 0 or 1; use one 0/1 "
            "function of weight 1, or set `denoiser: null`"
        )
    seen, q = rewards.float(), clean_probability.float()
    if_right = seen * (1.0 - false_negative) + (1.0 - seen) * false_negative
    if_wrong = seen * false_positive + (1.0 - seen) * (1.0 - false_positive)
    return q * if_right / (q * if_right + (1.0 - q) * if_wrong)


def verdict_nll(
    log_belief: Float[Tensor, " N"],
    seen: Num[Tensor, " N"],
    *,
    false_positive: Float[Tensor, ""],
    false_negative: Float[Tensor, ""],
) -> Float[Tensor, " N"]:
    """-log P(r~ | s) when the clean verdict is right with probability q and then goes through the noise.

        P(r~ = 1 | s) = rho+ + J q,   q = exp(log_belief)

    The gradient with respect to log q is -J q / (rho+ + J q) for r~ = 1: at most 1, and near 0 where q is, so that a
    flipped reward cannot make an unlikely response likely. Source of the form: forward correction, Patrini et al. 2017,
    arXiv:1609.03683, for a probability q of any origin.

    Args:
        log_belief: log q, at most 0.
        seen: r~, each 0 or 1.
        false_positive: rho+, may take a gradient.
        false_negative: rho-, may take a gradient.
    """
    q = log_belief.exp()
    informativeness = 1.0 - false_positive - false_negative
    # TINY under the logarithm: without noise a response held for sure would cost infinitely much when it is wrong
    if_seen = torch.logaddexp(false_positive.clamp(min=TINY).log(), informativeness.log() + log_belief)
    if_not = (false_negative + informativeness * (1.0 - q)).clamp(min=TINY).log()
    return -torch.where(seen > 0.5, if_seen, if_not)


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
