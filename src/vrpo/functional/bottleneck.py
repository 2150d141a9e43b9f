"""The variational information bottleneck (Alemi et al. 2017, arXiv:1612.00410): z ~ N(mean, exp(logvar))."""

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kl(
    mean: Float[Tensor, "*shape K"], logvar: Float[Tensor, "*shape K"]
) -> Float[Tensor, "*shape"]:
    """KL(N(mean, exp(logvar)) || N(0, I)) = sum_k 1/2 (mean_k^2 + exp(logvar_k) - 1 - logvar_k).

    Args:
        mean: of the latent, per dimension.
        logvar: log of the variance (not of the standard deviation), per dimension.

    Returns:
        fp32, nats, summed over the K latent dimensions, never averaged; 0 iff mean = 0 and logvar = 0.
    """
    mean, logvar = mean.float(), logvar.float()
    # expm1: exp(logvar) - 1 - logvar cancels to noise, even below 0, near logvar = 0
    return 0.5 * (mean**2 + torch.expm1(logvar) - logvar).sum(dim=-1)


def reparameterise(
    mean: Float[Tensor, "*shape K"], logvar: Float[Tensor, "*shape K"], noise: Float[Tensor, "*shape K"]
) -> Float[Tensor, "*shape K"]:
    """z = mean + exp(logvar / 2) * noise: a sample whose gradient reaches mean and logvar.

    Source: Kingma & Welling 2014, arXiv:1312.6114, section 2.4.

    Args:
        mean: of the latent.
        logvar: log of the variance.
        noise: standard normal draws from a named stream; 0 gives the mean.

    Returns:
        fp32.
    """
    return mean.float() + torch.exp(0.5 * logvar.float()) * noise.float()
