"""Sums over the responses to one prompt, for everything that compares siblings."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Groups:
    """The valid numbers of every group, and what is pooled over groups; sums in fp64."""

    def __init__(self, x: Tensor, group_ids: Tensor, valid: Tensor | None) -> None:
        self.valid = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
        self.x = torch.where(self.valid, x.float().double(), 0.0)
        names, self.index = group_ids.unique(return_inverse=True)
        self.number = len(names)
        self.count = self.total(torch.ones_like(self.x))
        self.mean = self.total(self.x) / self.count.clamp(min=1)
        self.squares = self.total((self.x - self.mean[self.index]) ** 2)
        self.within = self.squares.sum() / (self.count - 1).clamp(min=0).sum().clamp(min=1)

    def total(self, x: Tensor) -> Tensor:
        """[G] Sum of x [B] over the valid members of each group."""
        return x.new_zeros(self.number).index_add(0, self.index, torch.where(self.valid, x, 0.0))

    def of_row(self, x: Tensor, *, times: Tensor | float = 1.0) -> Tensor:
        """[B] The number of each row's group from x [G], times one of the row's own; 0 where the row is not valid. fp32."""
        return torch.where(self.valid, x[self.index] * times, 0.0).float()


def equal_responses(
    input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B T"], group_ids: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """A number for each row, the same for rows whose prompt and whose chosen tokens are the same.

    Args:
        input_ids: prompt and response; token t + 1 is chosen in column t.
        mask: True on tokens the policy chose.
        group_ids: rows with the same id answer the same prompt.
    """
    chosen = torch.where(mask, input_ids[:, 1:], -1)
    return torch.cat([group_ids[:, None], chosen], dim=1).unique(dim=0, return_inverse=True)[1]
