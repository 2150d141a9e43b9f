"""A batch of prompts as the model reads it: padded on the left, so that all rows append at the same place."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

from vrpo.rollout.engine import LivePolicy
from vrpo.types import NextToken


@final
class LeftPadded:
    """Token ids [P, W] of the prompts, which of them are real, and their positions, which count real tokens."""

    def __init__(self, policy: LivePolicy, prompts: Sequence[np.ndarray]) -> None:
        lengths = [len(prompt) for prompt in prompts]
        self.width = max(lengths)
        ids = np.full((len(prompts), self.width), policy.tokenizer.pad_token_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[self.width - len(prompt) :] = prompt
        self.ids: Int[Tensor, "P W"] = torch.from_numpy(ids).to(policy.device)
        self.lengths: Int[Tensor, " P"] = torch.tensor(lengths, device=policy.device)
        before = (self.width - self.lengths)[:, None]
        columns = torch.arange(self.width, device=policy.device)
        self.positions: Int[Tensor, "P W"] = (columns - before).clamp(min=0)
        # None where nothing is padded: SDPA is fastest without a mask
        self.mask: Bool[Tensor, "P W"] | None = None if min(lengths) == self.width else columns >= before

    def rows(self, repeats: Sequence[int]) -> Int[Tensor, " N"]:
        """Which prompt each of the N rows answers, prompt i being repeated `repeats[i]` times."""
        counts = torch.tensor(repeats, device=self.ids.device)
        return torch.repeat_interleave(torch.arange(len(repeats), device=self.ids.device), counts)

    def read(self, policy: LivePolicy, cache: DynamicCache, *, positions: bool) -> NextToken:
        """What comes first in a response to each prompt; keys and values go into `cache`.

        Args:
            policy: reads.
            cache: an empty one.
            positions: whether the model is told them.
        """
        told = {"position_ids": self.positions} if positions else {}
        return policy.next_token(self.ids, attention_mask=self.mask, cache=cache, **told)
