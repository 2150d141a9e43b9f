"""A key-value cache with room for the whole response, so that a step writes one token instead of copying the rest."""

from typing import Any, final

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@final
class RoomyLayer(DynamicLayer):
    """Keys and values [N, heads, tokens, d] of one layer, views of buffers with room for `room` more tokens.

    The prompt is stored as it comes; `batch_select_indices`, which repeats it for its samples, makes the buffers.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; all keys and values so far."""
        if not self._buffers:
            return super().update(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: len(new), :, start:end] = new
        self._show(len(key_states), end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows; the first call may repeat rows, later ones only drop some."""
        length = self.keys.shape[-2]
        if self._buffers:
            for buffer in self._buffers:
                buffer[: len(indices), :, :length] = buffer[indices, :, :length]
        else:
            for source in (self.keys, self.values):
                _, heads, _, width = source.shape
                buffer = source.new_empty(len(indices), heads, length + self._room, width)
                buffer[:, :, :length] = source[indices]
                self._buffers.append(buffer)
        self._show(len(indices), length)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """The model's cache with every plain attention layer a `RoomyLayer`; sliding windows stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
