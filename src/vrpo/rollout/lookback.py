"""What a row looks back at while it is sampled: keys and values of its prompt and of the tokens after it.

    repeated    every row has a copy of its prompt's keys and values in front of its own       rows x (prompt + new)
    shared      a prompt's are kept once, and all queries of its rows read them together       prompts x prompt + rows x new

    softmax(q [K_prompt K_new]^T) [V_prompt; V_new] = p_prompt V_prompt + p_new V_new

On a CPU one token costs the reading of the cache, not the arithmetic on it. Exact both ways.
"""

from typing import Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

FEWEST_COLUMNS = 16
"""Prompts of fewer tokens are repeated: there the calls that collect queries by prompt cost more than is saved."""
FEWEST_ROWS = 2
"""Rows a prompt, on average, below which there is little to share."""


@runtime_checkable
class LookBack(Protocol):
    """Keys and values of every layer for R rows."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "R kv g d"],
        key: Float[Tensor, "R kv d"],
        value: Float[Tensor, "R kv d"],
        *,
        scale: float,
    ) -> Float[Tensor, "R kv g d"]:
        """Keep one more token of each row, then read all that it sees; g queries share a head's keys."""
        ...

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows only, in their order."""
        ...


def look_back(
    cache: DynamicCache, mask: Bool[Tensor, "P W"] | None, rows: Int[Tensor, " R"], *, room: int
) -> LookBack:
    """The cheaper of the two forms.

    Args:
        cache: read prompts, in layers that can repeat rows (`roomy_cache`).
        mask: which of their columns are real; None: all.
        rows: the prompt of each row, in ascending order.
        room: most tokens a row can add.
    """
    prompts, _, width, _ = cache.layers[0].keys.shape
    form = SharedPrompts if shares_prompts(rows.device, len(rows) / prompts, width) else RepeatedPrompts
    return form(cache, mask, rows, room=room)


def shares_prompts(device: torch.device, rows_per_prompt: float, width: int) -> bool:
    """Whether prompts padded to `width` tokens are kept once for their rows; on a GPU that has not been tried."""
    return device.type == "cpu" and width >= FEWEST_COLUMNS and rows_per_prompt >= FEWEST_ROWS


@final
class RepeatedPrompts:
    """See the module; the arguments are those of `look_back`."""

    def __init__(
        self, cache: DynamicCache, mask: Bool[Tensor, "P W"] | None, rows: Int[Tensor, " R"], *, room: int
    ) -> None:
        self._cache = cache
        self._visible = None if mask is None else F.pad(mask, (0, room), value=True)
        self.keep(rows)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float
    ) -> Float[Tensor, "R kv g d"]:
        """See `LookBack.attend`."""
        keys, values = self._cache.update(key[:, :, None], value[:, :, None], layer)
        visible = None if self._visible is None else self._visible[:, None, None, : keys.shape[2]]
        # the heads that share keys stand where more queries would
        return F.scaled_dot_product_attention(
            query.to(keys.dtype), keys, values, attn_mask=visible, scale=scale
        )

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """See `LookBack.keep`."""
        self._cache.batch_select_indices(rows)
        self._visible = None if self._visible is None else self._visible[rows]


@final
class SharedPrompts:
    """See the module; the arguments are those of `look_back`.

    Queries are collected in slots [prompt, head, place among the prompt's rows]; slots that no row fills read row 0's.
    """

    def __init__(
        self, cache: DynamicCache, mask: Bool[Tensor, "P W"] | None, rows: Int[Tensor, " R"], *, room: int
    ) -> None:
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        first = layers[0][0]
        self._prompts, self._kv_heads, self._width, _ = first.shape
        self._hidden = (
            None
            if mask is None
            else torch.zeros(mask.shape, dtype=first.dtype).masked_fill_(~mask, -torch.inf)[:, None, None]
        )
        self._kept = [tuple(part.flatten(0, 1) for part in layer) for layer in layers]
        self._new = [
            tuple(part.new_empty(len(rows) * self._kv_heads, room, part.shape[3]) for part in layer)
            for layer in layers
        ]
        self._lengths = [0] * len(layers)
        self._place(rows)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float
    ) -> Float[Tensor, "R kv g d"]:
        """See `LookBack.attend`."""
        (kept_keys, kept_values), width = self._kept[layer], self._width
        keys, values = self._append(layer, key.flatten(0, 1), value.flatten(0, 1))
        own = (query * scale).to(keys.dtype).flatten(0, 1)
        scores = self._by_row(self._mask(torch.bmm(self._by_prompt(own), kept_keys.mT)))
        p = torch.cat([scores, torch.bmm(own, keys.mT)], dim=-1).softmax(dim=-1).to(values.dtype)
        from_prompt = self._by_row(torch.bmm(self._by_prompt(p[..., :width]), kept_values))
        return torch.baddbmm(from_prompt, p[..., width:], values).view(query.shape)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """See `LookBack.keep`."""
        heads = self._kv_heads
        for (keys, values), length in zip(self._new, self._lengths, strict=True):
            for buffer in (keys, values):
                by_row = buffer.unflatten(0, (-1, heads))
                by_row[: len(rows), :, :length] = by_row[rows, :, :length]
        left, rows = torch.unique_consecutive(self._rows[rows], return_inverse=True)
        if len(left) < self._prompts:
            self._prompts = len(left)
            self._hidden = None if self._hidden is None else self._hidden[left]
            self._kept = [
                tuple(part.unflatten(0, (-1, heads))[left].flatten(0, 1) for part in layer)
                for layer in self._kept
            ]
        self._place(rows)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows' own tokens, these included: [R kv, n, d]."""
        end = self._lengths[layer]
        for buffer, new in zip(self._new[layer], (key, value), strict=True):
            buffer[: len(new), end] = new
        self._lengths[layer] = end + 1
        keys, values = (buffer[: len(key), : end + 1] for buffer in self._new[layer])
        return keys, values

    def _place(self, rows: Int[Tensor, " R"]) -> None:
        """Which slot each row's heads take, and whose head lies in each slot."""
        counts = torch.bincount(rows, minlength=self._prompts)
        places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        group, heads = int(counts.max()), torch.arange(self._kv_heads)
        self._rows, self._group = rows, group
        self._slots = ((rows[:, None] * self._kv_heads + heads) * group + places[:, None]).flatten()
        self._sources = torch.zeros(self._prompts * self._kv_heads * group, dtype=torch.int64)
        self._sources[self._slots] = torch.arange(len(self._slots))

    def _by_prompt(self, x: Float[Tensor, "Rkv g n"]) -> Float[Tensor, "Pkv Jg n"]:
        return x.index_select(0, self._sources).view(self._prompts * self._kv_heads, -1, x.shape[-1])

    def _by_row(self, x: Float[Tensor, "Pkv Jg n"]) -> Float[Tensor, "Rkv g n"]:
        return x.view(len(self._sources), -1, x.shape[-1]).index_select(0, self._slots)

    def _mask(self, scores: Float[Tensor, "Pkv Jg W"]) -> Tensor:
        """The scores, -inf where a prompt is padded."""
        if self._hidden is None:
            return scores
        return (scores.unflatten(0, (self._prompts, -1)) + self._hidden).flatten(0, 1)
