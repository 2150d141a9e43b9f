"""The fast PPO arithmetic against the slow, obviously right one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import ppo_numpy as slow
from vrpo import functional as fast

SEEDS = st.integers(0, 1_000_000)
SIZES = st.integers(1, 6)
UNIT = st.floats(0.0, 1.0)
RANGE = st.floats(0.01, 1.0)  # not narrower than fp32 can tell a ratio from 1
FEW = settings(deadline=None, max_examples=25)


def draws(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers that fp32 holds exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def mask_of(seed: int, *shape: int) -> np.ndarray:
    """Random mask; whole rows of False occur."""
    return np.random.default_rng(seed + 1).random(shape) < 0.6


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    """fp32 and bool tensors of arrays."""
    return [torch.tensor(a) if a.dtype == bool else torch.tensor(a, dtype=torch.float32) for a in arrays]


def same(actual: torch.Tensor, expected, *, tol: float = 1e-5) -> bool:
    """Equal up to fp32 rounding."""
    return np.allclose(actual.numpy(), expected, rtol=tol, atol=tol, equal_nan=True)


@FEW
@given(
    seed=SEEDS,
    batch=SIZES,
    length=SIZES,
    discounts=st.tuples(UNIT, UNIT),
    per=st.sampled_from(["run", "row", "state"]),
)
def test_gae(seed, batch, length, discounts, per):
    gamma, lam = discounts
    r, v = draws(seed, 2, batch, length)
    boot, mask = draws(seed + 2, batch), mask_of(seed, batch, length)
    rows = lam * np.linspace(0.2, 1.0, batch)
    lams = {"run": lam, "row": rows, "state": rows[:, None] * np.linspace(1.0, 0.3, length)}[per]
    ours = fast.gae(
        *tensors(r, v, boot, mask),
        gamma=gamma,
        lam=lam if per == "run" else torch.tensor(lams, dtype=torch.float32),
    )
    exact = slow.gae(r, v, boot, mask, gamma=gamma, lam=lams)
    assert same(ours[0], exact[0])
    assert same(ours[1], exact[1])


@FEW
@given(seed=SEEDS, batch=st.integers(1, 12), scale=st.sampled_from(["std", "none"]), binary=st.booleans())
def test_group_advantages(seed, batch, scale, binary):
    rng = np.random.default_rng(seed)
    rewards = (rng.random(batch) < 0.5).astype(np.float64) if binary else draws(seed, batch)
    groups, valid = rng.integers(0, 3, batch), rng.random(batch) < 0.8
    ours = fast.group_advantages(
        *tensors(np.where(valid, rewards, np.nan)),
        torch.tensor(groups),
        scale=scale,
        valid=torch.tensor(valid),
    )
    assert same(ours, slow.group_advantages(rewards, groups, scale=scale, valid=valid))


@FEW
@given(
    seed=SEEDS,
    batch=SIZES,
    length=SIZES,
    clip=st.tuples(RANGE, RANGE),
    spread=st.just(0.0) | st.floats(0.05, 15.0),
)
def test_ppo_clip_loss(seed, batch, length, clip, spread):
    old, step, adv = draws(seed, 3, batch, length)
    logp, mask = (old + spread * step).astype(np.float32).astype(np.float64), mask_of(seed, batch, length)
    options = {"clip_low": clip[0], "clip_high": clip[1], "num_tokens": 17}
    ours = fast.ppo_clip_loss(*tensors(logp, old, adv, mask), **options)
    exact = slow.ppo_clip_loss(logp, old, adv, mask, **options)
    for field in ours._fields:
        assert same(getattr(ours, field), exact[field], tol=1e-4), field


@FEW
@given(seed=SEEDS, batch=SIZES, length=SIZES, clip=st.none() | st.floats(0.0, 2.0))
def test_value_mse_loss(seed, batch, length, clip):
    v, target, old = draws(seed, 3, batch, length)
    mask = mask_of(seed, batch, length)
    exact = slow.value_mse_loss(v, target, mask, num_tokens=11, old_values=old, clip=clip)
    v, target, old, mask = tensors(v, target, old, mask)
    ours = fast.value_mse_loss(
        v, target, mask, num_tokens=11, old_values=None if clip is None else old, clip=clip
    )
    assert same(ours, exact)


@FEW
@given(logp=st.floats(-50.0, 0.0, width=32), ref=st.floats(-50.0, 0.0, width=32))
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimate(kind, logp, ref):
    ours = fast.kl_estimate(torch.tensor(logp), torch.tensor(ref), kind=kind)
    assert same(ours, slow.kl_estimate(logp, ref, kind=kind))


@FEW
@given(seed=SEEDS, n=st.integers(1, 20), constant=st.booleans())
def test_explained_variance(seed, n, constant):
    targets, values = draws(seed, 2, n)
    targets = np.full(n, 0.1) if constant else targets
    ours = fast.explained_variance(*tensors(targets, values), torch.ones(n, dtype=torch.bool))
    assert same(ours, slow.explained_variance(targets, values), tol=1e-4)


@FEW
@given(seed=SEEDS, n=st.integers(1, 20))
def test_auc(seed, n):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, n).astype(np.float64), rng.random(n) < 0.5  # ties on purpose
    assert same(fast.auc(*tensors(scores, labels)), slow.auc(scores, labels))


@FEW
@given(
    seed=SEEDS,
    size=st.integers(1, 12),
    temperature=st.floats(0.3, 2.0),
    top_k=st.integers(0, 14),
    top_p=st.just(1.0) | st.floats(0.05, 0.99),
)
def test_sample_tokens(seed, size, temperature, top_k, top_p):
    logits, u = draws(seed, size), np.random.default_rng(seed).random()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours = fast.sample_tokens(
        torch.tensor(logits[None], dtype=torch.float32), torch.tensor([u], dtype=torch.float64), **options
    )
    token, logprob, policy_logprob = slow.sample_token(logits, u, **options)
    assert ours.token_ids.item() == token
    assert same(ours.logprobs, [logprob])
    assert same(ours.policy_logprobs, [policy_logprob])
