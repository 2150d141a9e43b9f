"""How a batch is split into forward-backward passes, so that each prompt is read as seldom as can be.

A pass over some rows reads the prompts among them, each once, and their responses. How a batch is split changes
memory and time only: losses divide by counts of the whole minibatch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vrpo.types import Batch

SHARE_FROM = defaultdict(lambda: 2.0, cpu=1.0)
"""By device: prompts are shared where reading them with every response would be at least this many times the tokens. On a
GPU more and smaller kernels make a token twice as dear (.49 as many a second in benchmarks/results/gpu_h200.json)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a pass reads, one number a row."""

    prompts: np.ndarray
    """[B] tokens of the prompt."""
    responses: np.ndarray
    """[B] tokens of the response."""
    groups: np.ndarray
    """[B] rows of equal number share their prompt; all different where prompts are not shared."""

    @classmethod
    def of(cls, batch: Batch, *, share: bool) -> "Sizes":
        """Sizes of a batch's rows."""
        prompts = batch.prompt_lengths.cpu().numpy()
        return cls(
            prompts=prompts,
            responses=batch.attention_mask.sum(dim=1).cpu().numpy() - prompts,
            groups=batch.group_ids.cpu().numpy() if share else np.arange(len(batch)),
        )

    def read(self, rows: Sequence[int]) -> int:
        """Tokens that a pass over these rows reads, padding left out."""
        prompts = {int(self.groups[row]): int(self.prompts[row]) for row in rows}
        return sum(prompts.values()) + sum(int(self.responses[row]) for row in rows)

    @property
    def columns(self) -> int:
        """Of a pass that shares prompts: the longest prompt's and the longest response's."""
        return int(self.prompts.max() + self.responses.max())

    @property
    def saved(self) -> float:
        """Tokens with every row read whole, over those with shared prompts; 1 where none is shared."""
        return float(self.prompts.sum() + self.responses.sum()) / self.read(range(len(self.prompts)))


@dataclass(frozen=True, slots=True)
class Splitter:
    """Cuts batches into pieces, each with its row numbers and trimmed to its longest sequence."""

    rows: int
    """Sequences of a piece, at most."""
    tokens: int | None
    """Tokens a pass over a piece reads, at most; a longer sequence goes alone. None: no limit."""
    shared_limit: int
    """Most columns for which the models can read a prompt once for all its responses; 0: they never do."""
    whole_prompts: bool = False
    """Responses to a prompt, if no more than `rows`, stay in one piece: for a loss that compares siblings."""

    def __call__(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Pieces of a batch of at least one sequence."""
        sizes = Sizes.of(batch, share=True)
        share = sizes.columns <= self.shared_limit and sizes.saved >= SHARE_FROM[batch.input_ids.device.type]
        sizes = sizes if share else Sizes.of(batch, share=False)
        blocks = batch.group_ids.cpu().numpy() if self.whole_prompts else None
        for piece in self.plan(sizes, blocks=blocks):
            index = torch.tensor(piece, device=batch.input_ids.device)
            yield index, batch.select(index).with_(share_prompts=share)

    def plan(self, sizes: Sizes, *, blocks: np.ndarray | None = None) -> list[list[int]]:
        """Row numbers of each piece; every row is in exactly one.

        Samples of a prompt stand together, prompts of similar length too: they are padded to the longest of a piece.

        Args:
            sizes: of the rows.
            blocks: [B] rows of equal number go into one piece, however many tokens they are, unless they are more than `rows`. None:
                every row for itself.
        """
        order = np.lexsort((sizes.groups if blocks is None else blocks, sizes.prompts))
        starts = np.arange(1, len(order)) if blocks is None else np.flatnonzero(np.diff(blocks[order])) + 1
        pieces: list[list[int]] = []
        for block in np.split(order, starts):
            whole = block.tolist()
            for rows in [whole] if len(whole) <= self.rows else [[row] for row in whole]:
                if not pieces or not self._fits([*pieces[-1], *rows], sizes):
                    pieces.append([])
                pieces[-1].extend(rows)
        return pieces

    def _fits(self, rows: list[int], sizes: Sizes) -> bool:
        """Whether one piece may hold these."""
        return len(rows) <= self.rows and (self.tokens is None or sizes.read(rows) <= self.tokens)
