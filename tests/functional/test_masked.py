"""Reductions over the positions that count."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.functional import masked_mean, masked_sum, masked_var, masked_whiten

X = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 8.0, math.nan]])
MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_golden_sum_mean_var():
    # counted: 1, 3, 8.  sum 12, mean 4, var ((-3)^2 + (-1)^2 + 4^2) / 3 = 26/3
    assert_catches(lambda f: _assert(close(f(X, MASK), 12.0)), masked_sum, "scaled shifted negated")
    assert_catches(lambda f: _assert(close(f(X, MASK), 4.0)), masked_mean, "scaled shifted negated")
    assert_catches(
        lambda f: _assert(close(f(X, MASK), 26 / 3, atol=1e-5)), masked_var, "scaled shifted negated"
    )


def _assert(condition: bool) -> None:
    assert condition


def check_whiten(whiten) -> None:
    # counted: 1, 3, 8; mean 4, std sqrt(26/3) = 2.943920: (-3, -1, 4) / std = -1.019049, -0.339683, 1.358732
    centred = [[-1.019049, 0, -0.339683], [0, 1.358732, 0]]
    kept = [[2.980951, 0, 3.660317], [0, 5.358732, 0]]
    assert close(whiten(X, MASK, center=True), centred)
    assert close(whiten(X, MASK, center=False), kept, atol=2e-6)


def test_golden_whiten():
    assert_catches(check_whiten, masked_whiten, "scaled shifted negated reversed")


def test_nothing_counts_is_zero_not_nan():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(X, nothing) == 0
    assert masked_mean(X, nothing) == 0
    assert masked_var(X, nothing) == 0
    assert torch.equal(masked_whiten(X, nothing, center=True), torch.zeros(2, 3))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 100.0), shift=st.floats(-50.0, 50.0))
def test_whitening_forgets_scale_and_shift(seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(4, 5, generator=g), torch.rand(4, 5, generator=g) < 0.7
    mask[0, :2] = True
    white = masked_whiten(x, mask, center=True)
    assert abs(masked_mean(white, mask)) < 1e-5
    assert abs(masked_var(white, mask) - 1) < 1e-3
    assert torch.allclose(masked_whiten(x * scale + shift, mask, center=True), white, atol=2e-3)


def test_whitening_a_constant_makes_no_signal():
    # 1000.1 is not a binary fraction: for most n an fp32 mean of it is off, and 1 / sqrt(1e-8) shows that
    for n in range(1, 200):
        white = masked_whiten(torch.full((n,), 1000.1), torch.ones(n, dtype=torch.bool), center=True)
        assert torch.equal(white, torch.zeros(n))


def test_masked_positions_take_no_gradient():
    x = X.clone().requires_grad_()
    (masked_sum(x, MASK) + masked_mean(x, MASK) + masked_var(x, MASK)).backward()
    assert torch.equal(x.grad[~MASK], torch.zeros(3))
    assert bool(x.grad[MASK].isfinite().all())


def test_half_precision_input_gives_fp32():
    ones = torch.ones(4096, dtype=torch.bfloat16)
    total = masked_sum(ones, ones.bool())
    assert total.dtype == torch.float32
    assert total == 4096
