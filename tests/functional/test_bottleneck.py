"""The variational bottleneck's price and its sample."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.functional import gaussian_kl, reparameterise


def check_golden(f) -> None:
    # dims: (mean 2, var 1): 4/2 = 2;  (mean 0, var 4): (4 - 1 - log 4)/2 = .806853;  sum 2.806853
    # second state: (mean 1, var 1/4): (1 + .25 - 1 + log 4)/2 = .818147; (0, 1): 0
    mean = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    logvar = torch.tensor([[0.0, math.log(4.0)], [math.log(0.25), 0.0]])
    assert close(f(mean, logvar), [2.806853, 0.818147])


def test_golden():
    assert_catches(check_golden, gaussian_kl, "scaled shifted negated reversed")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_equals_torch_distributions(seed):
    g = torch.Generator().manual_seed(seed)
    mean, logvar = 3 * torch.randn(2, 4, 5, 8, generator=g)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(mean.double(), (logvar.double() / 2).exp()),
        normal(torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)),
    )
    assert torch.allclose(gaussian_kl(mean, logvar).double(), exact.sum(-1), rtol=1e-5, atol=1e-5)


def test_zero_iff_standard_normal():
    zero = torch.zeros(3, 8)
    assert torch.equal(gaussian_kl(zero, zero), torch.zeros(3))
    # exp(1e-4) - 1 - 1e-4 written plainly is 0 or negative in fp32; true KL 8 * (1e-4)^2 / 4 = 2e-8
    for mean, logvar in ((zero, zero + 1e-4), (zero, zero - 1e-4), (zero + 1e-4, zero)):
        kl = gaussian_kl(mean, logvar)
        assert bool((kl > 1e-8).all())
        assert bool((kl < 1e-7).all())


def test_golden_sample():
    def check(f) -> None:
        # 1 + 2 * 0.5 = 2;  -1 + 1 * -3 = -4
        z = f(torch.tensor([[1.0, -1.0]]), torch.tensor([[math.log(4.0), 0.0]]), torch.tensor([[0.5, -3.0]]))
        assert close(z, [[2.0, -4.0]])

    assert_catches(check, reparameterise, "scaled shifted negated reversed")


def test_noise_zero_gives_the_mean_and_gradient_reaches_both():
    g = torch.Generator().manual_seed(0)
    mean, logvar, noise = torch.randn(3, 6, 4, generator=g)
    assert torch.equal(reparameterise(mean, logvar, torch.zeros(6, 4)), mean)
    mean.requires_grad_()
    logvar.requires_grad_()
    reparameterise(mean, logvar, noise).sum().backward()
    assert torch.equal(mean.grad, torch.ones(6, 4))
    assert close(logvar.grad, 0.5 * (logvar.detach() / 2).exp() * noise)
