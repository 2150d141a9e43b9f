"""Where rewards land and how far they reach.

Time convention: token t is chosen in state s_t, r_t is paid for token t, v_t = V(s_t) was predicted
before token t existed.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor


def length_adaptive_lambda(lengths: Num[Tensor, " B"], *, alpha: float) -> Float[Tensor, " B"]:
    """lambda = 1 - 1 / (alpha l), clamped to [0, 1]: the sum of lambda^k over a response is about alpha l.

    Source: VAPO, arXiv:2504.05118, length-adaptive GAE (alpha = 0.05 there).

    Args:
        lengths: l, tokens the policy chose, per sequence; l <= 1 / alpha gives 0.
        alpha: > 0; share of a response that a reward reaches back over.

    Returns:
        fp32.
    """
    return (1.0 - 1.0 / (alpha * lengths.float())).clamp(0.0, 1.0)


def token_rewards(scores: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """r_t: the score of a sequence on its last token that counts, 0 elsewhere.

    Args:
        scores: one per sequence, reward units. Where a row of `mask` is all False it is not read.
        mask: True on tokens the policy chose.

    Returns:
        fp32; a row without a True is all 0.
    """
    counted = mask.cumsum(dim=1)
    last = mask & (counted == counted[:, -1:])
    return torch.where(last, scores.float()[:, None], 0.0)
