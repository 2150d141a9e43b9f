"""The responses of a batch while they are sampled.

logits ──sample_tokens(uniforms[row, t])──> token ──> column t of its response ──> EOS?

All of it is tensors on the device that are changed in place, so that a CUDA graph can do it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vrpo.functional import SampledTokens, sample_tokens
from vrpo.rollout.stopping import StopStrings
from vrpo.types import NextToken

RUNNING, EOS, STOP_STRING = 0, 1, 2
"""How a response ended: still running at the limit (cut off), by EOS, by a stop text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when a response ends."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: Int[Tensor, " E"]
    stops: StopStrings


@final
class Responses:
    """N responses of at most M tokens, of which the first `active` rows of the running batch are still sampled.

    Row i of the running batch is response `rows[i]`; rows past `active` belong to response N, which nobody reads.

    Args:
        count: N.
        sampling: how to choose and when to end.
        device: where logits come from.
    """

    def __init__(self, count: int, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.count = self.active = count
        shape = count + 1, sampling.max_tokens
        self.token_ids: Int[Tensor, "N1 M"] = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs: Float[Tensor, "N1 M"] = torch.zeros(shape, device=device)
        self.policy_logprobs: Float[Tensor, "N1 M"] = torch.zeros(shape, device=device)
        self.uniforms: Float[Tensor, "N1 M"] = torch.zeros(shape, dtype=torch.float64, device=device)
        self.endings: Int[Tensor, " N1"] = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.lengths: Int[Tensor, " N1"] = torch.zeros_like(self.endings)
        self.rows: Int[Tensor, " N"] = torch.arange(count, device=device)
        self.tokens: Int[Tensor, " N"] = torch.zeros(count, dtype=torch.int64, device=device)
        self.t: Int[Tensor, 1] = torch.zeros(1, dtype=torch.int64, device=device)
        self.greedy = self.keeps_states = False
        self.states: Float[Tensor, "N1 M d"] | None = None

    def begin(
        self, active: int, uniforms: Float[Tensor, "A M"] | None, *, keep_states: bool = False
    ) -> "Responses":
        """Forget all and start `active` responses.

        Args:
            active: how many, at most N.
            uniforms: draws from U[0, 1), one per token; None takes the likeliest token.
            keep_states: keep the hidden states that chose the tokens.
        """
        for tensor in (
            self.token_ids, self.logprobs, self.policy_logprobs, self.endings, self.lengths, self.tokens, self.t
        ):  # fmt: skip
            tensor.zero_()
        self.rows.fill_(self.count)
        self.rows[:active] = torch.arange(active, device=self.rows.device)
        self.active, self.greedy = active, uniforms is None
        self.keeps_states, self.states = keep_states, None
        if uniforms is not None:
            self.uniforms[:active] = uniforms
        return self

    def take(self, read: NextToken) -> None:
        """Choose the next token of the first R rows; one that has ended goes on without being written."""
        rows, t = self.rows[: len(read.logits)], self.t
        chosen = self._choose(read.logits, rows)
        before = self.endings[rows]
        live = before == RUNNING
        self.token_ids[rows, t] = torch.where(live, chosen.token_ids, 0)
        self.logprobs[rows, t] = torch.where(live, chosen.logprobs, 0.0)
        self.policy_logprobs[rows, t] = torch.where(live, chosen.policy_logprobs, 0.0)
        self.lengths[rows] += live
        ended = (chosen.token_ids[:, None] == self.sampling.eos_token_ids).any(dim=1)
        self.endings[rows] = torch.where(live & ended, EOS, before)
        self.tokens[: len(rows)] = chosen.token_ids
        if self.keeps_states and read.states is not None:
            if self.states is None:
                self.states = read.states.new_zeros(*self.token_ids.shape, read.states.shape[1]).float()
            self.states[rows, t] = torch.where(live[:, None], read.states.float(), 0.0)
        self.t += 1

    def running(self) -> Int[Tensor, " K"]:
        """Which rows of the running batch have not ended; waits for the device."""
        return (self.endings[self.rows[: self.active]] == RUNNING).nonzero().squeeze(1)

    def keep(self, kept: Int[Tensor, " K"]) -> None:
        """Go on with these rows of the running batch only."""
        self.active = len(kept)
        for tensor, rest in ((self.rows, self.count), (self.tokens, 0)):
            tensor[: self.active] = tensor[kept]
            tensor[self.active :] = rest

    def mark_stop_strings(self) -> None:
        """End the responses whose text holds a stop text since the last token; waits for the device."""
        rows = self.rows[: self.active]
        rows = rows[self.endings[rows] == RUNNING]
        stops, end = self.sampling.stops, int(self.t)
        # whole responses are copied and decoded only where their last tokens say that it may be worth it
        rows = self._where(rows, stops.may_end, max(end - stops.tail, 0), end)
        self.endings[self._where(rows, stops.found, 0, end)] = STOP_STRING

    def _where(
        self, rows: Int[Tensor, " R"], holds: Callable[[list[int]], bool], start: int, end: int
    ) -> Int[Tensor, " K"]:
        """Those of the rows whose tokens from `start` to `end` it holds for."""
        held = [holds(ids) for ids in self.token_ids[rows, start:end].tolist()]
        return rows[torch.tensor(held, dtype=torch.bool, device=rows.device)]

    def _choose(self, logits: Tensor, rows: Tensor) -> SampledTokens:
        sampling = self.sampling
        if not self.greedy:
            return sample_tokens(
                logits,
                self.uniforms[rows, self.t],
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
        likeliest = logits.argmax(dim=-1)
        log_p = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
        logp = log_p.gather(1, likeliest[:, None]).squeeze(1)
        return SampledTokens(likeliest, logp, logp)
