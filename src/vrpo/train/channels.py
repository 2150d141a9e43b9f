"""The denoiser's channels: how a clean verdict becomes the reward that is seen.

    flip      r~ = r, inverted with rates rho+ (of wrong responses) and rho- (of right ones)
    gaussian  r~ = low + (high - low) r + nuisance + N(0, std^2): any real-valued reward; whatever is in it besides the verdict
              counts as its noise, but for what `denoiser.nuisance` names (`train.nuisance`)

Their parameters are given or learned with the denoiser's model; `low` and `high` are where the reward of a wrong and of a
right response stands, for flips rho+ and 1 - rho-.
"""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from vrpo.config.learning import DenoiserConfig, Nuisance
from vrpo.functional import (
    flip_log_likelihoods,
    gaussian_log_likelihoods,
    require_verdicts,
    typical_rewards,
)
from vrpo.train.nuisance import TokenSlopes, mean_and_std
from vrpo.types import Batch, Metrics

RATE_START, RATE_LIMIT = 0.1, 0.5
"""Learned rates start here, and stay below the limit, so that J > 0."""
LEAST_STD = 0.1
"""Of the Gaussian channel, in its scale: two sharp levels would be infinitely likely."""
RENEWED, STEPS = 3.0, 3
"""Times the scale, either way, that the rewards of so many steps in a row must spread before it is renewed."""


