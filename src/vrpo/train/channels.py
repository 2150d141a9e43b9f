"""The denoiser's channels: how a clean verdict becomes the reward that is seen.

    flip      r~ = r, inverted with rates rho+ (of wrong responses) and rho- (of right ones)
    gaussian  r~ = low + (high - low) r + slope z(tokens) + N(0, std^2): any real-valued reward; whatever is in it besides the
              verdict counts as its noise, but for a liking for length, where `denoiser.nuisance: length` asks for the slope

Their parameters are given or learned with the denoiser's model; `low` and `high` are where the reward of a wrong and of a
right response stands, for flips rho+ and 1 - rho-.
"""

from typing import final

import torch
from torch import Tensor, nn

from vrpo.config.learning import DenoiserConfig
from vrpo.functional import flip_log_likelihoods, gaussian_log_likelihoods, require_verdicts
from vrpo.types import Metrics

RATE_START, RATE_LIMIT = 0.1, 0.5
"""Learned rates start here, and stay below the limit, so that J > 0."""
LEAST_STD = 0.1
"""Of the Gaussian channel, in standard deviations of the first step's rewards: two sharp levels would be infinitely likely."""


@final
class FlipChannel(nn.Module):
    """rho+ and rho-: given, or 1/2 sigmoid of two learned numbers."""

    LEAST_BELIEF = 0.02
    """Beliefs stay this far from 0 and 1, so that a verdict is never overruled for good: one says log((1 - rho) / rho) at most."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.given = config.false_positive is not None
        start = (config.false_positive, config.false_negative) if self.given else (RATE_START, RATE_START)
        numbers = torch.tensor(start, dtype=torch.float32)
        self.numbers = nn.Parameter(
            numbers if self.given else torch.logit(numbers / RATE_LIMIT), requires_grad=not self.given
        )

    def rates(self) -> tuple[Tensor, Tensor]:
        """rho+, rho-."""
        rates = self.numbers if self.given else RATE_LIMIT * self.numbers.sigmoid()
        return rates[0], rates[1]

    def start(self, seen: Tensor, tokens: Tensor) -> None:
        """See a step's rewards [N] first: rates have no scale to fit, but they are of verdicts. `tokens` [N] are not read.

        Raises:
            RewardError: a reward is neither 0 nor 1.
        """
        fix = "use one 0/1 function of weight 1, `denoiser.channel: gaussian`, or `denoiser: null`"
        require_verdicts(seen, "the denoiser", fix)

    def log_likelihoods(self, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log P(seen | clean 1) and log P(seen | clean 0), each [N]: `functional.flip_log_likelihoods`. `tokens` are not read."""
        false_positive, false_negative = self.rates()
        return flip_log_likelihoods(seen, false_positive=false_positive, false_negative=false_negative)

    def levels(self) -> tuple[float, float]:
        """Mean reward of wrong and of right responses: rho+ and 1 - rho-."""
        false_positive, false_negative = (float(rate.detach()) for rate in self.rates())
        return false_positive, 1.0 - false_negative

    def metrics(self) -> Metrics:
        """The rates and J."""
        low, high = self.levels()
        return {
            "denoiser/false_positive": low,
            "denoiser/false_negative": 1.0 - high,
            "denoiser/informativeness": high - low,
        }


@final
class GaussianChannel(nn.Module):
    """low, high and std, learned from where the first step's rewards lie: mean -+ one standard deviation, and that.

    `numbers` [3 or 4]: low, high and log std in those standard deviations, from that mean; with `nuisance` the slope too, in those
    standard deviations of reward per standard deviation of the first step's lengths, from 0.
    """

    LEAST_BELIEF = 1e-4
    """As of flips, but smaller: what a reward says grows with its size, and a judge's liking for long answers gives large
    ones to nonsense. A belief of 0.02 let those pass for right, and responses grew longer."""

    first: Tensor
    """Mean and standard deviation of the first rewards; (0, 0) before there are any that differ."""

    first_tokens: Tensor
    """The same of the first lengths; with `nuisance` alone."""

    def __init__(self, *, nuisance: bool = False) -> None:
        super().__init__()
        self.nuisance = nuisance
        self.numbers = nn.Parameter(torch.tensor([-1.0, 1.0, 0.0, 0.0] if nuisance else [-1.0, 1.0, 0.0]))
        self.register_buffer("first", torch.zeros(2))
        if nuisance:
            self.register_buffer("first_tokens", torch.zeros(2))

    def start(self, seen: Tensor, tokens: Tensor) -> None:
        """Take mean and standard deviation of the first rewards and lengths [N]; equal rewards, or none, leave it for a later step."""
        if float(self.first[1]) == 0.0 and len(seen) > 0:
            self.first.copy_(_mean_and_std(seen))
            if self.nuisance:
                self.first_tokens.copy_(_mean_and_std(tokens))

    def parameters_in_force(self) -> tuple[Tensor, Tensor, Tensor]:
        """low, high, std."""
        low, high, log_std = self.numbers[:3]
        mean, scale = self._first()
        return mean + scale * low, mean + scale * high, scale * log_std.exp().clamp(min=LEAST_STD)

    def _first(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the first rewards; 1 before there are any that differ."""
        mean, scale = self.first
        return mean, torch.where(scale == 0.0, 1.0, scale)

    def per_token(self) -> Tensor:
        """What a token more adds to the reward, whatever the verdict; 0 without `nuisance`."""
        if not self.nuisance:
            return self.first.new_zeros(())
        spread = self.first_tokens[1]
        return self.numbers[3] * self._first()[1] / torch.where(spread == 0.0, 1.0, spread)

    def log_likelihoods(self, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log P(seen | clean 1) and log P(seen | clean 0), each [N]: `functional.gaussian_log_likelihoods` of what is left of the reward
        without the responses' lengths `tokens` [N]."""
        low, high, std = self.parameters_in_force()
        if self.nuisance:
            seen = seen - self.per_token() * (tokens - self.first_tokens[0])
        return gaussian_log_likelihoods(seen, low=low, high=high, std=std)

    def levels(self) -> tuple[float, float]:
        """Mean reward of wrong and of right responses: low and high."""
        low, high, _ = self.parameters_in_force()
        return float(low.detach()), float(high.detach())

    def metrics(self) -> Metrics:
        """The two levels and the noise's standard deviation, in the reward's units."""
        low, high, std = (float(x.detach()) for x in self.parameters_in_force())
        found = {"denoiser/low": low, "denoiser/high": high, "denoiser/std": std}
        return found | ({"denoiser/per_token": float(self.per_token().detach())} if self.nuisance else {})


def _mean_and_std(x: Tensor) -> Tensor:
    """[2] Mean and population standard deviation of x [N], fp32."""
    return torch.stack([x.float().mean(), x.float().std(correction=0)])


Channel = FlipChannel | GaussianChannel
"""P(seen reward | clean verdict). `numbers` is what is learned; `state_dict` what a checkpoint keeps."""


def build_channel(config: DenoiserConfig, device: torch.device) -> Channel:
    """The channel that the configuration names."""
    if config.channel == "flip":
        return FlipChannel(config).to(device)
    return GaussianChannel(nuisance=config.nuisance == "length").to(device)
