"""Scored rollouts to one padded `Batch`.

token_ids        9   4   8   2   pad          column t of a [B, T] field describes token t + 1
action_mask      F   F   T   T
mask                 F   T   T   F
old_logp             0  -.7 -.2  0
rewards              0   0   1   0
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from vrpo.functional import token_rewards
from vrpo.types import Batch, Rollout, ScoredRollout


def collate(
    scored: Sequence[ScoredRollout], *, pad_id: int, truncation: Literal["terminal", "bootstrap", "mask"]
) -> Batch:
    """Pad on the right, shift per-token numbers to columns, put each reward on the last chosen token. On the CPU.

    A sample without a reward has mask False everywhere, and so has a response cut at the length limit when
    `truncation` is "mask"; both stay in the batch, so that they are counted.

    Args:
        scored: at least one; every response has at least one token.
        pad_id: what fills `input_ids`; nothing reads it.
        truncation: the algorithm's rule for `stop == "length"`.
    """
    assert scored, "a batch needs at least one rollout"
    rollouts = [one.rollout for one in scored]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    shape = (len(scored), max(lengths))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    actions = np.zeros(shape, dtype=bool)
    old_logp = np.zeros(shape, dtype=np.float32)
    for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
        assert rollout.action_mask.any(), (
            f"rollout {rollout.sample_id} has no chosen token; even an empty reply has EOS"
        )
        input_ids[row, :length] = rollout.token_ids
        actions[row, :length] = rollout.action_mask
        old_logp[row, :length] = rollout.policy_logprobs
    assert not actions[:, 0].any(), "the first token of a sequence cannot be chosen: no state comes before it"
    valid = torch.tensor([one.reward is not None for one in scored])
    truncated = torch.tensor([rollout.stop == "length" for rollout in rollouts])
    scores = torch.tensor([0.0 if one.reward is None else one.reward for one in scored], dtype=torch.float32)
    action_mask = torch.from_numpy(actions)[:, 1:]
    counted = valid & ~truncated if truncation == "mask" else valid
    return Batch(
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        group_ids=_group_ids([rollout.sample_id for rollout in rollouts]),
        prompt_lengths=torch.from_numpy(actions.argmax(axis=1)),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        mask=action_mask & counted[:, None],
        old_logp=torch.from_numpy(old_logp)[:, 1:],
        rewards=token_rewards(scores, action_mask),
        scores=scores,
        clean_scores=torch.tensor(
            [np.nan if one.clean_reward is None else one.clean_reward for one in scored], dtype=torch.float32
        ),
        valid=valid,
        truncated=truncated,
        trunk_states=_trunk_states(rollouts, shape[1]),
    )


def _trunk_states(rollouts: Sequence[Rollout], length: int) -> torch.Tensor | None:
    """[B, L, d] The states that chose the tokens, each in the column of the token before it; None unless all rollouts have them."""
    if any(rollout.states is None for rollout in rollouts):
        return None
    found: list[np.ndarray] = [rollout.states for rollout in rollouts if rollout.states is not None]
    states = np.zeros((len(rollouts), length, found[0].shape[1]), dtype=np.float32)
    for row, rollout, chose in zip(states, rollouts, found, strict=True):
        row[np.flatnonzero(rollout.action_mask) - 1] = chose
    return torch.from_numpy(states)


def _group_ids(sample_ids: Sequence[str]) -> torch.Tensor:
    """Number of each sample's "s<step>/p<prompt>" part, in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name.rpartition("/")[0], len(numbers)) for name in sample_ids])
