"""The map from hidden states to logits, as a value: so that it can run on chosen tokens, in chunks.

logits = softcap(logit_scale * (h W^T + b)),    softcap(x) = c tanh(x / c), or x without a cap
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LmHead:
    """The language-model head of one model: references to its live weights, not copies."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    softcap: float | None
    """c above (Gemma 2 and 3); None: no cap."""
    logit_scale: float
    """Constant factor on the logits (Cohere, Granite, Falcon-H1); 1 elsewhere."""

    def logits(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """Logits in fp32. The product runs in the wider dtype, as in `functional.linear_logprobs_and_entropy`:
        sampler and trainer must agree."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = (
            nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias).float() * self.logit_scale
        )
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: Any) -> LmHead | None:
    """The head of a causal language model; None when it has no plain linear output layer.

    The scale and the cap have no common name among the configurations of `transformers`, so this reads the
    known ones. `Policy` checks the outcome against the model's own logits before it relies on it.
    """
    layer = model.get_output_embeddings()
    # the exact type: an adapter around the output layer adds a term that the weight alone does not show
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return LmHead(layer.weight, layer.bias, None if cap is None else float(cap), float(scale))
