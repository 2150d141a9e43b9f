"""The critic's regression loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.errors import ConfigError
from vrpo.functional import (
    RewardUnits,
    read_values,
    reward_units,
    typical_rewards,
    value_cross_entropy,
    value_mse_loss,
)


def minibatch(seed: int) -> tuple[torch.Tensor, ...]:
    """values, targets, old_values, mask of 4 sequences."""
    g = torch.Generator().manual_seed(seed)
    v, target, old = torch.randn(3, 4, 5, generator=g)
    return v, target, old, torch.rand(4, 5, generator=g) < 0.7


def check_golden(f) -> None:
    v, target = torch.tensor([[1.0, 0.5, math.nan]]), torch.tensor([[0.0, 1.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    # 1/2 (1 + .25) / 4 = .15625
    assert close(f(v, target, mask, num_tokens=4), 0.15625)
    # old = .2, .9; clip .1: c = .3, .8; errors max(1, .09) = 1, max(.25, .04) = .25: the same
    old = torch.tensor([[0.2, 0.9, math.nan]])
    assert close(f(v, target, mask, num_tokens=4, old_values=old, clip=0.1), 0.15625)
    # v overshoots to the target: v = R = (0, 1), c = (.1, 1): max(0, .01) + 0, half of it / 4 = .00125
    assert close(f(target, target, mask, num_tokens=4, old_values=old, clip=0.1), 0.00125)


def test_golden():
    assert_catches(check_golden, value_mse_loss, "scaled shifted negated")


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
def test_micro_batch_splits_give_the_same_gradient(sizes, clip):
    v, target, old, mask = minibatch(0)
    whole, split = v.clone().requires_grad_(), v.clone().requires_grad_()

    def loss(values, rows):
        clipping = {} if clip is None else {"old_values": old[rows], "clip": clip}
        return value_mse_loss(values[rows], target[rows], mask[rows], num_tokens=int(mask.sum()), **clipping)

    loss(whole, torch.arange(4)).backward()
    for rows in torch.arange(4).split(sizes):
        loss(split, rows).backward()
    assert torch.equal(split.grad, whole.grad)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_masked_tokens_change_no_bit(seed):
    v, target, old, mask = minibatch(seed)
    junk = torch.tensor(math.nan)
    clean, dirty = v.clone().requires_grad_(), torch.where(mask, v, junk).requires_grad_()
    a = value_mse_loss(clean, target, mask, num_tokens=6, old_values=old, clip=0.3)
    b = value_mse_loss(
        dirty,
        torch.where(mask, target, junk),
        mask,
        num_tokens=6,
        old_values=torch.where(mask, old, junk),
        clip=0.3,
    )
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert torch.equal(clean.grad, dirty.grad)


def test_a_wide_clip_is_no_clip():
    v, target, old, mask = minibatch(1)
    plain = value_mse_loss(v, target, mask, num_tokens=3)
    assert close(value_mse_loss(v, target, mask, num_tokens=3, old_values=old, clip=100.0), plain)


def test_clip_and_old_values_come_together():
    v, target, old, mask = minibatch(2)
    with pytest.raises(ConfigError, match=r"clip=0\.2"):
        value_mse_loss(v, target, mask, num_tokens=3, clip=0.2)
    with pytest.raises(ConfigError, match="clip=None"):
        value_mse_loss(v, target, mask, num_tokens=3, old_values=old)


def test_targets_and_old_values_are_data():
    v, target, old, mask = (x.requires_grad_() if x.is_floating_point() else x for x in minibatch(3))
    value_mse_loss(v, target, mask, num_tokens=3, old_values=old, clip=0.2).backward()
    assert v.grad is not None
    assert target.grad is None
    assert old.grad is None


def test_bce_is_the_cross_entropy_of_a_probability():
    raw, target = torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 0.25])
    p = 1 / (1 + math.exp(-2.0))
    expected = torch.tensor([math.log(2.0), -0.25 * math.log(p) - 0.75 * math.log(1 - p)])
    torch.testing.assert_close(value_cross_entropy(raw, target, "bce"), expected)
    torch.testing.assert_close(read_values(raw, "bce"), torch.tensor([0.5, p]))


@pytest.mark.parametrize("target", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_hl_gauss_is_smallest_where_the_value_is_the_target(target):
    """The target's own shares as probabilities: their mean is the target but for the cut tails, and the loss is their entropy."""
    raw = torch.zeros(1, 51, requires_grad=True)
    value_cross_entropy(raw, torch.tensor([target]), "hl_gauss").sum().backward()
    shares = (1 / 51 - raw.grad[0]).clamp(min=1e-12)  # the gradient of a cross-entropy is p - shares
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    at_best = shares.log()[None]
    assert float(read_values(at_best, "hl_gauss")) == pytest.approx(target, abs=1e-3)
    other = value_cross_entropy(torch.zeros(1, 51), torch.tensor([target]), "hl_gauss")
    assert float(value_cross_entropy(at_best, torch.tensor([target]), "hl_gauss")) < float(other)


