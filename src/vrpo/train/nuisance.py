"""What besides the verdict moves a judge's reward, as straight lines that the Gaussian channel learns along.

    length  slope (tokens - first mean)
    tokens  that, and sum_v slope_v ([v occurs in the response] - its share of the first responses), v over the vocabulary

Slopes are in standard deviations of the first step's rewards. So the user need not know what the judge likes, and can read
afterwards what it pays for.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vrpo.types import Batch

WEIGHT_DECAY = 0.1
"""Of the tokens' slopes: one of a token that is rarely seen, or pays nothing, goes back to 0."""


def mean_and_std(x: Tensor) -> Tensor:
    """[2] Mean and population standard deviation of x [N], fp32; of equal numbers exactly 0, not what rounding leaves."""
    x = x.float()
    return torch.stack([x.mean(), torch.where((x == x[0]).all(), 0.0, x.std(correction=0))])


@final
class TokenSlopes(nn.Module):
    """One slope for every token of the vocabulary: what its occurring, once or more, adds to the reward.

    Args:
        vocabulary: V, the number of token ids.
    """

    shares: Tensor
    """[V] Of the first responses that count, the share in which each token occurs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(vocabulary))
        self.register_buffer("shares", torch.zeros(vocabulary))

    def start(self, batch: Batch) -> None:
        """Take the shares from the first responses."""
        self.shares.copy_(self._shares(batch))

    def _shares(self, batch: Batch) -> Tensor:
        """[V] Share of the responses that count in which each token occurs."""
        ids, occurs = self._occurring(batch)
        found = ids[occurs]
        counts = torch.zeros_like(self.shares).index_add_(
            0, found, torch.ones_like(found, dtype=torch.float32)
        )
        return counts / max(int(batch.mask.any(dim=1).sum()), 1)

    def forward(self, batch: Batch) -> Tensor:
        """[B] What the tokens of each response add, less what those of the first responses added on average."""
        ids, occurs = self._occurring(batch)
        return torch.where(occurs, self.slopes[ids], 0.0).sum(dim=1) - self.slopes @ self.shares

    def _occurring(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sorted token ids [B, T] of each response, and [B, T] where one stands for the first time. No [B, V] tensor exists."""
        nothing = len(self.slopes)
        ids = torch.where(batch.mask, batch.input_ids[:, 1:], nothing).sort(dim=1).values
        fresh = ids != pad(ids[:, :-1], (1, 0), value=nothing)
        return ids.clamp(max=nothing - 1), fresh & (ids != nothing)

    def dearest(self, batch: Batch, count: int) -> list[tuple[int, float]]:
        """The tokens that move the rewards of these responses most, as (id, slope in standard deviations), the first most.

        By |slope| sqrt(p (1 - p)), p the share of responses with the token: the slope of a token that hardly occurs is chance.
        """
        slopes, shares = self.slopes.detach(), self._shares(batch)
        moved = slopes.abs() * (shares * (1.0 - shares)).sqrt()
        top = moved.topk(min(count, len(slopes))).indices.tolist()
        return [(token, float(slopes[token])) for token in top]
