"""One batch of responses, token by token: the model's logits, the choice, who has finished."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vrpo.errors import NumericsError
from vrpo.rollout.responses import Sampling
from vrpo.rollout.steps import Steps

COMPACT_SHARE = 0.25
"""Finished rows leave the batch when they are at least this share of it: each time copies the cache."""
LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens after which finished rows are counted, by device: to count is to wait for a GPU, which then runs out of work."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """N responses of at most M tokens, on the CPU; what lies past `lengths` is 0."""

    token_ids: Int[Tensor, "N M"]
    logprobs: Float[Tensor, "N M"]
    policy_logprobs: Float[Tensor, "N M"]
    lengths: Int[Tensor, " N"]
    endings: Int[Tensor, " N"]
    states: Float[Tensor, "N M d"] | None
    """fp32, the hidden states that chose the tokens, where they were asked for and the model gives them."""


# no_grad, not inference_mode: some models keep tensors made in a forward pass (rotary tables that depend on the
# length), and inference tensors among them would break the training pass that follows
@torch.no_grad()
def decode(
    steps: Steps,
    repeats: Sequence[int],
    uniforms: Float[Tensor, "N M"] | None,
    sampling: Sampling,
    *,
    keep_states: bool = False,
) -> Decoded:
    """Sample one response per row.

    Args:
        steps: the model at work on the prompts of this batch.
        repeats: number of consecutive rows of each prompt.
        uniforms: [N, M] draws from U[0, 1), one per token; None takes the likeliest token.
        sampling: how to choose and when to end.
        keep_states: keep the hidden states that chose the tokens.

    Raises:
        NumericsError: the model's logits are NaN.
    """
    count = sum(repeats)
    first = steps.start(repeats)
    responses = steps.responses(count, sampling).begin(count, uniforms, keep_states=keep_states)
    responses.take(first)
    look_every = 1 if sampling.stops else LOOK_EVERY.get(first.logits.device.type, 1)
    for made in range(1, sampling.max_tokens + 1):
        if sampling.stops:
            responses.mark_stop_strings()
        if made == sampling.max_tokens:
            break
        if made % look_every == 0:
            kept = responses.running()
            if len(kept) == 0:
                break
            if responses.active - len(kept) >= COMPACT_SHARE * responses.active:
                steps.keep(kept)
                responses.keep(kept)
        steps.next(responses)
    if bool(responses.policy_logprobs[:count].isnan().any()):
        raise NumericsError(
            "the policy's logits are NaN; lower train.learning_rate, raise rollout.temperature, or look for NaN in the model's weights"
        )
    return Decoded(
        token_ids=responses.token_ids[:count].cpu(),
        logprobs=responses.logprobs[:count].cpu(),
        policy_logprobs=responses.policy_logprobs[:count].cpu(),
        lengths=responses.lengths[:count].cpu(),
        endings=responses.endings[:count].cpu(),
        states=None if responses.states is None else responses.states[:count].cpu(),
    )
