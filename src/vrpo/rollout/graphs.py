"""Sampling on a GPU as the replay of CUDA graphs: a token costs one launch instead of a thousand.

A graph repeats the same kernels on the same addresses. So keys, values, masks, positions and responses live in buffers
that stay from batch to batch, and a graph is captured for each pair of (rows, columns) out of few sizes, when it is first met:

    rows, columns ──bucket──> graph? ──no──> run once, capture
                                 └──yes──> replay: last tokens ──> states ──> logits ──> next tokens, endings

Where there is no GPU the same step runs without a graph, which is how it is tested.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vrpo.rollout.engine import LivePolicy, OneToken
from vrpo.rollout.prompts import LeftPadded
from vrpo.rollout.responses import Responses, Sampling
from vrpo.types import NextToken

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

    def __init__(self, model: OneToken, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.cos, self.sin = model.angles(columns)
        device = self.cos.device
        shape = rows, 2 * model.kv_heads, columns, model.head_dim
        # zeros, for attention multiplies what its mask hides, and what memory holds by chance may be NaN
        self.cache = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(model.num_layers)]
        self.bias = torch.zeros(rows, columns, dtype=model.dtype, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)


@final
class GraphDecoder:
    """Buffers and graphs of one policy; called for a batch of prompts it gives the `Steps` of that batch.

    One batch at a time: the next one takes over the buffers.

    Args:
        model: the policy, one token at a time.
    """

    def __init__(self, model: OneToken) -> None:
        self.model = model
        self._buffers: Buffers | None = None
        self._responses: Responses | None = None
        self._graphs: dict[tuple[int, int, bool], Any] = {}
        self._pool: Any = None

    def __call__(
        self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int
    ) -> "GraphedSteps":
        """Steps of the policy as it is now: the weights it decodes with are copied here."""
        self.model.refresh()
        return GraphedSteps(self, LeftPadded(policy, prompts), max_tokens)

    def room(self, rows: int, columns: int) -> Buffers:
        """Buffers of at least this size. Larger ones than before have other addresses: graphs are captured anew."""
        held = self._buffers
        if held is None or rows > held.rows or columns > held.columns:
            rows, columns = bucket(rows, LEAST_ROWS), bucket(columns, LEAST_COLUMNS)
            if held is not None:
                rows, columns = max(rows, held.rows), max(columns, held.columns)
            self._forget_graphs()
            self._buffers = held = None  # free them before the larger ones are made
            self._buffers = held = Buffers(self.model, rows, columns)
        return held

    def responses(self, sampling: Sampling) -> Responses:
        """Room for as many responses as the buffers have rows."""
        held, made = self.room(0, 0), self._responses
        if made is None or made.count != held.rows or made.sampling is not sampling:
            self._forget_graphs()
            self._responses = made = Responses(held.rows, sampling, held.slot.device)
        return made

    def _forget_graphs(self) -> None:
        # a pool lives as long as the graphs in it, and cannot be captured into after the last of them
        self._graphs.clear()
        self._pool = None

    def step(self, columns: int) -> None:
        """Read the last tokens of the responses and take the next; `columns` tokens of a row are then in the cache."""
        held, made = self._buffers, self._responses
        assert held is not None and made is not None, "room and responses come first"
        rows = min(bucket(made.active, LEAST_ROWS), held.rows)
        columns = min(bucket(columns, LEAST_COLUMNS), held.columns)
        if not held.slot.is_cuda:
            self._run(held, made, rows, columns)
            return
        size = rows, columns, made.greedy
        if size not in self._graphs:
            self._graphs[size] = self._capture(held, made, rows, columns)
        self._graphs[size].replay()

    def read(self, held: Buffers, tokens: Int[Tensor, " R"], columns: int) -> NextToken:
        """What comes after `tokens`; nothing here waits for the device."""
        bias = held.bias[: len(tokens), :columns].index_fill_(1, held.slot, 0.0)
        positions = held.positions[: len(tokens)]
        cache = [layer[: len(tokens), :, :columns] for layer in held.cache]
        turn = held.cos[positions], held.sin[positions]
        states = self.model.states(tokens, turn, held.slot, cache, bias)
        held.positions += 1
        held.slot += 1
        return NextToken(self.model.logits(states), states)

    def _run(self, held: Buffers, made: Responses, rows: int, columns: int) -> None:
        made.take(self.read(held, made.tokens[:rows], columns))

    def _capture(self, held: Buffers, made: Responses, rows: int, columns: int) -> Any:
        # once without capture, on a stream of its own as capture wants it: kernels are compiled and libraries set up.
        # What it writes the replay writes again, but for what it counts on
        counted = held.positions, held.slot, made.tokens, made.t, made.endings, made.lengths
        before = [tensor.clone() for tensor in counted]
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._run(held, made, rows, columns)
        main.wait_stream(side)
        for tensor, value in zip(counted, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(held, made, rows, columns)
        return graph


@final
class GraphedSteps:
    """The `Steps` of one batch in the buffers of a `GraphDecoder`."""

    def __init__(self, decoder: GraphDecoder, prompts: LeftPadded, max_tokens: int) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._columns = prompts.width
        self._most = prompts.width + max_tokens

    def start(self, repeats: Sequence[int]) -> NextToken:
        """Read the prompts; see `Steps.start`."""
        prompts, width = self._prompts, self._prompts.width
        rows = prompts.rows(repeats)
        count, model = len(rows), self._decoder.model
        held = self._decoder.room(count, self._most)
        turn = held.cos[prompts.positions], held.sin[prompts.positions]
        states, kept = model.read(prompts.ids, prompts.mask, turn)
        held.bias.fill_(-torch.inf)
        held.bias[:count, :width] = 0.0
        if prompts.mask is not None:
            held.bias[:count, :width].masked_fill_(~prompts.mask[rows], -torch.inf)
        # rows beyond `count` decode too and are never looked at; their positions must stay within the table
        held.positions.zero_()
        held.positions[:count] = prompts.lengths[rows]
        held.slot.fill_(width)
        for memory, layer in zip(held.cache, kept, strict=True):
            memory[:count, :, :width] = layer[rows]
        return NextToken(model.logits(states), states).of(rows)

    def responses(self, count: int, sampling: Sampling) -> Responses:
        """Those that the graphs write; see `Steps.responses`."""
        del count  # `start` made room
        return self._decoder.responses(sampling)

    def next(self, responses: Responses) -> None:
        """Replay one token; see `Steps.next`."""
        del responses  # the decoder's own
        self._columns += 1
        self._decoder.step(self._columns)

    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """The same without a graph; see `Steps.advance`."""
        self._columns += 1
        return self._decoder.read(self._decoder.room(0, 0), tokens, bucket(self._columns, LEAST_COLUMNS))

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Move these rows to the front; see `Steps.keep`."""
        held, count = self._decoder.room(0, 0), len(rows)
        for memory in held.cache:
            memory[:count, :, : self._columns] = memory[rows, :, : self._columns]
        held.bias[:count] = held.bias[rows]
        held.positions[:count] = held.positions[rows]
