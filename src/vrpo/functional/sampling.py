"""Sampling as a function of (logits, uniform): the draw is data, not state.

A row's token depends on its own logits and its own uniform number alone, so it is the same whatever
else is in the batch and wherever a run was resumed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

BLOCK = 256
"""Words of a block of the inverse CDF."""
PIECE = {"cpu": 2**16, "cuda": 2**25}
"""Logits that are sampled from at once, by device: on a CPU what is made of them stays in the cache; on a GPU they fill it, and
top-p alone, which makes eleven tensors of their size, takes at most 1.4 GiB."""
FEWEST_ROWS = 4
"""Of a piece: fewer cost more in calls than the cache saves."""
CANDIDATES = 1024
"""Likeliest words that top-p looks among first on a CPU: sorting all of them takes most of a step's time."""


class SampledTokens(NamedTuple):
    """One token per row and how likely it was."""

    token_ids: Int64[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    """fp32, nats: under the distribution the token was drawn from (truncated and renormalised)."""
    policy_logprobs: Float[Tensor, " B"]
    """fp32, nats: under softmax(logits / temperature), which is what a trainer recomputes."""


def sample_tokens(
    logits: Float[Tensor, "B V"],
    uniforms: Float[Tensor, " B"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> SampledTokens:
    """Inverse-CDF sampling: the first token, in vocabulary order, whose cumulative probability exceeds u.

    Order of the cuts: temperature, then top-k, then top-p on what top-k left, then renormalisation. Of
    equally likely tokens at the edge of a cut, those with the lower id stay. A token of probability 0
    is never drawn, even for u = 1 (a uniform just under 1 rounds to it in fp32).

    Args:
        logits: any floating dtype; -inf forbids a token.
        uniforms: one draw from U[0, 1) per row.
        temperature: > 0; divides the logits.
        top_k: keep the k likeliest tokens; 0 keeps all. top_k = 1 is greedy.
        top_p: keep the smallest set of likeliest tokens with at least this mass ; 1.0 keeps all,
            0.0 the likeliest token alone.

    Returns:
        tokens and their log-probabilities. A row with NaN logits gets NaN log-probabilities.
    """
    rows = max(PIECE.get(logits.device.type, PIECE["cpu"]) // logits.shape[-1], FEWEST_ROWS)
    pieces = [
        _sample(some, drawn, temperature, top_k, top_p)
        for some, drawn in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else SampledTokens(*map(torch.cat, zip(*pieces, strict=True)))


def _sample(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], temperature: float, top_k: int, top_p: float
) -> SampledTokens:
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    keep: Tensor | None = None
    if 0 < top_k < logits.shape[-1]:
        keep = _top_k_mask(log_p, k=top_k)
    if top_p < 1.0:
        keep = _top_p_mask(log_p, keep, top_p=top_p, k=top_k)
    p = log_p.exp() if keep is None else torch.where(keep, log_p.exp(), 0.0)
    index, total = _inverse_cdf(p, uniforms)
    policy_logprobs = log_p.gather(-1, index).squeeze(-1)
    logprobs = policy_logprobs if keep is None else policy_logprobs - total.squeeze(-1).log().float()
    return SampledTokens(index.squeeze(-1), logprobs, policy_logprobs)


def _inverse_cdf(
    p: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]
) -> tuple[Int64[Tensor, "B 1"], Float64[Tensor, "B 1"]]:
    """The first token at which the running sum of p exceeds u times its total, and that total.

    In two stages, blocks and then the tokens of one block: a running sum over 150k words is the slowest part of
    sampling on a CPU. In fp64: near 1 an fp32 sum swallows every token below 6e-8.
    """
    words = p.shape[-1]
    blocks = torch.nn.functional.pad(p, (0, -words % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = ends[:, -1:]
    height = _below(uniforms[:, None].double() * total, total)
    block = torch.searchsorted(ends, height, right=True).clamp(max=ends.shape[-1] - 1)
    inside = (
        blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))
        .squeeze(1)
        .cumsum(dim=-1, dtype=torch.float64)
    )
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    # the two sums of a block may differ in the last bit: stay below the one that is searched
    token = torch.searchsorted(inside, _below(height - start, inside[:, -1:]), right=True)
    return (block * BLOCK + token).clamp(max=words - 1), total


def _below(height: Tensor, total: Tensor) -> Tensor:
    """`height`, but strictly under `total`: the token found is then one at which the sum still rises."""
    return torch.minimum(height, torch.nextafter(total, torch.zeros_like(total)))


def _top_k_mask(log_p: Float[Tensor, "B V"], *, k: int) -> Bool[Tensor, "B V"]:
    """True on exactly k tokens a row; ties at the edge go to the lower ids."""
    edge = log_p.topk(k, dim=-1).values[:, -1:]
    above, ties = log_p > edge, log_p == edge
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=-1) <= room))


def _top_p_mask(
    log_p: Float[Tensor, "B V"], keep: Bool[Tensor, "B V"] | None, *, top_p: float, k: int
) -> Bool[Tensor, "B V"]:
    """True on the smallest set of likeliest tokens, among `keep` (k a row), that holds top_p of keep's mass."""
    if keep is not None:
        # sort k candidates, not V words
        ids = torch.where(keep, log_p, -torch.inf).topk(k, dim=-1).indices
        return _nucleus(log_p, ids, top_p=top_p, whole=False)[0]
    whole = torch.arange(log_p.shape[-1], device=log_p.device).expand_as(log_p)
    if log_p.device.type != "cpu" or log_p.shape[-1] <= 2 * CANDIDATES:  # a GPU would have to be waited for
        return _nucleus(log_p, whole, top_p=top_p, whole=True)[0]
    inside, ends = _nucleus(log_p, log_p.topk(CANDIDATES, dim=-1).indices, top_p=top_p, whole=True)
    if not bool(ends.all()):
        flat = ~ends
        inside[flat] = _nucleus(log_p[flat], whole[flat], top_p=top_p, whole=True)[0]
    return inside


def _nucleus(
    log_p: Float[Tensor, "B V"], ids: Int64[Tensor, "B C"], *, top_p: float, whole: bool
) -> tuple[Bool[Tensor, "B V"], Bool[Tensor, " B"]]:
    """True on the smallest set among the candidates that holds top_p of the mass, and whether it ends before the least likely ones.

    The mass is that of the candidates, or of the `whole` vocabulary, of which they are the likeliest.
    """
    ids = ids.sort(dim=-1).values  # so that the stable sort settles ties
    ordered, rank = log_p.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    p = ordered.exp() if whole else torch.softmax(ordered, dim=-1)
    inside = p.cumsum(dim=-1, dtype=torch.float64) - p < top_p
    inside[:, 0] = True
    ends = ~(inside & (ordered == ordered[:, -1:])).any(dim=-1)
    return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids.gather(-1, rank), inside), ends
