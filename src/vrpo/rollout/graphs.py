"""Decoding on a GPU as the replay of CUDA graphs: a step costs one launch instead of a thousand.

A graph repeats the same kernels on the same addresses. So keys, values, masks and positions live in buffers that stay
from batch to batch, and a graph is captured for each pair of (rows, columns) out of few sizes, the first time it is met:

    rows, columns ──bucket──> graph? ──no──> run once, capture
                                 └──yes──> replay: tokens, positions, slot ──> states ──head──> logits

Where there is no GPU the same step runs without a graph, which is how it is tested.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from vrpo.rollout.engine import LivePolicy, OneToken
from vrpo.rollout.prompts import LeftPadded

LEAST_ROWS, LEAST_COLUMNS = 8, 64


def bucket(size: int, least: int) -> int:
    """The next of least, 3/2 least, 2 least, 3 least, 4 least, 6 least, ... that holds `size`.

    Example: [bucket(n, 64) for n in (1, 65, 100, 130)] == [64, 96, 128, 192]
    """
    power = least
    while power < size:
        power *= 2
    smaller = power * 3 // 4
    return smaller if power > least and size <= smaller else power


@final
class Buffers:
    """What graphs read and write: the state of a batch of `rows` responses with up to `columns` tokens."""

    def __init__(self, model: OneToken, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns = rows, columns
        shape = rows, 2 * model.kv_heads, columns, model.head_dim
        # zeros, for attention multiplies what its mask hides, and what memory holds by chance may be NaN
        self.cache = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(model.num_layers)]
        self.bias = torch.zeros(rows, columns, dtype=model.dtype, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.cos, self.sin = model.angles(columns)


@final
class GraphDecoder:
    """Buffers and graphs of one policy; called for a batch of prompts it gives the `Steps` of that batch.

    One batch at a time: the next one takes over the buffers.

    Args:
        model: the policy, one token at a time.
    """

    def __init__(self, model: OneToken) -> None:
        self.model = model
        self.buffers: Buffers | None = None
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._pool: Any = None

    def __call__(
        self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int
    ) -> "GraphedSteps":
        """Steps of the policy as it is now: the weights it decodes with are copied here."""
        self.model.refresh()
        return GraphedSteps(self, policy, LeftPadded(policy, prompts), max_tokens)

    def room(self, rows: int, columns: int, device: torch.device) -> Buffers:
        """Buffers of at least this size. Larger ones than before have other addresses: graphs are captured anew."""
        held = self.buffers
        if held is None or rows > held.rows or columns > held.columns:
            if held is not None:
                rows, columns = max(rows, held.rows), max(columns, held.columns)
            self._graphs.clear()
            self.buffers = held = None  # free them before the larger ones are made
            held = Buffers(self.model, bucket(rows, LEAST_ROWS), bucket(columns, LEAST_COLUMNS), device)
            self.buffers = held
        return held

    def step(self, rows: int, columns: int) -> Float[Tensor, "R D"]:
        """States after the tokens in the buffers, for the first `rows` rows and `columns` columns."""
        held = self.buffers
        assert held is not None, "room comes first"
        size = min(bucket(rows, LEAST_ROWS), held.rows), min(bucket(columns, LEAST_COLUMNS), held.columns)
        if not held.slot.is_cuda:
            return self._run(held, *size)[:rows]
        if size not in self._graphs:
            self._graphs[size] = self._capture(held, *size)
        graph, states = self._graphs[size]
        graph.replay()
        return states[:rows]

    def _run(self, held: Buffers, rows: int, columns: int) -> Float[Tensor, "R D"]:
        bias = held.bias[:rows, :columns].index_fill_(1, held.slot, 0.0)
        positions = held.positions[:rows]
        cache = [layer[:rows, :, :columns] for layer in held.cache]
        turn = held.cos[positions], held.sin[positions]
        return self.model.states(held.tokens[:rows], turn, held.slot, cache, bias)

    def _capture(self, held: Buffers, rows: int, columns: int) -> tuple[Any, Tensor]:
        # once without capture, on a stream of its own as capture wants it: kernels are compiled and libraries set up.
        # What it writes, the replay writes again
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._run(held, rows, columns)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            states = self._run(held, rows, columns)
        return graph, states


@final
class GraphedSteps:
    """The `Steps` of one batch in the buffers of a `GraphDecoder`."""

    def __init__(
        self, decoder: GraphDecoder, policy: LivePolicy, prompts: LeftPadded, max_tokens: int
    ) -> None:
        self._decoder = decoder
        self._policy = policy
        self._prompts = prompts
        self._columns = prompts.width
        self._max_tokens = max_tokens

    def start(self, repeats: Sequence[int]) -> Float[Tensor, "N V"]:
        """Read the prompts; see `Steps.start`."""
        prompts, width = self._prompts, self._prompts.width
        cache = DynamicCache(config=self._policy.causal_lm.config.get_text_config(decoder=True))
        logits = prompts.read(self._policy, cache, positions=True)
        rows = prompts.rows(repeats)
        count, device = len(rows), rows.device
        held = self._decoder.room(count, width + self._max_tokens, device)
        held.bias.fill_(-torch.inf)
        held.bias[:count, :width] = (
            0.0
            if prompts.mask is None
            else torch.where(prompts.mask[rows], 0.0, -torch.inf).to(held.bias.dtype)
        )
        # rows beyond `count` decode too and are never looked at; their positions must stay within the table
        held.positions.zero_()
        held.positions[:count] = prompts.lengths[rows]
        held.slot.fill_(width)
        kv_heads = self._decoder.model.kv_heads
        for memory, layer in zip(held.cache, cache.layers, strict=True):
            memory[:count, :kv_heads, :width] = layer.keys[rows]
            memory[:count, kv_heads:, :width] = layer.values[rows]
        return logits[rows]

    def advance(self, tokens: Int[Tensor, " A"]) -> Float[Tensor, "A V"]:
        """Read one token per row; see `Steps.advance`."""
        held = self._decoder.buffers
        assert held is not None, "start comes first"
        held.tokens[: len(tokens)] = tokens
        self._columns += 1
        states = self._decoder.step(len(tokens), self._columns)
        held.positions += 1
        held.slot += 1
        return self._decoder.model.logits(states)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Move these rows to the front; see `Steps.keep`."""
        held = self._decoder.buffers
        assert held is not None, "start comes first"
        count = len(rows)
        for memory in held.cache:
            memory[:count, :, : self._columns] = memory[rows, :, : self._columns]
        held.bias[:count] = held.bias[rows]
        held.positions[:count] = held.positions[rows]
