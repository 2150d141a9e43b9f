"""Collation: the worked example of `Batch`, missing rewards, truncation, padding and selection."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vrpo.rollout import collate
from vrpo.types import Prompt, Rollout, ScoredRollout

F, T = False, True
PROMPT = Prompt(prompt_id="train/0", prompt="?", token_ids=np.array([9, 4]), columns={})


def scored(sample_id, token_ids, action_mask, logprobs, *, reward, clean=1.0, stop="eos"):
    rollout = Rollout(
        sample_id=sample_id,
        prompt=PROMPT,
        token_ids=np.array(token_ids),
        action_mask=np.array(action_mask, dtype=bool),
        logprobs=np.array(logprobs, dtype=np.float32) - 5,  # the truncated distribution's: must not be used
        policy_logprobs=np.array(logprobs, dtype=np.float32),
        completion="",
        stop=stop,
        policy_version=0,
    )
    return ScoredRollout(rollout=rollout, parts={}, clean_reward=clean, reward=reward)


ONE = scored("s1/p0/k0", [9, 4, 8, 2], [F, F, T, T], [0, 0, -0.7, -0.2], reward=1.0)
CUT = scored("s1/p0/k1", [9, 4, 7], [F, F, T], [0, 0, -0.5], reward=0.5, clean=0.0, stop="length")
MISSING = scored("s1/p1/k0", [9, 6, 2], [F, F, T], [0, 0, -0.1], reward=None, clean=None)
TURNS = scored("s1/p1/k1", [9, 8, 5, 5, 8, 2], [F, T, F, F, T, T], [0, -0.3, 0, 0, -0.4, -0.6], reward=-2.0)
ALL = [ONE, CUT, MISSING, TURNS]


def check_worked_example(collate):
    # prompt [9, 4], response [8, 2], reward 1: column t describes token t + 1
    batch = collate([ONE], pad_id=0, truncation="terminal")
    assert batch.input_ids.tolist() == [[9, 4, 8, 2]]
    assert batch.mask.tolist() == [[F, T, T]]
    assert batch.rewards.tolist() == [[0, 0, 1]]
    torch.testing.assert_close(batch.old_logp, torch.tensor([[0, -0.7, -0.2]]))


def test_the_worked_example():
    check_worked_example(collate)


MUTANTS = {
    "mask late": lambda b: b.with_(mask=b.mask.roll(1, dims=1)),
    "reward early": lambda b: b.with_(rewards=b.rewards.roll(-1, dims=1)),
    "reward everywhere": lambda b: b.with_(rewards=torch.ones_like(b.rewards)),
    "logp late": lambda b: b.with_(old_logp=b.old_logp.roll(1, dims=1)),
    "truncated logp": lambda b: b.with_(old_logp=b.old_logp - 5),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_example_can_fail(name):
    with pytest.raises(AssertionError):
        check_worked_example(lambda *a, **k: MUTANTS[name](collate(*a, **k)))


def test_a_mixed_batch_by_hand():
    batch = collate(ALL, pad_id=99, truncation="terminal")
    assert batch.sample_ids == ("s1/p0/k0", "s1/p0/k1", "s1/p1/k0", "s1/p1/k1")
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.input_ids.tolist() == [
        [9, 4, 8, 2, 99, 99],
        [9, 4, 7, 99, 99, 99],
        [9, 6, 2, 99, 99, 99],
        [9, 8, 5, 5, 8, 2],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [4, 3, 3, 6]
    assert batch.mask.tolist() == [
        [F, T, T, F, F],
        [F, T, F, F, F],
        [F, F, F, F, F],  # no reward: nothing counts
        [T, F, F, T, T],
    ]
    assert batch.rewards.tolist() == [[0, 0, 1, 0, 0], [0, 0.5, 0, 0, 0], [0] * 5, [0, 0, 0, 0, -2]]
    assert batch.scores.tolist() == [1, 0.5, 0, -2]
    assert batch.clean_scores[[0, 1, 3]].tolist() == [1, 0, 1]
    assert math.isnan(batch.clean_scores[2])
    assert batch.valid.tolist() == [T, T, F, T]
    assert batch.truncated.tolist() == [F, T, F, F]
    assert batch.num_tokens == 6


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_a_cut_response_counts_unless_it_is_masked(truncation):
    assert collate(ALL, pad_id=0, truncation=truncation).mask[1].tolist() == [F, T, F, F, F]
    masked = collate(ALL, pad_id=0, truncation="mask")
    assert not masked.mask[1].any()
    assert masked.valid[1]
    assert masked.mask[[0, 3]].tolist() == collate(ALL, pad_id=0, truncation=truncation).mask[[0, 3]].tolist()


def test_a_missing_reward_is_not_a_zero_reward():
    zero = scored("s1/p1/k0", [9, 6, 2], [F, F, T], [0, 0, -0.1], reward=0.0)
    assert collate([zero], pad_id=0, truncation="terminal").num_tokens == 1
    assert collate([MISSING], pad_id=0, truncation="terminal").num_tokens == 0


def test_select_trims_to_the_longest_and_keeps_rows_together():
    batch = collate(ALL, pad_id=0, truncation="terminal")
    part = batch.select(torch.tensor([2, 0]))
    assert part.sample_ids == ("s1/p1/k0", "s1/p0/k0")
    assert part.input_ids.tolist() == [[9, 6, 2, 0], [9, 4, 8, 2]]
    assert part.mask.tolist() == [[F, F, F], [F, T, T]]
    assert part.rewards.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert part.scores.tolist() == [0, 1]
    alone = collate([MISSING, ONE], pad_id=0, truncation="terminal")
    assert torch.equal(part.old_logp, alone.old_logp)
    assert torch.equal(part.attention_mask, alone.attention_mask)


def test_a_response_without_a_token_is_a_bug_and_says_whose():
    nothing = scored("s1/p2/k0", [9, 4], [F, F], [0, 0], reward=1.0)
    with pytest.raises(AssertionError, match="s1/p2/k0 has no chosen token"):
        collate([nothing], pad_id=0, truncation="terminal")
    first = scored("s1/p2/k0", [9, 4], [T, T], [0, 0], reward=1.0)
    with pytest.raises(AssertionError, match="no state comes before"):
        collate([first], pad_id=0, truncation="terminal")


def test_a_state_stands_at_the_token_before_the_one_it_chose():
    def with_states(one, *states):
        return replace(one, rollout=replace(one.rollout, states=np.array(states, dtype=np.float32)))

    turns = with_states(TURNS, [1, 2], [3, 4], [5, 6])  # chose tokens 1, 4 and 5
    batch = collate([turns, with_states(CUT, [7, 8])], pad_id=0, truncation="terminal")
    assert batch.trunk_states[0].tolist() == [[1, 2], [0, 0], [0, 0], [3, 4], [5, 6], [0, 0]]
    assert batch.trunk_states[1].tolist() == [[0, 0], [7, 8], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert collate([turns, CUT], pad_id=0, truncation="terminal").trunk_states is None
