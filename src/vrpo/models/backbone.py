"""Hidden states at chosen positions of right-padded sequences, each prompt read once for all its responses.

    whole    x [B, L] ─────────────────────────────────────────────────────────> states [B, L, d] ──at──> [N, d]
    shared   prompts [P, W] ──> keys and values ──repeated──> responses [B, R] ──> states [B, R, d] ──at──> [N, d]

The shared way reads P W + B R tokens instead of B L; gradients flow through the keys and values into the prompt's
pass, so both ways give the same numbers up to rounding.
"""

import inspect
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vrpo.types import SharedPrompts

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""Largest difference between states with shared and with whole prompts, fp32."""


def states_at(
    backbone: Any,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
    at: Bool[Tensor, "B L"],
    *,
    compute_dtype: torch.dtype,
    prompts: SharedPrompts | None = None,
) -> Float[Tensor, "N d"]:
    """Last hidden states, after the final norm, at the N positions where `at` is True, row by row.

    The model gets no mask for padding on the right: it is causal, so no real position sees it, and SDPA is fastest
    without one.

    Args:
        backbone: the model below its language-model head.
        input_ids: right padded.
        attention_mask: True on real tokens.
        at: where states are wanted; with `prompts` nowhere before the last token of a row's prompt.
        compute_dtype: precision of the forward pass.
        prompts: read each prompt once; only up to the model's `shared_limit`. None: read every row whole.
    """
    with autocast(input_ids.device, compute_dtype):
        if prompts is None:
            states = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
            return states.flatten(0, 1).index_select(0, at.flatten().nonzero().squeeze(1))
        states = _read_after_prompts(backbone, input_ids, attention_mask, prompts)
    row, column = at.nonzero(as_tuple=True)
    since_prompt = column - (prompts.lengths[prompts.of_row[row]] - 1)
    return states.flatten(0, 1).index_select(0, row * states.shape[1] + since_prompt)


def _read_after_prompts(
    backbone: Any, input_ids: Tensor, attention_mask: Tensor, prompts: SharedPrompts
) -> Float[Tensor, "B columns d"]:
    """Column 0: the state at the last token of a row's prompt. Column j: that at the j-th token of its response."""
    width = int(prompts.lengths.max())
    cache = DynamicCache(config=backbone.config.get_text_config(decoder=True))
    read = backbone(
        input_ids=input_ids[prompts.first, :width], past_key_values=cache, use_cache=True
    ).last_hidden_state
    last = read[torch.arange(len(read), device=read.device), prompts.lengths - 1]
    cache.batch_select_indices(prompts.of_row)

    lengths = prompts.lengths[prompts.of_row]
    longest = int((attention_mask.sum(dim=1) - lengths).max())
    positions = lengths[:, None] + torch.arange(longest, device=lengths.device)
    responses = input_ids.gather(1, positions.clamp(max=input_ids.shape[1] - 1))
    mask = None
    if bool((lengths != width).any()):  # hide what pads the shorter prompts
        columns = torch.arange(width + longest, device=lengths.device)
        mask = (columns < lengths[:, None]) | (columns >= width)
    states = backbone(
        input_ids=responses,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([last[prompts.of_row][:, None], states], dim=1)


@torch.no_grad()
def shared_limit(backbone: Any, *, vocabulary: int) -> int:
    """Longest sequence for which the shared way gives this model's states; 0 and a line in the log when it never does.

    The cache must keep keys and values and nothing else, the states of a short trial must agree, and a sequence
    must end before a sliding window would bite.
    """
    why = None if keeps_keys_only(backbone) else "it keeps more than keys and values between tokens"
    if why is None and not _ways_agree(backbone, vocabulary):
        why = "reading a prompt once for all its responses gives other states than reading it with each"
    if why is None:
        return min(getattr(layer, "sliding_window", sys.maxsize) - 1 for layer in _cache_layers(backbone))
    log.warning(
        "%s: %s; passes over the data read every prompt with each response", type(backbone).__name__, why
    )
    return 0


def keeps_keys_only(backbone: Any) -> bool:
    """Whether the model's forward pass takes a cache, made of attention layers only (sliding windows among them)."""
    parameters = inspect.signature(backbone.forward).parameters
    if not {"past_key_values", "attention_mask", "use_cache"} <= set(parameters):
        return False
    # the exact types: subclasses carry recurrent state
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _cache_layers(backbone))


def _ways_agree(backbone: Any, vocabulary: int) -> bool:
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    # three rows of which two share a prompt of two tokens; short, so that few sliding windows matter
    ids = (
        torch.tensor([[3, 5, 7], [3, 5, 2], [1, 4, 6]], device=next(backbone.parameters()).device)
        % vocabulary
    )
    lengths = torch.tensor([2, 2, 1], device=ids.device)
    prompts = SharedPrompts.of(torch.tensor([0, 0, 1], device=ids.device), lengths)
    real = torch.ones_like(ids, dtype=torch.bool)
    at = torch.arange(3, device=ids.device) >= lengths[:, None] - 1
    whole, shared = (
        states_at(backbone, ids, real, at, compute_dtype=torch.float32, prompts=way)
        for way in (None, prompts)
    )
    return torch.allclose(whole, shared, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)


def _cache_layers(backbone: Any) -> list[Any]:
    return list(DynamicCache(config=backbone.config.get_text_config(decoder=True)).layers)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for a forward pass; nothing in fp32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
