"""Where the next token comes from: CUDA graphs, a key-value cache that grows, or the whole sequence again.

All serve one batch of prompts, each repeated for its samples. `start` reads the prompts, `advance` appends one
token per row, `keep` drops finished rows.
"""

import copy
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vrpo.rollout.cache import roomy_cache
from vrpo.rollout.engine import LivePolicy
from vrpo.rollout.graphs import GraphDecoder
from vrpo.rollout.lookback import look_back
from vrpo.rollout.prompts import LeftPadded
from vrpo.rollout.responses import Responses, Sampling
from vrpo.types import NextToken

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""Largest difference between logits with and without a cache, in fp32 (a model in bfloat16 is probed in fp32 too)."""


@runtime_checkable
class Steps(Protocol):
    """The model at work on the rows of one batch, token by token."""

    def start(self, repeats: Sequence[int]) -> NextToken:
        """The first response token; prompt i becomes `repeats[i]` consecutive rows."""
        ...

    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """The token after `tokens`, one per remaining row."""
        ...

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows only."""
        ...

    def responses(self, count: int, sampling: Sampling) -> Responses:
        """Room for at least `count` responses."""
        ...

    def next(self, responses: Responses) -> None:
        """Read the last token of each row and take the one after it."""
        ...


class _TokenByToken(ABC):
    """What is taken one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def responses(self, count: int, sampling: Sampling) -> Responses:
        """New ones; see `Steps.responses`."""
        return Responses(count, sampling, self._device)

    @abstractmethod
    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """See `Steps.advance`."""

    def next(self, responses: Responses) -> None:
        """Advance and take; see `Steps.next`."""
        responses.take(self.advance(responses.tokens[: responses.active]))


@final
class CachedSteps(_TokenByToken):
    """Each prompt is read once, then its cache is repeated for its samples; a step reads one token a row."""

    def __init__(self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int) -> None:
        super().__init__(policy.device)
        self._policy = policy
        self._takes_positions = "position_ids" in inspect.signature(policy.backbone.forward).parameters
        self._cache = roomy_cache(policy.causal_lm.config.get_text_config(decoder=True), max_tokens)
        self._prompts = LeftPadded(policy, prompts)
        self._lengths, self._mask = self._prompts.lengths, self._prompts.mask

    def start(self, repeats: Sequence[int]) -> NextToken:
        """Read the prompts; see `Steps.start`."""
        first = self._prompts.read(self._policy, self._cache, positions=self._takes_positions)
        rows = self._prompts.rows(repeats)
        self.keep(rows)
        return first.of(rows)

    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """Read one token per row; see `Steps.advance`."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        told = {"position_ids": self._lengths[:, None]} if self._takes_positions else {}
        read = self._policy.next_token(tokens[:, None], attention_mask=self._mask, cache=self._cache, **told)
        self._lengths = self._lengths + 1
        return read

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Select rows of the cache; see `Steps.keep`."""
        self._cache.batch_select_indices(rows)
        self._lengths = self._lengths[rows]
        self._mask = None if self._mask is None else self._mask[rows]


@final
class LeanSteps(_TokenByToken):
    """As `CachedSteps`, for policies that have a lean step; long prompts are kept once for all their samples."""

    def __init__(self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int) -> None:
        super().__init__(policy.device)
        self._policy = policy
        self._room = max_tokens
        step = policy.lean_step()
        assert step is not None, "asked only where there is one"
        self._step = step
        self._prompts = LeftPadded(policy, prompts)

    def start(self, repeats: Sequence[int]) -> NextToken:
        """Read the prompts; see `Steps.start`."""
        cache = roomy_cache(self._policy.causal_lm.config.get_text_config(decoder=True), self._room)
        first = self._prompts.read(self._policy, cache, positions=True)
        rows = self._prompts.rows(repeats)
        self._past = look_back(cache, self._prompts.mask, rows, room=self._room)
        self._lengths = self._prompts.lengths[rows]
        return first.of(rows)

    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """Read one token per row; see `Steps.advance`."""
        read = self._step(tokens, self._lengths, self._past)
        self._lengths = self._lengths + 1
        return read

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Select rows; see `Steps.keep`."""
        self._past.keep(rows)
        self._lengths = self._lengths[rows]


