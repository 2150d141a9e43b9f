"""How a batch is split into forward-backward passes: little padding, and prompts shared where that saves more.

A pass over rows S reads

    P W + |S| R        P prompts of at most W tokens, each once; responses of at most R tokens
    |S| L              where prompts are not shared; L longest sequence

tokens. Two orders are tried, prompt by prompt and by length, and the one that reads less is taken. How a batch is
split changes memory and time only: losses divide by counts of the whole minibatch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vrpo.types import Batch


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the cost of a pass depends on, one number a row."""

    prompts: np.ndarray
    """[B] tokens of the prompt."""
    lengths: np.ndarray
    """[B] tokens of prompt and response."""
    groups: np.ndarray
    """[B] rows of equal number share their prompt; all different where prompts are not shared."""

    @classmethod
    def of(cls, batch: Batch, *, share: bool) -> "Sizes":
        """Sizes of a batch's rows."""
        return cls(
            prompts=batch.prompt_lengths.cpu().numpy(),
            lengths=batch.attention_mask.sum(dim=1).cpu().numpy(),
            groups=batch.group_ids.cpu().numpy() if share else np.arange(len(batch)),
        )

    def read(self, pieces: Sequence[np.ndarray]) -> int:
        """Tokens that passes over the pieces read, padding included."""
        return sum(
            _cost(len(set(self.groups[piece])), len(piece), self._columns()[:, piece].max(axis=1))
            for piece in pieces
        )

    def _columns(self) -> np.ndarray:
        """[3, B] tokens of prompt, response, both."""
        return np.stack([self.prompts, self.lengths - self.prompts, self.lengths])


@dataclass(frozen=True, slots=True)
class Splitter:
    """Cuts batches into pieces, each with its row numbers and trimmed to its longest sequence."""

    rows: int
    """Sequences of a piece, at most."""
    tokens: int | None
    """Tokens a pass over a piece reads, padding included, at most; a longer sequence goes alone. None: no limit."""
    share: bool
    """Whether the models read a prompt once for all its responses."""

    def __call__(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Pieces of a batch of at least one sequence."""
        for piece in self.plan(Sizes.of(batch, share=self.share)):
            index = torch.from_numpy(piece).to(batch.input_ids.device)
            yield index, batch.select(index)

    def plan(self, sizes: Sizes) -> list[np.ndarray]:
        """Row numbers of each piece; every row is in exactly one."""
        by_length = np.lexsort((sizes.groups, sizes.lengths))
        if not self.share:
            return self._cut(by_length, sizes)
        longest = np.zeros(int(sizes.groups.max()) + 1, dtype=np.int64)
        np.maximum.at(longest, sizes.groups, sizes.lengths)
        by_prompt = np.lexsort((sizes.lengths, sizes.groups, longest[sizes.groups]))
        return min((self._cut(order, sizes) for order in (by_prompt, by_length)), key=sizes.read)

    def _cut(self, order: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
        """Consecutive pieces of `order`, each filled as far as the limits allow."""
        columns = sizes._columns()
        pieces: list[list[int]] = []
        groups: set[int] = set()
        widest = columns[:, order[0]]
        for row in order.tolist():
            groups, widest = groups | {int(sizes.groups[row])}, np.maximum(widest, columns[:, row])
            count = len(pieces[-1]) + 1 if pieces else self.rows + 1
            if count > self.rows or _cost(len(groups), count, widest) > (self.tokens or np.inf):
                pieces.append([])
                groups, widest = {int(sizes.groups[row])}, columns[:, row]
            pieces[-1].append(row)
        return [np.array(piece) for piece in pieces]


def _cost(prompts: int, rows: int, widest: np.ndarray) -> int:
    """Tokens of one pass; `widest` has those of the longest prompt, response and sequence."""
    prompt, response, both = widest.tolist()
    return int(rows * both if prompts == rows else prompts * prompt + rows * response)
