"""The map from hidden states to logits, as a value: so that it can run on chosen tokens, in chunks.

logits = softcap(logit_scale * (h W^T + b)),    softcap(x) = c tanh(x / c), or x without a cap
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vrpo.functional.chunked_head import HeadForm


@dataclass(frozen=True, slots=True)
class LmHead:
    """The language-model head of one model: references to its live weights, not copies."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    softcap: float | None
    """c above (Gemma 2 and 3); None: no cap."""
    logit_scale: float
    """Constant factor on the logits (Cohere, Granite, Falcon-H1); 1 elsewhere."""
    dtype: torch.dtype | None = None
    """What the operands of the product are rounded to; None: nothing is rounded."""

    def logits(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """Logits in fp32, by the form that the trainer differentiates."""
        form = HeadForm(softcap=self.softcap, logit_scale=self.logit_scale, dtype=self.dtype)
        return form.logits(hidden, self.weight, self.bias)


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
