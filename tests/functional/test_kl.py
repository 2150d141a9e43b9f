"""Per-token KL estimators."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.errors import ConfigError
from vrpo.functional import adaptive_kl_coef, kl_estimate


def check_golden(estimate) -> None:
    # d = logp - ref = log 2, -log 2, 0
    logp, ref = (
        torch.tensor([math.log(0.5), math.log(0.25), -1.0]),
        torch.tensor([math.log(0.25), math.log(0.5), -1.0]),
    )
    # k1 = d
    assert close(estimate(logp, ref, kind="k1"), [0.693147, -0.693147, 0])
    # k2 = 0.693147^2 / 2 = 0.240227
    assert close(estimate(logp, ref, kind="k2"), [0.240227, 0.240227, 0])
    # k3 = exp(-d) - 1 + d: 0.5 - 1 + 0.693147 = 0.193147;  2 - 1 - 0.693147 = 0.306853
    assert close(estimate(logp, ref, kind="k3"), [0.193147, 0.306853, 0])


def test_golden():
    assert_catches(check_golden, kl_estimate, "scaled shifted negated reversed")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_k1_and_k3_are_unbiased(seed):
    """Averaged over p exactly (not by sampling) both are KL(p || q)."""
    g = torch.Generator().manual_seed(seed)
    log_p, log_q = (torch.log_softmax(torch.randn(11, generator=g), -1) for _ in range(2))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    for kind in ("k1", "k3"):
        assert torch.allclose((log_p.exp() * kl_estimate(log_p, log_q, kind=kind)).sum(), kl, atol=1e-5)


def test_gradient_of_k2_is_that_of_the_kl():
    theta = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    log_q = torch.log_softmax(torch.tensor([0.1, 0.4, -0.5]), -1)
    log_p = torch.log_softmax(theta, -1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), theta, retain_graph=True)
    # E_p of the sampled k2's gradient: weights p are data
    (sampled,) = torch.autograd.grad(
        (log_p.detach().exp() * kl_estimate(log_p, log_q, kind="k2")).sum(), theta
    )
    assert torch.allclose(sampled, exact, atol=1e-6)


def test_k3_is_clamped_and_precise():
    far = kl_estimate(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), kind="k3")
    # d = -20: e^20 - 1 - 20;  d = 20: e^-20 - 1 + 20 = 19
    assert far[0] == pytest.approx(math.exp(20) - 21, rel=1e-6)
    assert far[1] == pytest.approx(19.0)
    # d^2 / 2 = 5e-9 near 0: exp(-d) - 1 + d written plainly gives 0 or 6e-8 in fp32
    near = kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]), kind="k3")
    assert near[0] == pytest.approx(5e-9, rel=0.01)


def test_golden_adaptive_coefficient():
    def check(controller) -> None:
        given = {"target": 4.0, "horizon": 1000, "responses": 100}
        # e = 4.4 / 4 - 1 = .1: .05 * (1 + .1 * 100 / 1000)
        assert controller(0.05, 4.4, **given) == pytest.approx(0.0505)
        # e = -1, cut at -.2: .05 * (1 - .02);  e = 9, cut at .2
        assert controller(0.05, 0.0, **given) == pytest.approx(0.049)
        assert controller(0.05, 40.0, **given) == pytest.approx(0.051)
        assert controller(0.05, 4.0, **given) == 0.05

    check(adaptive_kl_coef)
    with pytest.raises(AssertionError):
        check(lambda coef, kl, **g: adaptive_kl_coef(coef, kl, **g | {"target": 5.0}))
    assert adaptive_kl_coef(0.05, 0.0, target=1.0, horizon=10, responses=1000) == 0.0


def test_unknown_kind_is_refused():
    # unwrapped: users run without the type checker that the tests switch on
    with pytest.raises(ConfigError, match="'k4'"):
        inspect.unwrap(kl_estimate)(torch.zeros(1), torch.zeros(1), kind="k4")
