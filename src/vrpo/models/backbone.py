"""Hidden states at chosen positions of right-padded sequences, each prompt read once for all its responses.

    whole    x [B, L] ─────────────────────────────────────────────────────────> states [B, L, d] ──at──> [N, d]
    shared   prompts [P, W] ──> keys and values ──repeated──> responses [B, R] ──> states [B, R, d] ──at──> [N, d]

The shared way reads P W + B R tokens instead of B L; gradients flow through the keys and values into the prompt's
pass, so both ways give the same numbers up to rounding. Rows of similar length are read together, so that little
of what is read is padding.
"""

import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from vrpo.errors import ModelError
from vrpo.types import SharedPrompts

PADDING = 0.03
"""Share of padding up to which rows of different length are read together."""
SMALL_BUCKET = defaultdict(lambda: 4096, cpu=256)
"""Tokens, by device: below this, reading in one go costs less than the padding."""

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
        prompts: read each prompt once; only `within` the model's `shared_limit`, and not where activations are computed
            again in the backward pass, which takes no cache. None: read every row whole.
    """
    if recomputes(backbone) and torch.is_grad_enabled():
        prompts = None
    lengths = attention_mask.sum(dim=1)
    row, column = at.nonzero(as_tuple=True)
    with autocast(input_ids.device, compute_dtype), recomputing(backbone):
        if prompts is None:
            states, starts = _read_rows(backbone, input_ids, lengths)
        else:
            states, starts = _read_after_prompts(backbone, input_ids, lengths, prompts)
            # column 0 there is the last token of the prompt
            column = column - (prompts.lengths[prompts.of_row[row]] - 1)
    return states.index_select(0, starts[row] + column)


def _read_rows(
    backbone: Any, input_ids: Tensor, lengths: Tensor
) -> tuple[Float[Tensor, "S d"], Int[Tensor, " B"]]:
    """States of all rows, one after the other, and where each row's begin."""
    starts, parts, total = torch.zeros_like(lengths), [], 0
    for rows in buckets(lengths):
        width = int(lengths[rows].max())
        states = backbone(input_ids=input_ids[rows, :width], use_cache=False).last_hidden_state
        starts[rows] = total + width * torch.arange(len(rows), device=rows.device)
        parts.append(states.flatten(0, 1))
        total += len(parts[-1])
    return torch.cat(parts), starts


def _read_after_prompts(
    backbone: Any, input_ids: Tensor, lengths: Tensor, prompts: SharedPrompts
) -> tuple[Float[Tensor, "S d"], Int[Tensor, " B"]]:
    """As `_read_rows`, but a row's states begin with the one at the last token of its prompt."""
    cache = DynamicCache(config=backbone.config.get_text_config(decoder=True))
    ids = input_ids[prompts.first, : int(prompts.lengths.max())]
    read = backbone(input_ids=ids, **with_cache(backbone, cache)).last_hidden_state
    last = read[torch.arange(len(read), device=read.device), prompts.lengths - 1]
    starts, parts, total = torch.zeros_like(lengths), [], 0
    responses = lengths - prompts.lengths[prompts.of_row]
    for rows in buckets(responses):
        of_row = prompts.of_row[rows]
        columns = torch.arange(int(responses[rows].max()), device=rows.device)
        # what pads a row may lie beyond the last column, and beyond the positions that a model knows
        positions = (prompts.lengths[of_row][:, None] + columns).clamp(max=input_ids.shape[1] - 1)
        ids = input_ids[rows].gather(1, positions)
        states = _continue(backbone, cache, ids, positions, of_row=of_row, lengths=prompts.lengths[of_row])
        states = torch.cat([last[of_row][:, None], states], dim=1)
        starts[rows] = total + states.shape[1] * torch.arange(len(rows), device=rows.device)
        parts.append(states.flatten(0, 1))
        total += len(parts[-1])
    return torch.cat(parts), starts


def _continue(
    backbone: Any,
    cache: DynamicCache,
    ids: Int[Tensor, "b R"],
    positions: Int[Tensor, "b R"],
    *,
    of_row: Int[Tensor, " b"],
    lengths: Int[Tensor, " b"],
) -> Float[Tensor, "b R d"]:
    """States of `ids` at `positions`, which follow the prompts numbered `of_row`, of `lengths`, whose keys are in `cache`."""
    width = int(lengths.max())
    own = DynamicCache(config=backbone.config.get_text_config(decoder=True))
    for number, layer in enumerate(cache.layers):
        own.update(layer.keys[of_row, :, :width], layer.values[of_row, :, :width], number)
    mask = None
    if bool((lengths != width).any()):  # hide what pads the shorter prompts
        columns = torch.arange(width + ids.shape[1], device=lengths.device)
        mask = (columns < lengths[:, None]) | (columns >= width)
    return backbone(
        input_ids=ids, attention_mask=mask, position_ids=positions, **with_cache(backbone, own)
    ).last_hidden_state


