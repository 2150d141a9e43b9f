"""One batch of responses, token by token.

logits ──sample_tokens(uniforms[row, t])──> token ──> EOS? stop text? ──> drop finished rows ──> next logits
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vrpo.errors import NumericsError
from vrpo.functional import SampledTokens, sample_tokens
from vrpo.rollout.steps import Steps
from vrpo.rollout.stopping import StopStrings

RUNNING, EOS, STOP_STRING = 0, 1, 2
"""Codes of `Decoded.endings`: still running at the limit (cut off), ended by EOS, ended by a stop text."""

COMPACT_SHARE = 0.25
"""Finished rows leave the batch when they are at least this share of it: each time copies the cache."""
LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens after which finished rows are counted, by device: to count is to wait for a GPU, which then runs out of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when a response ends."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: Int[Tensor, " E"]
    stops: StopStrings


@dataclass(frozen=True, slots=True)
class Decoded:
    """N responses of at most M tokens, on the CPU; what lies past `lengths` is 0."""

    token_ids: Int[Tensor, "N M"]
    logprobs: Float[Tensor, "N M"]
    policy_logprobs: Float[Tensor, "N M"]
    lengths: Int[Tensor, " N"]
    endings: Int[Tensor, " N"]


# no_grad, not inference_mode: some models keep tensors made in a forward pass (rotary tables that depend on the
# length), and inference tensors among them would break the training pass that follows
@torch.no_grad()
def decode(
    steps: Steps, repeats: Sequence[int], uniforms: Float[Tensor, "N M"] | None, sampling: Sampling
) -> Decoded:
    """Sample one response per row.

    Args:
        steps: the model at work on the prompts of this batch.
        repeats: number of consecutive rows of each prompt.
        uniforms: [N, M] draws from U[0, 1), one per token; None takes the likeliest token.
        sampling: how to choose and when to end.

    Raises:
        NumericsError: the model's logits are NaN.
    """
    logits = steps.start(repeats)
    shape, device = (sum(repeats), sampling.max_tokens), logits.device
    token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, policy_logprobs = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    endings = torch.zeros(shape[0], dtype=torch.int64, device=device)
    lengths = torch.zeros_like(endings)
    rows = torch.arange(shape[0], device=device)  # rows[i]: which response row i of the running batch is
    look_every = 1 if sampling.stops else LOOK_EVERY.get(device.type, 1)
    for t in range(sampling.max_tokens):
        chosen = _choose(logits, None if uniforms is None else uniforms[rows, t], sampling)
        live = endings[rows] == RUNNING
        token_ids[rows, t] = torch.where(live, chosen.token_ids, 0)
        logprobs[rows, t] = torch.where(live, chosen.logprobs, 0.0)
        policy_logprobs[rows, t] = torch.where(live, chosen.policy_logprobs, 0.0)
        lengths[rows] = torch.where(live, t + 1, lengths[rows])
        ended = (chosen.token_ids[:, None] == sampling.eos_token_ids).any(dim=1)
        endings[rows] = torch.where(live & ended, EOS, endings[rows])
        if sampling.stops:
            _mark_stop_strings(token_ids, rows[live], t, endings, sampling.stops)
        if t + 1 == sampling.max_tokens:
            break
        next_ids = chosen.token_ids
        if (t + 1) % look_every == 0:
            kept = (endings[rows] == RUNNING).nonzero().squeeze(1)
            finished = len(rows) - len(kept)
            if finished == len(rows):
                break
            if finished >= COMPACT_SHARE * len(rows):
                steps.keep(kept)
                rows, next_ids = rows[kept], next_ids[kept]
        logits = steps.advance(next_ids)
    if bool(policy_logprobs.isnan().any()):
        raise NumericsError(
            "the policy's logits are NaN; lower train.learning_rate, raise rollout.temperature, or look for NaN in the model's weights"
        )
    return Decoded(token_ids.cpu(), logprobs.cpu(), policy_logprobs.cpu(), lengths.cpu(), endings.cpu())


def _choose(
    logits: Float[Tensor, "A V"], uniforms: Float[Tensor, " A"] | None, sampling: Sampling
) -> SampledTokens:
    if uniforms is not None:
        return sample_tokens(
            logits, uniforms, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
    likeliest = logits.argmax(dim=-1)
    log_p = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    logp = log_p.gather(1, likeliest[:, None]).squeeze(1)
    return SampledTokens(likeliest, logp, logp)


def _mark_stop_strings(token_ids: Tensor, here: Tensor, t: int, endings: Tensor, stops: StopStrings) -> None:
    texts = token_ids[here, : t + 1].tolist()
    for row, ending, ids in zip(here.tolist(), endings[here].tolist(), texts, strict=True):
        if ending == RUNNING and stops.found(ids):
            endings[row] = STOP_STRING
