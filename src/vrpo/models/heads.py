"""Value heads: hidden state -> V, and for the bottleneck the price of what it keeps.

    scalar       V = w . h + b
    bottleneck   mean, logvar = W_e h (logvar clamped);  z = mean + exp(logvar / 2) eps;  V = MLP(z), K -> 4K (SiLU) -> 1
                 KL = sum_k 1/2 (mean^2 + var - logvar - 1)
    + branch     outputs + MLP(uncertainty features of the frozen model), F -> 32 (SiLU) -> outputs

V is the last layer's output itself, in the units that the critic has for it, its sigmoid, or the mean of 51 bins: see
`functional.value_losses`.

The bottleneck is the variational one of VRPO (arXiv:2508.03058); dimensions and initial values are ours
(docs/algorithms/vrpo.md). Both heads compute in fp32 whatever the backbone runs in.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vrpo.config import learning
from vrpo.functional import (
    UNCERTAINTY_FEATURES,
    Regression,
    gaussian_kl,
    outputs_of,
    read_values,
    reparameterise,
)

LOGVAR_RANGE = (-10.0, 4.0)
"""Limits of log sigma^2: sigma between 0.007 and 7.4, so that neither exp nor the KL can overflow."""

LOGVAR_INIT_SCALE = 0.01
"""Factor on the initial rows that give logvar: sigma starts at 1, where the critic learns; starting it small
leaves it overconfident."""


BRANCH_WIDTH = 32
"""Hidden units that read the frozen model's uncertainty: seven numbers need no more."""


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says about N tokens.

    Example, bottleneck, two tokens: HeadOutput(values=tensor([.41, .07]), raw=tensor([[.41], [.07]]),
    kl=tensor([3.2, 1.9]))
    """

    values: Float[Tensor, " N"]
    """V, fp32; a head gives it in its own units, `Critic.forward_tokens` in reward units."""
    raw: Float[Tensor, "N O"]
    """What the last layer gives and V is read from, fp32; O = 1 but for hl_gauss."""
    kl: Float[Tensor, " N"]
    """KL(q(z|h) || N(0, I)), nats summed over the latent dimensions, fp32; 0 for the scalar head."""


@final
class ScalarHead(nn.Module):
    """V = w . h + b, with w ~ N(0, (1/(d+1))^2) and b = 0, so that the first values are near 0."""

    latent_dim = 0

    def __init__(
        self, hidden_size: int, *, generator: torch.Generator, regression: Regression = "mse"
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.regression: Regression = regression
        self.output = _output_layer(hidden_size, generator, outputs_of(regression))

    def rescale(self, times: float, shift: float) -> None:
        """Give times * o + shift where it gave o."""
        _rescale(self.output, times, shift)

    def forward(
        self, hidden: Float[Tensor, "N d"], noise: Tensor | None, features: Tensor | None = None
    ) -> HeadOutput:
        """Values of N tokens; there is no latent variable, so `noise` is not read, nor are `features`."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.output(hidden.float())
            values = read_values(raw, self.regression)
        return HeadOutput(values, raw, torch.zeros_like(values))


