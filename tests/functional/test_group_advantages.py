"""GRPO's baseline: the mean of the group."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.errors import ConfigError
from vrpo.functional import group_advantages

GROUPS = torch.tensor([7, 3, 7, 3, 7, 7])  # ids in any order


def check_golden(f) -> None:
    # group 7: rewards 1, 0, 0, 1, mean .5, sample std sqrt(4 * .25 / 3) = .577350
    #   .5 / (.577350 + .0001) = .865876
    # group 3: rewards 1, 3, mean 2, sample std sqrt(2) = 1.414214: 1 / 1.414314 = .707057
    rewards = torch.tensor([1.0, 1.0, 0.0, 3.0, 0.0, 1.0])
    assert close(f(rewards, GROUPS, scale="none"), [0.5, -1, -0.5, 1, -0.5, 0.5])
    assert close(
        f(rewards, GROUPS, scale="std"),
        [0.865876, -0.707057, -0.865876, 0.707057, -0.865876, 0.865876],
        atol=2e-6,
    )


def test_golden():
    assert_catches(check_golden, group_advantages, "scaled shifted negated reversed")


def test_missing_rewards_take_no_part():
    # group 7 without its second sample: 1, 0, 1, mean 2/3
    valid = torch.tensor([True, False, False, False, True, True])
    rewards = torch.tensor([1.0, math.nan, math.nan, math.nan, 0.0, 1.0])
    assert close(
        group_advantages(rewards, GROUPS, scale="none", valid=valid), [1 / 3, 0, 0, 0, -2 / 3, 1 / 3]
    )


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1000.1])
def test_equal_rewards_give_exactly_zero(scale, reward):
    # three times 0.1 does not average to 0.1 in fp32: a scale of 1 / 1e-4 would make that rounding a signal
    for n in range(1, 40):
        out = group_advantages(torch.full((n,), reward), torch.zeros(n, dtype=torch.long), scale=scale)
        assert torch.equal(out, torch.zeros(n))


def test_a_group_of_one_gives_zero():
    out = group_advantages(torch.tensor([5.0, 1.0]), torch.tensor([0, 1]), scale="std")
    assert torch.equal(out, torch.zeros(2))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_order_of_samples_does_not_matter(seed):
    g = torch.Generator().manual_seed(seed)
    rewards, ids = torch.randn(12, generator=g), torch.randint(4, (12,), generator=g)
    valid = torch.rand(12, generator=g) < 0.8
    order = torch.randperm(12, generator=g)
    out = group_advantages(rewards, ids, scale="std", valid=valid)
    shuffled = group_advantages(rewards[order], ids[order], scale="std", valid=valid[order])
    assert close(shuffled, out[order])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_inverting_a_groups_verdicts_negates_its_advantages(seed):
    g = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(8, generator=g) < 0.5).float()
    ids = torch.zeros(8, dtype=torch.long)
    out = group_advantages(rewards, ids, scale="std")
    assert torch.equal(group_advantages(1 - rewards, ids, scale="std"), -out)


def test_with_group_centring_debiasing_is_a_change_of_scale():
    # (r - rho+) / J shifts and scales a whole group: centred, it is r / J
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    plain = group_advantages(rewards, GROUPS, scale="none")
    debiased = group_advantages((rewards - 0.2) / 0.5, GROUPS, scale="none")
    assert close(debiased, plain / 0.5)


def test_unknown_scale_is_refused():
    with pytest.raises(ConfigError, match="'mad'"):
        inspect.unwrap(group_advantages)(torch.zeros(6), GROUPS, scale="mad")