@final
class UncachedSteps(_TokenByToken):
    """Every step reads the whole sequences again: right for any causal model, and slow."""

    def __init__(self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int) -> None:
        del max_tokens  # there is no room to make
        super().__init__(policy.device)
        self._policy = policy
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=policy.device)
        width = max(len(ids) for ids in prompts)
        ids = np.full((len(prompts), width), policy.tokenizer.pad_token_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._ids = torch.from_numpy(ids).to(policy.device)

    def start(self, repeats: Sequence[int]) -> NextToken:
        """Read the prompts; see `Steps.start`."""
        counts = torch.tensor(repeats, device=self._ids.device)
        rows = torch.arange(len(repeats), device=counts.device).repeat_interleave(counts)
        first = self._read()
        self.keep(rows)
        return first.of(rows)

    def advance(self, tokens: Int[Tensor, " A"]) -> NextToken:
        """Append one token per row and read everything; see `Steps.advance`."""
        self._ids = torch.cat(
            [self._ids, torch.full_like(self._ids[:, :1], self._policy.tokenizer.pad_token_id)], dim=1
        )
        self._ids = self._ids.scatter(1, self._lengths[:, None], tokens[:, None])
        self._lengths = self._lengths + 1
        return self._read()

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Select rows; see `Steps.keep`."""
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]

    def _read(self) -> NextToken:
        # padded on the right, and the model is causal: no mask is needed
        return self._policy.next_token(self._ids, self._lengths - 1)


@runtime_checkable
class MakeSteps(Protocol):
    """The `Steps` of a batch of prompts."""

    def __call__(self, policy: LivePolicy, prompts: Sequence[np.ndarray], *, max_tokens: int) -> Steps:
        """Ready for `start`; no response will have more than `max_tokens`."""
        ...


@torch.no_grad()
def steps_for(policy: LivePolicy, *, cuda_graphs: bool = True) -> MakeSteps:
    """The fastest way that is right for this model; one warning line when it is a slow one.

    The cache must be made of plain attention layers, and two prompts of different length must then get the
    logits that reading them whole gives. On a GPU, graphs must give them too.
    """
    why = policy.why_no_cache
    cached = CachedSteps if policy.lean_step() is None else LeanSteps
    if why is None and not _agrees(policy, cached):
        why = "decoding with its cache gives other logits than reading the whole sequence"
    name = type(policy.causal_lm).__name__
    if why is not None:
        log.warning("%s: %s; every step reads the whole sequences again, which is slow", name, why)
        return UncachedSteps
    if policy.device.type != "cuda" or not cuda_graphs:
        return cached
    model = policy.static_model()
    if model is None:
        log.warning("%s: decoding as CUDA graphs is for Llama, Qwen 2 and Qwen 3; sampling is slower", name)
        return cached
    if not _agrees(policy, None):
        log.warning("%s: CUDA graphs give other logits than the model; sampling goes on without them", name)
        return cached
    return GraphDecoder(model)


def _agrees(policy: LivePolicy, make: MakeSteps | None) -> bool:
    """Whether `make` gives the logits that reading the whole sequences gives; None: graphs of the policy in fp32."""
    words = policy.causal_lm.get_input_embeddings().weight.shape[0]
    prompts = [np.arange(1, 3) % words, np.arange(2, 7) % words]
    exact = copy.copy(policy)
    exact.compute_dtype = torch.float32
    if make is None:
        model = exact.static_model()
        assert model is not None, "asked only where there is one"
        make = GraphDecoder(model)
    logits = []
    for kind in (make, UncachedSteps):
        steps = kind(exact, prompts, max_tokens=2)
        first = steps.start([2, 1]).logits
        steps.keep(torch.tensor([1, 2], device=policy.device))
        second = steps.advance(torch.tensor([3 % words, 4 % words], device=policy.device)).logits
        logits.append(torch.cat([first[1:], second]))
    tried, whole = logits
    return torch.allclose(tried, whole, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)
