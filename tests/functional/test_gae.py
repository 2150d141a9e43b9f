"""Generalised advantage estimation, rewards on tokens, length-adaptive lambda."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.ppo_numpy import discounted_returns
from tests.functional.mutants import assert_catches, close
from vrpo.functional import gae, length_adaptive_lambda, token_rewards

SEEDS = st.integers(0, 10_000)
UNIT = st.floats(0.0, 1.0)


def episode(seed: int, *, batch: int = 3, length: int = 7) -> tuple[torch.Tensor, ...]:
    """Random rewards, values, bootstrap and a mask with holes."""
    g = torch.Generator().manual_seed(seed)
    r, v = torch.randn(2, batch, length, generator=g)
    return r, v, torch.randn(batch, generator=g), torch.rand(batch, length, generator=g) < 0.6


def check_golden(gae) -> None:
    # r = [0, 0, 1], v = [.5, .6, .8], ends with EOS, gamma = 1, lam = .5
    #   delta_2 = 1 + 0  - .8 = .2            A_2 = .2
    #   delta_1 = 0 + .8 - .6 = .2            A_1 = .2 + .5 * .2 = .3
    #   delta_0 = 0 + .6 - .5 = .1            A_0 = .1 + .5 * .3 = .25
    r, v = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    adv, target = gae(r, v, torch.zeros(1), mask, gamma=1.0, lam=0.5)
    assert close(adv, [[0.25, 0.3, 0.2]])
    assert close(target, [[0.75, 0.9, 1.0]])
    # cut, not ended: bootstrap 2, gamma = .9, lam = .5, and the middle token is the environment's
    #   delta_2 = 1 + .9 * 2  - .8 = 2.0      A_2 = 2.0
    #   delta_0 = 0 + .9 * .8 - .5 = .22      A_0 = .22 + .45 * 2.0 = 1.12
    mask = torch.tensor([[True, False, True]])
    adv, target = gae(r, v, torch.tensor([2.0]), mask, gamma=0.9, lam=0.5)
    assert close(adv, [[1.12, 0, 2.0]])
    assert close(target, [[1.62, 0, 2.8]])
    # a lambda for every state, .25 for the last one: A_0 = .22 + .9 * .25 * 2.0 = .67
    adv, _ = gae(r, v, torch.tensor([2.0]), mask, gamma=0.9, lam=torch.tensor([[7.0, 7.0, 0.25]]))
    assert close(adv, [[0.67, 0, 2.0]])


def test_golden():
    assert_catches(check_golden, gae, "scaled shifted negated reversed")


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, gamma=st.floats(0.5, 1.0))
def test_lambda_one_targets_are_monte_carlo_returns_whatever_the_critic_says(seed, gamma):
    r, v, boot, mask = episode(seed)
    expected = discounted_returns(r.numpy(), boot.numpy(), mask.numpy(), gamma=gamma)
    for values in (v, 100 * v, torch.zeros_like(v)):
        _, target = gae(r, values, boot, mask, gamma=gamma, lam=1.0)
        assert close(target, expected, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, gamma=st.floats(0.5, 1.0), lam=UNIT)
def test_true_values_give_zero_advantage(seed, gamma, lam):
    r, _, boot, mask = episode(seed)
    true = torch.tensor(
        discounted_returns(r.numpy(), boot.numpy(), mask.numpy(), gamma=gamma), dtype=torch.float32
    )
    adv, target = gae(r, true, boot, mask, gamma=gamma, lam=lam)
    assert close(adv, torch.zeros_like(adv), atol=1e-4)
    assert close(target, true, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, gamma=UNIT, lam=UNIT)
def test_multi_turn_equals_the_concatenated_assistant_tokens(seed, gamma, lam):
    r, v, boot, mask = episode(seed)
    adv, target = gae(r, v, boot, mask, gamma=gamma, lam=lam)
    for b in range(len(mask)):
        own = mask[b]
        joined = [x[b][own][None] for x in (r, v)]
        alone = gae(
            *joined, boot[b : b + 1], torch.ones_like(joined[0], dtype=torch.bool), gamma=gamma, lam=lam
        )
        assert close(adv[b][own], alone[0][0])
        assert close(target[b][own], alone[1][0])


def loop(rewards, values, bootstrap, mask, *, gamma, lam):
    """The definition, one column after the other, in fp64."""
    advantages = torch.zeros_like(values, dtype=torch.float64)
    value_next, advantage_next = bootstrap.double(), torch.zeros(len(mask), dtype=torch.float64)
    for t in reversed(range(mask.shape[1])):
        advantage = rewards[:, t] + gamma * value_next - values[:, t] + gamma * lam * advantage_next
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        value_next = torch.where(mask[:, t], values[:, t].double(), value_next)
        advantage_next = torch.where(mask[:, t], advantage, advantage_next)
    return advantages, torch.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 100, 1025])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (0.0, 1.0)])
def test_the_scan_equals_the_loop(length, gamma, lam):
    batch = episode(3, length=length)
    for ours, exact in zip(
        gae(*batch, gamma=gamma, lam=lam), loop(*batch, gamma=gamma, lam=lam), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, atol=2e-4 if lam * gamma == 1.0 else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_reward_one_for_ever_is_worth_one_over_one_minus_gamma(lam):
    gamma = 0.9
    r, mask = torch.ones(1, 6), torch.ones(1, 6, dtype=torch.bool)
    worth = 1 / (1 - gamma)
    adv, _ = gae(r, torch.full((1, 6), worth), torch.tensor([worth]), mask, gamma=gamma, lam=lam)
    assert close(adv, torch.zeros(1, 6), atol=1e-4)
    # and it is the only fixed point: regress on the targets, from a wrong start
    value = torch.zeros(1, 6)
    for _ in range(300):
        _, value = gae(r, value, value[:, 0], mask, gamma=gamma, lam=lam)
    assert close(value, torch.full((1, 6), worth), atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, lam=UNIT)
def test_masked_tokens_change_no_bit(seed, lam):
    r, v, boot, mask = episode(seed)
    clean = gae(r, v, boot, mask, gamma=0.9, lam=lam)
    junk = torch.tensor(math.nan)
    dirty = gae(torch.where(mask, r, junk), torch.where(mask, v, junk), boot, mask, gamma=0.9, lam=lam)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1], clean[1])
    assert torch.equal(clean[0][~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(clean[1][~mask], torch.zeros(int((~mask).sum())))


def test_a_row_that_does_not_count_is_zero_even_with_a_nan_bootstrap():
    adv, target = gae(
        torch.ones(1, 2),
        torch.ones(1, 2),
        torch.tensor([math.nan]),
        torch.zeros(1, 2, dtype=torch.bool),
        gamma=1.0,
        lam=1.0,
    )
    assert torch.equal(adv, torch.zeros(1, 2))
    assert torch.equal(target, torch.zeros(1, 2))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, shift=st.floats(-5.0, 5.0))
def test_shifting_every_value_shifts_nothing_else_when_undiscounted(seed, shift):
    r, v, boot, mask = episode(seed)
    adv, target = gae(r, v, boot, mask, gamma=1.0, lam=0.7)
    moved, moved_target = gae(r, v + shift, boot + shift, mask, gamma=1.0, lam=0.7)
    assert close(moved, adv, atol=1e-4)
    assert close(moved_target[mask], (target + shift)[mask], atol=1e-4)


def test_lambda_per_sequence_equals_one_call_per_sequence():
    r, v, boot, mask = episode(3)
    lams = torch.tensor([0.0, 0.5, 1.0])
    together = gae(r, v, boot, mask, gamma=0.9, lam=lams)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = gae(r[rows], v[rows], boot[rows], mask[rows], gamma=0.9, lam=float(lams[b]))
        assert torch.equal(together[0][rows], alone[0])
        assert torch.equal(together[1][rows], alone[1])


def test_half_precision_input_gives_fp32():
    r, v, boot, mask = (x.bfloat16() if x.is_floating_point() else x for x in episode(0))
    adv, target = gae(r, v, boot, mask, gamma=1.0, lam=0.95)
    assert adv.dtype == target.dtype == torch.float32


def test_golden_length_adaptive_lambda():
    # alpha = .05: l = 0, 10, 20 give at most 0 (1 - 1/.5 = -1; 1 - 1/1 = 0); 100: 1 - 1/5 = .8; 1000: .98
    def check(f) -> None:
        assert close(f(torch.tensor([0, 10, 20, 100, 1000]), alpha=0.05), [0, 0, 0, 0.8, 0.98])

    assert_catches(check, length_adaptive_lambda, "scaled shifted negated reversed")


def test_golden_token_rewards():
    def check(f) -> None:
        mask = torch.tensor(
            [[True, True, False], [False, True, True], [False, False, False], [True, False, False]]
        )
        scores = torch.tensor([0.5, -1.0, math.nan, 2.0])
        assert close(f(scores, mask), [[0, 0.5, 0], [0, 0, -1], [0, 0, 0], [2, 0, 0]])

    assert_catches(check, token_rewards, "scaled shifted negated reversed")
