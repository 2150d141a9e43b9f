"""Noise on rewards, its inverse, and what a critic learns from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.errors import ConfigError, RewardError
from vrpo.functional import (
    debias_rewards,
    flip_rewards,
    length_bias,
    value_mse_loss,
    zscore,
)

RATE = st.floats(0.0, 0.45)


def spread(n: int, seed: int) -> torch.Tensor:
    """The n uniforms (i + 1/2) / n in random order: their frequencies are right to 1 / n."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) + 0.5) / n


def flipped(p: float, false_positive: float, false_negative: float, n: int = 4000) -> torch.Tensor:
    """n seen rewards of a task solved with probability p."""
    clean = (torch.arange(n) < round(p * n)).float()
    return flip_rewards(
        clean,
        false_positive=false_positive,
        false_negative=false_negative,
        uniforms=spread(n, seed=int(1e4 * p)),
    )


def check_flip(f) -> None:
    # r = 0: flipped when u < .2; r = 1: flipped when u < .4
    clean = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    u = torch.tensor([0.1, 0.3, 0.5, 0.5, 0.3, 0.1])
    assert close(f(clean, false_positive=0.2, false_negative=0.4, uniforms=u), [1, 0, 0, 1, 0, 0])
    assert clean.tolist() == [0, 0, 0, 1, 1, 1]


def test_golden_flip():
    assert_catches(check_flip, flip_rewards, "scaled shifted negated reversed")


def test_rates_zero_and_one():
    clean, u = torch.tensor([0.0, 1.0]), torch.zeros(2)
    assert torch.equal(flip_rewards(clean, false_positive=0.0, false_negative=0.0, uniforms=u), clean)
    assert torch.equal(
        flip_rewards(clean, false_positive=1.0, false_negative=1.0, uniforms=u + 0.999), 1 - clean
    )


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan")])
def test_rewards_that_are_not_verdicts_are_refused_by_value(value):
    with pytest.raises(RewardError, match=f"reward {value:g}"):
        flip_rewards(
            torch.tensor([0.0, value]), false_positive=0.1, false_negative=0.1, uniforms=torch.ones(2)
        )


def check_debias(f) -> None:
    # J = 1 - .2 - .3 = .5: (0 - .2) / .5 = -.4, (1 - .2) / .5 = 1.6
    assert close(f(torch.tensor([0.0, 1.0]), false_positive=0.2, false_negative=0.3), [-0.4, 1.6])


def test_golden_debias():
    assert_catches(check_debias, debias_rewards, "scaled shifted negated reversed")


@settings(deadline=None, max_examples=25)
@given(fp=RATE, fn=RATE)
def test_debiasing_is_unbiased_for_each_clean_reward(fp, fn):
    """E over the two outcomes of a flip, exactly: rates as weights, no sampling."""
    seen = debias_rewards(torch.tensor([0.0, 1.0]), false_positive=fp, false_negative=fn).double()
    assert float((1 - fp) * seen[0] + fp * seen[1]) == pytest.approx(0.0, abs=1e-5)
    assert float(fn * seen[0] + (1 - fn) * seen[1]) == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(p=st.floats(0.0, 1.0), fp=RATE, fn=RATE)
def test_the_mean_of_debiased_rewards_is_the_success_rate(p, fp, fn):
    # std of a mean of 4000 verdicts: at most .5 / 63 = .008, times 1 / J after debiasing; .05 / J is six of them
    mean = debias_rewards(flipped(p, fp, fn), false_positive=fp, false_negative=fn).mean()
    assert abs(float(mean) - p) < 0.05 / (1 - fp - fn)


def test_debiasing_multiplies_the_variance_by_one_over_j_squared():
    seen = flipped(0.4, 0.2, 0.3)
    debiased = debias_rewards(seen, false_positive=0.2, false_negative=0.3)
    assert float(debiased.var() / seen.var()) == pytest.approx(1 / 0.5**2, rel=1e-4)


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.7, 0.3), (0.9, 0.4)])
def test_debiasing_without_information_is_refused(rates):
    with pytest.raises(ConfigError, match="J > 0"):
        debias_rewards(torch.ones(1), false_positive=rates[0], false_negative=rates[1])


@pytest.mark.parametrize(
    ("p", "fp", "fn"), [(0.0, 0.2, 0.1), (0.3, 0.3, 0.3), (0.8, 0.1, 0.4), (1.0, 0.0, 0.25)]
)
def test_the_fitted_value_converges_to_rho_plus_j_p(p, fp, fn):
    """A critic that regresses on flipped rewards learns rho+ + J p; on debiased ones it learns p."""
    seen = flipped(p, fp, fn, n=40_000)[None]
    everywhere = torch.ones_like(seen, dtype=torch.bool)
    limits = {}
    for name, targets in {
        "seen": seen,
        "debiased": debias_rewards(seen, false_positive=fp, false_negative=fn),
    }.items():
        v = torch.zeros((), requires_grad=True)
        for _ in range(30):
            loss = value_mse_loss(v.expand_as(seen), targets, everywhere, num_tokens=seen.numel())
            (grad,) = torch.autograd.grad(loss, v)
            v = (v - 0.5 * grad).detach().requires_grad_()
        limits[name] = v.item()
    assert limits["seen"] == pytest.approx(fp + (1 - fp - fn) * p, abs=0.01)
    assert limits["debiased"] == pytest.approx(p, abs=0.02)


def test_golden_zscore():
    def check(f) -> None:
        # 2, 4, 4, 4, 5, 5, 7, 9: the textbook sample with mean 5 and population std 2
        assert close(f(torch.tensor([2, 4, 4, 4, 5, 5, 7, 9])), [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])

    assert_catches(check, zscore, "scaled shifted negated reversed")
    assert_catches(check, length_bias, "scaled shifted negated reversed")


@pytest.mark.parametrize("x", [[], [3.0], [0.1, 0.1, 0.1]])
def test_zscore_without_spread_is_zero(x):
    assert torch.equal(zscore(torch.tensor(x)), torch.zeros(len(x)))