@final
class BottleneckHead(nn.Module):
    """V read from a Gaussian code z of K dimensions."""

    def __init__(
        self,
        hidden_size: int,
        latent_dim: int,
        *,
        generator: torch.Generator,
        regression: Regression = "mse",
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.latent_dim = latent_dim
        self.regression: Regression = regression
        self.encoder = _linear(hidden_size, 2 * latent_dim, generator)
        self.inner = _linear(latent_dim, 4 * latent_dim, generator)
        self.output = _output_layer(4 * latent_dim, generator, outputs_of(regression))
        with torch.no_grad():
            self.encoder.weight[latent_dim:] *= LOGVAR_INIT_SCALE

    def rescale(self, times: float, shift: float) -> None:
        """Give times * o + shift where it gave o."""
        _rescale(self.output, times, shift)

    def forward(
        self,
        hidden: Float[Tensor, "N d"],
        noise: Float[Tensor, "N K"] | None,
        features: Tensor | None = None,
    ) -> HeadOutput:
        """Values from one reparameterised sample of z, or from its mean when `noise` is None.

        Args:
            hidden: [N, d] features.
            noise: [N, K] standard normal draws.
            features: not read.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            mean, logvar = self.encoder(hidden.float()).chunk(2, dim=-1)
            logvar = logvar.clamp(*LOGVAR_RANGE)
            z = mean if noise is None else reparameterise(mean, logvar, noise)
            raw = self.output(nn.functional.silu(self.inner(z)))
            return HeadOutput(read_values(raw, self.regression), raw, gaussian_kl(mean, logvar))


@final
class UncertaintyBranch(nn.Module):
    """F features -> 32 (SiLU) -> O, starting at exactly 0: until it has learned it says nothing."""

    def __init__(self, features: int, outputs: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = _linear(features, BRANCH_WIDTH, generator)
        self.output = nn.utils.skip_init(nn.Linear, BRANCH_WIDTH, outputs)
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.zero_()

    def forward(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N O"]:
        """What is added to the head's outputs for N states."""
        return self.output(nn.functional.silu(self.inner(features)))


@final
class InformedHead(nn.Module):
    """Another head's outputs plus what a language model's uncertainty says: head(h) + branch(f).

    Args:
        head: the other head.
        branch: reads the features.
        source: whose they are, as `critic.features` says: the frozen model's or the denoiser's.
    """

    def __init__(
        self,
        head: "ScalarHead | BottleneckHead",
        branch: UncertaintyBranch,
        source: Literal["uncertainty", "belief"],
    ) -> None:
        super().__init__()
        self.head = head
        self.branch = branch
        self.source = source

    def rescale(self, times: float, shift: float) -> None:
        """Give times * o + shift where it gave o."""
        self.head.rescale(times, shift)
        _rescale(self.branch.output, times, 0.0)

    @property
    def regression(self) -> Regression:
        """How the head's outputs are read."""
        return self.head.regression

    @property
    def hidden_size(self) -> int:
        """d of the head."""
        return self.head.hidden_size

    @property
    def latent_dim(self) -> int:
        """K of the head."""
        return self.head.latent_dim

    def forward(
        self,
        hidden: Float[Tensor, "N d"],
        noise: Float[Tensor, "N K"] | None,
        features: Float[Tensor, "N F"] | None = None,
    ) -> HeadOutput:
        """The head's values and KL; `features` are those of the same N states."""
        assert features is not None, "a head with an uncertainty branch reads the batch's features"
        output = self.head(hidden, noise)
        with torch.autocast(hidden.device.type, enabled=False):
            raw = output.raw + self.branch(features)
            return HeadOutput(read_values(raw, self.head.regression), raw, output.kl)


ValueHead = ScalarHead | BottleneckHead | InformedHead


@torch.no_grad()
def _rescale(output: nn.Linear, times: float, shift: float) -> None:
    """o -> times * o + shift, for the outputs of a last layer."""
    output.weight.mul_(times)
    output.bias.mul_(times).add_(shift)


def default_latent_dim(hidden_size: int) -> int:
    """An eighth of the hidden size, between 16 and 256."""
    return min(max(hidden_size // 8, 16), 256)


def build_head(config: learning.CriticConfig, hidden_size: int, *, generator: torch.Generator) -> ValueHead:
    """The head of a critic section with fresh weights.

    Args:
        config: the critic section.
        hidden_size: d of the backbone.
        generator: the CPU generator of the weights.
    """
    head: ScalarHead | BottleneckHead
    match config.head:
        case learning.ScalarHead():
            head = ScalarHead(hidden_size, generator=generator, regression=config.regression)
        case learning.BottleneckHead(latent_dim=latent_dim):
            width = latent_dim or default_latent_dim(hidden_size)
            head = BottleneckHead(hidden_size, width, generator=generator, regression=config.regression)
    if config.features == "none":
        return head
    outputs = outputs_of(config.regression)
    branch = UncertaintyBranch(len(UNCERTAINTY_FEATURES), outputs, generator=generator)
    return InformedHead(head, branch, config.features)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Weights from U(-1/sqrt(inputs), 1/sqrt(inputs)), zero bias. nn.Linear itself would draw from the global state."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer


def _output_layer(inputs: int, generator: torch.Generator, outputs: int) -> nn.Linear:
    """Weights from N(0, (1/(inputs + 1))^2), zero bias: a default layer can start at |V| of 16. Several outputs start at 0,
    so that all bins are equally likely and V is the middle of their range."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(0.0, 1.0 / (inputs + 1), generator=generator)
        if outputs > 1:
            layer.weight.zero_()
        layer.bias.zero_()
    return layer
