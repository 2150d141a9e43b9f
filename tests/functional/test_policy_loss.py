"""PPO's clipped surrogate."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.errors import ConfigError
from vrpo.functional import PolicyLoss, ppo_clip_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def minibatch(seed: int) -> tuple[torch.Tensor, ...]:
    """logp, old_logp, advantages, mask of 4 sequences."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 6, generator=g) * 3
    logp = old + 0.4 * torch.randn(4, 6, generator=g)
    return logp, old, torch.randn(4, 6, generator=g), torch.rand(4, 6, generator=g) < 0.7


def check_golden(f) -> None:
    # rho   = 1.5   1.5   0.5   0.5   1.0   (last token masked)
    # A     =  2    -2     2    -2     3
    # min(rho A, clip(rho) A): 1.28*2 = 2.56; 1.5*-2 = -3; 0.5*2 = 1; 0.8*-2 = -1.6; 3   -> sum 1.96
    # the clip removes the gradient of token 0 (A > 0, high) and token 3 (A < 0, low) only
    logp = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0, math.nan]]).log()
    adv = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0, math.nan]])
    mask = torch.tensor([[True] * 5 + [False]])
    out = f(logp, torch.zeros(1, 6), adv, mask, **CLIP, num_tokens=10)
    assert close(out.loss, -0.196)
    assert close(out.clip_high_count, 1.0)
    assert close(out.clip_low_count, 1.0)
    # k3 = rho - 1 - log rho: 2 * (.5 - .405465) + 2 * (-.5 + .693147) + 0 = .575364
    assert close(out.approx_kl_sum, 0.575364)
    assert close(out.ratio_sum, 5.0)
    # 2 * 2.25 + 2 * .25 + 1
    assert close(out.ratio_sq_sum, 6.0)


def test_golden():
    assert_catches(check_golden, ppo_clip_loss, "scaled shifted negated")


def test_counts_and_gradient_agree():
    """A token is counted exactly when its gradient is 0 although its advantage is not."""
    logp, old, adv, mask = minibatch(1)
    logp.requires_grad_()
    out = ppo_clip_loss(logp, old, adv, mask, **CLIP, num_tokens=24)
    out.loss.backward()
    dead = mask & (logp.grad == 0)
    assert int(out.clip_low_count) == int((dead & (adv < 0)).sum()) > 0
    assert int(out.clip_high_count) == int((dead & (adv > 0)).sum()) > 0


def test_before_any_update_the_gradient_is_the_policy_gradient():
    _, old, adv, mask = minibatch(2)
    logp = old.clone().requires_grad_()
    out = ppo_clip_loss(logp, old, adv, mask, **CLIP, num_tokens=7)
    out.loss.backward()
    assert close(logp.grad, torch.where(mask, -adv / 7, 0.0))
    assert out.approx_kl_sum == 0
    assert out.ratio_sum == mask.sum()


@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
def test_micro_batch_splits_give_the_same_gradient_and_sums(sizes):
    logp, old, adv, mask = minibatch(3)
    whole = logp.clone().requires_grad_()
    expected = ppo_clip_loss(whole, old, adv, mask, **CLIP, num_tokens=int(mask.sum()))
    expected.loss.backward()
    split = logp.clone().requires_grad_()
    parts = []
    for rows in torch.arange(4).split(sizes):
        parts.append(
            ppo_clip_loss(split[rows], old[rows], adv[rows], mask[rows], **CLIP, num_tokens=int(mask.sum()))
        )
        parts[-1].loss.backward()
    assert torch.equal(split.grad, whole.grad)
    for field in PolicyLoss._fields:
        assert close(
            sum(getattr(part, field).detach() for part in parts), getattr(expected, field).detach(), atol=1e-5
        )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_masked_tokens_change_no_bit(seed):
    logp, old, adv, mask = minibatch(seed)
    clean_logp = logp.clone().requires_grad_()
    clean = ppo_clip_loss(clean_logp, old, adv, mask, **CLIP, num_tokens=9)
    clean.loss.backward()
    junk = torch.tensor(math.nan)
    dirty_logp = torch.where(mask, logp, junk).requires_grad_()
    dirty = ppo_clip_loss(
        dirty_logp, torch.where(mask, old, junk), torch.where(mask, adv, junk), mask, **CLIP, num_tokens=9
    )
    dirty.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(dirty_logp.grad, clean_logp.grad)
    assert torch.equal(dirty_logp.grad[~mask], torch.zeros(int((~mask).sum())))


def test_a_forbidden_token_gives_a_finite_loss():
    logp = torch.tensor([[0.0, -300.0]], requires_grad=True)
    out = ppo_clip_loss(
        logp,
        torch.tensor([[-300.0, 0.0]]),
        torch.tensor([[-1.0, -1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        **CLIP,
        num_tokens=2,
    )
    out.loss.backward()
    # rho clamped to e^20 and e^-20, the latter clipped to .8: (e^20 + .8) / 2
    assert out.loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-6)
    assert torch.equal(logp.grad, torch.zeros(1, 2))


def test_only_the_loss_carries_gradient_and_only_to_logp():
    logp, old, adv, mask = minibatch(4)
    inputs = [x.requires_grad_() for x in (logp, old, adv)]
    out = ppo_clip_loss(*inputs, mask, **CLIP, num_tokens=3)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    out.loss.backward()
    assert old.grad is None
    assert adv.grad is None


def test_an_empty_step_has_loss_zero():
    out = ppo_clip_loss(*minibatch(5)[:3], torch.zeros(4, 6, dtype=torch.bool), **CLIP, num_tokens=0)
    assert all(x == 0 for x in out)


def test_advantages_of_responses_are_not_read_as_those_of_columns():
    """As many responses as columns: a product of [B, T] and [B] would be a number without a word."""
    unchecked = inspect.unwrap(ppo_clip_loss)  # below the type checks of these tests, where a user is
    logp, mask = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"advantages \[4\].*expand_as"):
        unchecked(logp, logp, torch.ones(4), mask, clip_low=0.2, clip_high=0.2, num_tokens=16)