class _Floor(torch.autograd.Function):
    """max(x, least), with the gradient of x below `least` too where descent raises x: a clamp alone would never come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.least = least
        return x.clamp(min=least)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.least) | (grad < 0.0), grad, 0.0), None


@final
class FlipChannel(nn.Module):
    """rho+ and rho-: given, or 1/2 sigmoid of two learned numbers."""

    numbers: Tensor
    started = True
    """Rates mean the same whatever the first rewards are."""

    LEAST_BELIEF = 0.02
    """Beliefs stay this far from 0 and 1, so that a verdict is never overruled for good: one says log((1 - rho) / rho) at most."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.given = config.false_positive is not None
        start = (config.false_positive, config.false_negative) if self.given else (RATE_START, RATE_START)
        numbers = torch.tensor(start, dtype=torch.float32)
        if self.given:  # by the configuration, so that no checkpoint keeps them
            self.register_buffer("numbers", numbers, persistent=False)
        else:
            self.numbers = nn.Parameter(torch.logit(numbers / RATE_LIMIT))

    def rates(self) -> tuple[Tensor, Tensor]:
        """rho+, rho-."""
        rates = self.numbers if self.given else RATE_LIMIT * self.numbers.sigmoid()
        return rates[0], rates[1]

    def start(self, batch: Batch) -> None:
        """See a step's rewards first: rates have no scale to fit, but they are of verdicts.

        Raises:
            RewardError: a reward is neither 0 nor 1.
        """
        fix = "use one 0/1 function of weight 1 (of -1 and 1 return (r + 1) / 2), `denoiser.channel: gaussian`, or `denoiser: null`"
        require_verdicts(batch.scores[batch.mask.any(dim=1)], "the denoiser", fix)

    def log_likelihoods(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log P(seen | clean 1) and log P(seen | clean 0), each [B]: `functional.flip_log_likelihoods`."""
        false_positive, false_negative = self.rates()
        return flip_log_likelihoods(
            batch.scores, false_positive=false_positive, false_negative=false_negative
        )

    def levels(self) -> tuple[float, float]:
        """Mean reward of wrong and of right responses: rho+ and 1 - rho-."""
        false_positive, false_negative = (float(rate.detach()) for rate in self.rates())
        return false_positive, 1.0 - false_negative

    def metrics(self, batch: Batch) -> Metrics:
        """The rates and J; of the channel, not of `batch`."""
        low, high = self.levels()
        return {
            "denoiser/false_positive": low,
            "denoiser/false_negative": 1.0 - high,
            "denoiser/informativeness": high - low,
        }


@final
class GaussianChannel(nn.Module):
    """low, high and std, learned from where the first step's rewards lie: mean -+ one standard deviation, and that.

    `numbers` [3 or 4]: low, high and log std in those standard deviations, from that mean; with a nuisance the slope on length too, in
    those standard deviations of reward per standard deviation of the first step's lengths, from 0. Outliers (`functional.typical_rewards`)
    have no say, and steps whose rewards spread far wider, as where nothing was right at first, or less, renew mean and scale (`watch_scale`).

    Args:
        nuisance: what besides the verdict moves the reward.
        vocabulary: number of token ids; of `tokens` alone.
    """

    LEAST_BELIEF = 1e-4
    """As of flips, but smaller: what a reward says grows with its size, and a judge's liking for long answers gives large
    ones to nonsense. A belief of 0.02 let those pass for right, and responses grew longer."""

    first: Tensor
    """Mean and standard deviation of the first rewards, or of those that renewed them; (0, 0) before there are any that differ."""

    first_tokens: Tensor
    """The same of the first lengths; with a nuisance alone."""

    off: Tensor
    """Steps in a row whose rewards spread far wider than the scale; below 0, far less."""

    def __init__(self, *, nuisance: Nuisance = "none", vocabulary: int = 0) -> None:
        super().__init__()
        self.nuisance = nuisance
        slopes = [] if nuisance == "none" else [0.0]
        self.numbers = nn.Parameter(torch.tensor([-1.0, 1.0, 0.0, *slopes]))
        self.register_buffer("first", torch.zeros(2))
        self.register_buffer("off", torch.zeros(()))
        if nuisance != "none":
            self.register_buffer("first_tokens", torch.zeros(2))
        self.tokens = TokenSlopes(vocabulary) if nuisance == "tokens" else None

    @property
    def started(self) -> bool:
        """Whether rewards that differ have been seen; before, nothing is known of their scale."""
        return float(self.first[1]) > 0.0

    def start(self, batch: Batch) -> None:
        """Take mean and standard deviation of the first rewards and lengths; equal rewards, or none, leave it for a later step."""
        counted = batch.mask.any(dim=1)
        if self.started or not bool(counted.any()):
            return
        first = mean_and_std(typical_rewards(batch.scores[counted]))
        if float(first[1]) > 0.0:
            if self.nuisance != "none":
                self.first_tokens.copy_(mean_and_std(batch.mask.sum(dim=1)[counted]))
            if self.tokens is not None:
                self.tokens.start(batch)
            self.first.copy_(
                first
            )  # last, since it says that the others are there: a signal may come between

    @torch.no_grad()
    def watch_scale(self, batch: Batch) -> None:
        """Renew mean and scale where the rewards of a few steps in a row call for others: what is learned moves by about a learning rate of
        that scale, and its noise has a floor in it. What is in force stays, but for a noise below the new floor. Not to be left halfway."""
        counted = batch.mask.any(dim=1)
        if not self.started or not bool(counted.any()):
            return
        now = mean_and_std(typical_rewards(batch.scores[counted]))
        times = float(now[1]) / float(self.first[1])
        direction = float(times > RENEWED) - float(0.0 < times < 1 / RENEWED)
        self.off.copy_(self.off + direction if direction * float(self.off) > 0 else torch.tensor(direction))
        if abs(float(self.off)) < STEPS:
            return
        low, high, std = self.parameters_in_force()
        self.numbers[:3] = torch.stack(
            [(low - now[0]) / now[1], (high - now[0]) / now[1], (std / now[1]).log()]
        )
        self.numbers[3:].div_(times)
        if self.tokens is not None:
            self.tokens.slopes.div_(times)
        self.first.copy_(now)
        self.off.zero_()

    def parameters_in_force(self) -> tuple[Tensor, Tensor, Tensor]:
        """low, high, std."""
        low, high, log_std = self.numbers[:3]
        mean, scale = self._first()
        return mean + scale * low, mean + scale * high, scale * _Floor.apply(log_std.exp(), LEAST_STD)

    def _first(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the first rewards; 1 before there are any that differ."""
        mean, scale = self.first
        return mean, torch.where(scale == 0.0, 1.0, scale)

    def per_token(self) -> Tensor:
        """What a token more adds to the reward, whatever the verdict; 0 without a nuisance."""
        if self.nuisance == "none":
            return self.first.new_zeros(())
        spread = self.first_tokens[1]
        return self.numbers[3] * self._first()[1] / torch.where(spread == 0.0, 1.0, spread)

    def pays_for(self, batch: Batch, count: int) -> list[tuple[int, float]]:
        """The `count` tokens that move the rewards of these responses most, as (id, reward units); [] but with `tokens`."""
        scale = float(self._first()[1])
        return (
            []
            if self.tokens is None
            else [(token, scale * slope) for token, slope in self.tokens.dearest(batch, count)]
        )

    def log_likelihoods(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log P(seen | clean 1) and log P(seen | clean 0), each [B]: `functional.gaussian_log_likelihoods` of what is left of the reward
        without the nuisance."""
        low, high, std = self.parameters_in_force()
        seen = batch.scores
        if self.nuisance != "none":
            seen = seen - self.per_token() * (batch.mask.sum(dim=1) - self.first_tokens[0])
        if self.tokens is not None:
            seen = seen - self._first()[1] * self.tokens(batch)
        return gaussian_log_likelihoods(seen, low=low, high=high, std=std)

    def levels(self) -> tuple[float, float]:
        """Mean reward of wrong and of right responses: low and high."""
        low, high, _ = self.parameters_in_force()
        return float(low.detach()), float(high.detach())

    def metrics(self, batch: Batch) -> Metrics:
        """The two levels and the noise's standard deviation, and what the nuisance moves in these responses, in the reward's units; NaN
        before the channel has started."""
        low, high, std = (float(x.detach()) for x in self.parameters_in_force())
        found = {"denoiser/low": low, "denoiser/high": high, "denoiser/std": std}
        if self.nuisance != "none":
            found["denoiser/per_token"] = float(self.per_token().detach())
        if self.tokens is not None:
            found["denoiser/dearest_token"] = self.pays_for(batch, 1)[0][1]
        return found if self.started else dict.fromkeys(found, math.nan)


Channel = FlipChannel | GaussianChannel
"""P(seen reward | clean verdict). Its parameters are what is learned; `state_dict` what a checkpoint keeps."""


def build_channel(config: DenoiserConfig, device: torch.device, *, vocabulary: int) -> Channel:
    """The channel that the configuration names."""
    if config.channel == "flip":
        return FlipChannel(config).to(device)
    return GaussianChannel(nuisance=config.nuisance, vocabulary=vocabulary).to(device)