@pytest.mark.parametrize(("kind", "targets"), [("bce", (0.0, 1.0)), ("hl_gauss", (0.0, 1.0))])
def test_the_optimum_of_a_cross_entropy_is_the_mean_return(kind, targets):
    returns = torch.tensor([targets[1]] * 7 + [targets[0]] * 3)
    raw = torch.zeros(1, 51 if kind == "hl_gauss" else 1, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        value_cross_entropy(raw.expand(10, -1), returns, kind).mean().backward()
        optimizer.step()
    assert float(read_values(raw.detach(), kind)) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(("kind", "target"), [("bce", 1.2), ("bce", -0.1), ("hl_gauss", 1.5)])
def test_returns_that_do_not_fit_are_refused(kind, target):
    raw = torch.zeros(1, 51 if kind == "hl_gauss" else 1)
    with pytest.raises(ConfigError, match=rf"critic.regression={kind} got the return {target:g}"):
        value_cross_entropy(raw, torch.tensor([target]), kind)


@pytest.mark.parametrize(
    ("rewards", "units"),
    [
        ([], None),
        ([50.0, 50.0], None),
        ([0.0, 0.0], None),
        ([0.0, 1.0, 0.0, 0.0], RewardUnits(0.0, 1.0)),
        ([-1.0, 1.0, 1.0], RewardUnits(0.0, 1.0)),
        ([0.0, 100.0, 50.0, 50.0], RewardUnits(50.0, 50.0)),
        ([-4.0, 5.0, 2.0], RewardUnits(1.0, 5.0)),
        ([1000.0, 1001.0], RewardUnits(1000.5, 0.5)),
        ([0.0, 0.002], RewardUnits(0.0, 1.0)),  # a small penalty, where nothing is right yet
        ([0.0, 0.0, 0.0, 80.0], RewardUnits(20.0, 60.0)),
    ],
)
def test_units_bring_rewards_within_one(rewards, units):
    found = reward_units(torch.tensor(rewards))
    assert found == (None if units is None else pytest.approx(units))


@pytest.mark.parametrize("outlier", [100.0, -1e6])
def test_an_outlier_sets_no_scale(outlier):
    verdicts = torch.tensor([0.0, 1.0] * 32)
    with_one = torch.cat([verdicts, torch.tensor([outlier])])
    assert torch.equal(typical_rewards(with_one), verdicts)
    assert reward_units(with_one) == (0.0, 1.0)
    # what is rare is none: of equal rewards one that differs, few right ones, the tails of a normal distribution
    g = torch.Generator().manual_seed(0)
    for rewards in (
        torch.tensor([0.0] * 63 + [1.0]),
        torch.tensor([0.0] * 252 + [100.0] * 4),
        torch.randn(5000, generator=g),
    ):
        assert torch.equal(typical_rewards(rewards), rewards)


def test_one_success_in_thousands_does_not_set_the_scale_of_all():
    rewards = torch.zeros(512)
    rewards[7] = 100.0
    units = reward_units(rewards)
    assert units is not None
    assert units.scale > 99.0


@pytest.mark.parametrize(
    ("now", "far"),
    [((0.0, 1.0), False), ((1.0, 3.0), False), ((0.0, 5.0), True), ((0.0, 0.2), True), ((9.0, 1.0), True)],
)
def test_units_are_far_off_by_scale_or_by_offset(now, far):
    assert RewardUnits(*now).far_from(RewardUnits()) == far
    assert RewardUnits().far_from(RewardUnits(*now)) == far