def buckets(lengths: Int[Tensor, " B"]) -> list[Int[Tensor, " b"]]:
    """Rows of similar length, longest first: little of what a bucket reads is padding.

    A bucket takes the next shorter row as long as padding stays below PADDING of it, or it is too small to keep the
    device busy (`SMALL_BUCKET` tokens).
    """
    order = lengths.argsort(descending=True, stable=True)
    found: list[list[int]] = []
    width = real = 0
    enough = SMALL_BUCKET[lengths.device.type]
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        read = width * (len(found[-1]) + 1) if found else 0
        if not found or (read > enough and read > (real + length) * (1 + PADDING)):
            found.append([])
            width, real = length, 0
        found[-1].append(row)
        real += length
    return [torch.tensor(rows, device=lengths.device) for rows in found]


@torch.no_grad()
def shared_limit(backbone: Any, *, vocabulary: int) -> int:
    """Most columns for which the shared way gives this model's states; 0 and a line in the log when it never does.

    The cache must keep keys and values and nothing else, the states of a short trial must agree, and a sequence
    must end before a sliding window would bite. A window counts columns, those that pad a shorter prompt too: see `within`.
    """
    why = why_no_cache(backbone)
    if why is None and not _ways_agree(backbone, vocabulary):
        why = "reading a prompt once for all its responses gives other states than reading it with each"
    if why is None:
        windows = [getattr(layer, "sliding_window", sys.maxsize) for layer in _cache_layers(backbone)]
        config = backbone.config.get_text_config(decoder=True)
        if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo masks inside its layers
            windows.append(config.window_size)
        return min(windows) - 1
    log.warning(
        "%s: %s; passes over the data read every prompt with each response", type(backbone).__name__, why
    )
    return 0


def spread(states: Float[Tensor, "N d"], at: Bool[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
    """States where `at` is True, 0 elsewhere."""
    return states.new_zeros(*at.shape, states.shape[-1]).masked_scatter(at[..., None], states)


def within(prompts: SharedPrompts | None, attention_mask: Tensor, limit: int) -> SharedPrompts | None:
    """`prompts`, where reading them the shared way takes at most `limit` columns: the longest prompt's and the longest response's."""
    if prompts is None or 2 * attention_mask.shape[1] <= limit:
        return prompts
    responses = attention_mask.sum(dim=1) - prompts.lengths[prompts.of_row]
    return prompts if int(prompts.lengths.max() + responses.max()) <= limit else None


def context_length(model: Any) -> int | None:
    """Longest sequence the model was built for; None when its configuration does not say.

    With LongRoPE (Phi 3 and 4) the length from which on it turns all positions by other angles: what was sampled before a response
    came that far would not be what is read after.
    """
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        rope.get("original_max_position_embeddings", longest)
        if rope.get("rope_type") == "longrope"
        else longest
    )


def cache_argument(model: Any) -> str | None:
    """What the forward pass calls its keys and values; None where it takes none. `transformers` 5.24 renamed it."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that hand `cache` to a forward pass that takes one."""
    name = cache_argument(model)
    assert name is not None, "why_no_cache comes first"
    return {name: cache, "use_cache": True}


def why_no_cache(backbone: Any) -> str | None:
    """Why keys and values alone do not carry this model from token to token; None when they do.

    The cache must be made of attention layers only, sliding windows among them.
    """
    parameters = inspect.signature(backbone.forward).parameters
    if cache_argument(backbone) is None or not {"attention_mask", "use_cache"} <= set(parameters):
        return "its forward pass takes no key-value cache"
    # the exact types: subclasses carry recurrent state, which padding would enter
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _cache_layers(backbone)):
        return "it keeps more than keys and values between tokens"
    return None


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


def recompute_activations(model: Any) -> None:
    """From now on keep one hidden state a layer in passes with gradient, and compute the rest again.

    Raises:
        ModelError: the model of `transformers` cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot compute activations again; set train.activation_checkpointing: false"
        )
    # transformers renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in _checkpointed_layers(model):
        for name, rate in vars(layer).items():
            if "dropout" in name and isinstance(rate, float):
                setattr(
                    layer, name, 0.0
                )  # what the layer itself would drop in training mode, which `recomputing` puts it in


def compile_blocks(model: Any) -> None:
    """From now on run norms and feed-forward blocks as `torch.compile` makes them: few kernels for what is bound by memory.

    Not whole layers: attention reads the number of its layer, so every layer would be compiled by itself.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            module.compile(dynamic=True)


def recomputes(backbone: Any) -> bool:
    """Whether `recompute_activations` was called."""
    return any(layer.gradient_checkpointing for layer in _checkpointed_layers(backbone))


@contextmanager
def recomputing(backbone: Any) -> Iterator[None]:
    """Layers checkpoint in training mode only. They are put in it for a pass with gradient, without what is inside them:
    dropout stays off, and the sampler's passes keep their cache."""
    layers = [
        x for x in _checkpointed_layers(backbone) if x.gradient_checkpointing and torch.is_grad_enabled()
    ]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _checkpointed_layers(backbone: Any) -> list[GradientCheckpointingLayer]:
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for a forward pass; nothing in fp32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
