"""What a frozen language model's doubts say about a response: features of every state, for the value model.

A response that the initial model finds surprising is wrong more often than one it finds obvious, and that can be
read off without any label. Entropy and perplexity guide the value model of VRPO (arXiv:2508.03058) through losses;
here they are input as well. The features are ours.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from vrpo.functional.masked import zero_where_false

UNCERTAINTY_FEATURES = (
    "surprisal of the last token",
    "sum of surprisals",
    "largest surprisal",
    "entropy of the next token",
    "sum of entropies",
    "largest entropy",
    "tokens",
)
"""What `uncertainty_features` counts in each state, in nats of the frozen model; over the response's tokens so far."""


def uncertainty_features(
    entropy: Float[Tensor, "B T"], nll: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B L F"]:
    """log(1 + x) of the seven numbers of UNCERTAINTY_FEATURES, in every state of a sequence.

    State t, t = 0..T, is what the model has read before token t exists; L = T + 1. Only what was read enters: sums and
    maxima run over the tokens before t, the entropy of the next token is the distribution's and not the token's. The
    state after the last token, where no next one follows, has entropy 0 in its place.

    Args:
        entropy: H(p_ref(. | s_t)), nats.
        nll: -log p_ref(token t | s_t), nats.
        mask: True on tokens the policy chose; what stands elsewhere is not read.

    Returns:
        fp32, all at least 0.
    """
    surprise, doubt = zero_where_false(nll, mask).clamp(min=0.0), zero_where_false(entropy, mask)

    def before(x: Tensor) -> Tensor:
        """Column t of the result is column t - 1 of x; 0 before the first token."""
        return pad(x, (1, 0))

    # the last token the policy chose may lie before tokens of an environment
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    latest = torch.where(mask, columns, 0).cummax(dim=1).values
    features = [
        before(surprise.gather(1, latest)),
        before(surprise.cumsum(dim=1)),
        before(surprise.cummax(dim=1).values),
        pad(doubt, (0, 1)),
        before(doubt.cumsum(dim=1)),
        before(doubt.cummax(dim=1).values),
        before(mask.float().cumsum(dim=1)),
    ]
    return torch.log1p(torch.stack(features, dim=-1))
