"""Advantages: how much better a token, or a response, was than expected.

Time convention: token t is chosen in state s_t, r_t is paid for token t, v_t = V(s_t) was predicted
before token t existed; `bootstrap` is V after the last token.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn.functional import pad

from vrpo.errors import ConfigError
from vrpo.functional.groups import Groups
from vrpo.functional.masked import zero_where_false

STD_EPS = 1e-4
"""Added to a group's standard deviation, reward units: TRL's constant."""


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " B"] | Float[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimate and the matching value target.

        delta_t = r_t + gamma * v_next(t) - v_t
        A_t     = delta_t + gamma * lam_next(t) * A_next(t)        target_t = A_t + v_t

    next(t) is the next position with mask=True, so that tokens of an environment between two turns take no
    time; after the last one, v_next is `bootstrap` and A_next is 0.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; truncated form arXiv:1707.06347, eq. 11-12; a lambda of its own for
    every state: Sutton and Barto 2018, section 12.8.

    Args:
        rewards: r_t in task-reward units; not read where mask is False.
        values: v_t, same units as rewards; not read where mask is False.
        bootstrap: V of the state after the last token. 0 when the response ended (EOS); the critic's
            estimate when it was cut at the length limit and the cut is not an outcome.
        mask: True on tokens the policy chose.
        gamma: discount per token, in [0, 1].
        lam: in [0, 1], one for all, one per sequence, or one per state, lam_t for the state in which token t is chosen. 0 is
            one-step TD (biased by V), 1 is Monte Carlo (V only a baseline).

    Returns:
        advantages, targets; fp32, both exactly 0 where mask is False, neither normalised.
    """
    rewards, values = zero_where_false(rewards, mask), zero_where_false(values, mask)
    columns = torch.arange(mask.shape[1], device=mask.device)
    # first position with mask=True at or after t; T, where the bootstrap stands, after the last one
    first = torch.where(mask, columns, mask.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    after = pad(first[:, 1:], (0, 1), value=mask.shape[1])
    value_next = torch.cat([values, bootstrap.float()[:, None]], dim=1).gather(1, after)
    delta = torch.where(mask, rewards + gamma * value_next - values, 0.0)
    decay = torch.as_tensor(gamma * lam, dtype=torch.float32, device=mask.device)
    # after the last token comes an advantage of 0, whatever lambda is there
    decay = pad(decay, (0, 1)).gather(1, after) if decay.dim() == 2 else decay.reshape(-1, 1)
    advantages = _scan(delta, torch.where(mask, decay, 1.0))
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, advantages + values


def _scan(delta: Float[Tensor, "B T"], decay: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A_t = delta_t + decay_t * A_{t+1}, A_T = 0, in log2(T) passes over whole tensors instead of T over columns.

    After k passes delta_t and decay_t stand for 2^k positions at once. Source: Hillis and Steele 1986.
    """

    def from_right(x: Tensor, by: int) -> Tensor:
        return pad(x[:, by:], (0, by))

    by = 1
    while by < delta.shape[1]:
        delta, decay = delta + decay * from_right(delta, by), decay * from_right(decay, by)
        by *= 2
    return delta


def group_advantages(
    rewards: Num[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    *,
    scale: Literal["std", "none"],
    valid: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Reward against the mean of its group of samples of one prompt.

        A_i = (r_i - mean_g) / (std_g + 1e-4)     scale = "std":  GRPO, arXiv:2402.03300
        A_i =  r_i - mean_g                       scale = "none": Dr. GRPO, arXiv:2503.20783

    std_g is the sample standard deviation (n - 1), and 1e-4 is added to it, both as TRL does. In a group
    whose rewards are all equal, or that has one sample, every advantage is exactly 0.

    Args:
        rewards: one per sequence.
        group_ids: sequences with the same id form a group, in any order.
        scale: whether the group's spread is divided out.
        valid: False where the reward is missing: that sample takes no part in mean or std and gets 0.
            None: all are valid.

    Returns:
        fp32; not normalised over the batch.

    Raises:
        ConfigError: unknown scale.
    """
    if scale not in ("std", "none"):
        raise ConfigError(
            f'group advantage scale is {scale!r}, it must be "std" or "none"; choose one of them'
        )
    # fp32 numbers summed in fp64: the mean of equal rewards is exactly that reward, so they centre to exactly 0
    groups = Groups(rewards, group_ids, valid)
    std = (groups.squares / (groups.count - 1).clamp(min=1)).sqrt() + STD_EPS
    return groups.of_row(
        1.0 / std if scale == "std" else torch.ones_like(std), times=groups.x - groups.mean[groups.index]
    )
