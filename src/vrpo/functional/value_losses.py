"""The critic's regression loss."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vrpo.errors import ConfigError
from vrpo.functional.masked import masked_sum, zero_where_false


def value_mse_loss(
    values: Float[Tensor, "B T"],
    targets: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    num_tokens: int,
    old_values: Float[Tensor, "B T"] | None = None,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """Half the mean squared error, with PPO's value clipping when asked for.

        loss = 1/2 sum_t (v_t - R_t)^2 / num_tokens
        with clip: 1/2 sum_t max((v_t - R_t)^2, (c_t - R_t)^2) / num_tokens,
                   c_t = old_t + clip(v_t - old_t, -clip, clip)

    Source of the clipped form: OpenAI baselines' PPO2; it is not in the PPO paper.

    Args:
        values: v_t of the critic being trained, reward units.
        targets: R_t; data, takes no gradient.
        mask: True on tokens that count.
        num_tokens: tokens that count in the WHOLE optimizer step; 0 (an empty step) counts as 1.
        old_values: v_t before the update; needed with `clip`, takes no gradient. Of a bottleneck critic these
            are the mean's values, otherwise the latent's noise looks like an update.
        clip: half-width of the trust interval, reward units; None: off.

    Raises:
        ConfigError: one of old_values and clip is given without the other.
    """
    if (clip is None) != (old_values is None):
        raise ConfigError(
            f"value clipping needs both clip and old_values, got clip={clip} and old_values "
            f"{'missing' if old_values is None else 'present'}; give both, or neither to switch it off"
        )
    v, target = zero_where_false(values, mask), zero_where_false(targets, mask).detach()
    error = (v - target) ** 2
    if clip is not None and old_values is not None:
        old = zero_where_false(old_values, mask).detach()
        error = torch.maximum(error, (old + (v - old).clamp(-clip, clip) - target) ** 2)
    return 0.5 * masked_sum(error, mask) / max(num_tokens, 1)
