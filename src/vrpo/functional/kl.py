"""Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

Source: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html (2020).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vrpo.errors import ConfigError

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 nats before exp: e^20 is a ratio no update means, e^89 is inf in fp32."""


def kl_estimate(
    logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"], *, kind: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) of each token, estimated from one sample of the policy.

        d  = logp - ref_logp
        k1 = d                        unbiased, high variance, may be negative
        k2 = d^2 / 2                  biased, low variance, >= 0; its gradient is that of the KL
        k3 = exp(-d) - 1 + d          unbiased, low variance, >= 0

    In k3 d is clamped to +-20 (its gradient is 0 beyond); k1 and k2 are not clamped.

    Args:
        logp: log-probability of the sampled token under the policy, nats.
        ref_logp: under the reference, nats.
        kind: the estimator.

    Returns:
        fp32, nats per token. Not masked and not averaged.

    Raises:
        ConfigError: unknown kind.
    """
    d = logp.float() - ref_logp.float()
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind != "k3":
        raise ConfigError(f'KL estimator is {kind!r}, it must be "k1", "k2" or "k3"; choose one of them')
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1: exp(-d) - 1 loses every digit of a KL near 0
    return torch.expm1(-d) + d


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, responses: int) -> float:
    """The next weight of the KL penalty: a proportional controller that steers the KL to a target.

        e    = clip(kl / target - 1, -0.2, 0.2)
        next = kl_coef * (1 + e * responses / horizon)

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2. The factor never falls below 0, whatever the sizes.

    Args:
        kl_coef: the weight in force.
        kl: measured KL to the reference, nats a response.
        target: wanted KL, nats a response, > 0.
        horizon: responses over which the weight would change by its own size times e.
        responses: responses of the step `kl` was measured on.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * max(1.0 + error * responses / horizon, 0.0)
