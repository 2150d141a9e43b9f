"""Hand-made batches for tests of algorithms, the critic's objective and the update."""

from collections.abc import Sequence

import torch

from vrpo.types import Batch


def make_batch(
    lengths: Sequence[int] = (3, 2, 1, 3),
    *,
    prompt: int = 2,
    scores: Sequence[float] = (1.0, 0.0, 0.0, 1.0),
    groups: Sequence[int] = (0, 0, 1, 1),
    vocabulary: int = 30,
    seed: int = 0,
    **changes,
) -> Batch:
    """Responses of `lengths` tokens after a prompt of `prompt` tokens; ids and old log-probs are random."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(lengths), prompt + max(lengths)
    totals = torch.tensor(lengths) + prompt
    attention = torch.arange(length) < totals[:, None]
    columns = torch.arange(length - 1)
    mask = (columns >= prompt - 1) & (columns < totals[:, None] - 1)
    rewards = torch.zeros(rows, length - 1)
    rewards[torch.arange(rows), totals - 2] = torch.tensor(scores)
    input_ids = torch.randint(3, vocabulary, (rows, length), generator=generator) * attention
    for row, group in enumerate(groups):  # samples of a group answer one prompt
        input_ids[row, :prompt] = input_ids[list(groups).index(group), :prompt]
    batch = Batch(
        sample_ids=tuple(f"s1/p{g}/k{i}" for i, g in enumerate(groups)),
        group_ids=torch.tensor(groups),
        prompt_lengths=torch.full((rows,), prompt),
        input_ids=input_ids,
        attention_mask=attention,
        mask=mask,
        old_logp=-torch.rand(rows, length - 1, generator=generator) * mask,
        rewards=rewards,
        scores=torch.tensor(scores),
        clean_scores=torch.tensor(scores),
        valid=torch.ones(rows, dtype=torch.bool),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
    return batch.with_(**changes)
