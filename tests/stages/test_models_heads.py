"""Value heads: by hand, at their start, and the limit in which the bottleneck is a plain network."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo.config import learning
from vrpo.models import BottleneckHead, ScalarHead, build_head
from vrpo.models.heads import default_latent_dim


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand():
    """d = 2, K = 1 with weights whose output can be worked out on paper."""
    head = BottleneckHead(2, 1, generator=generator())
    with torch.no_grad():
        head.encoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # mean = h_0, logvar = h_1
        head.inner.weight.copy_(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))  # SiLU sees z, 0, 0, 0
        head.output.weight.copy_(torch.tensor([[2.0, 5.0, 5.0, 5.0]]))
        head.output.bias.fill_(0.5)
    return head


def silu(x):
    return x / (1 + math.exp(-x))


def check_by_hand(head):
    h = torch.tensor([[1.0, math.log(4.0)]])  # mean 1, sigma 2
    out = head(h, None)
    # z = 1: V = 2 silu(1) + .5;   KL = (1 + 4 - log 4 - 1) / 2
    assert out.values.item() == pytest.approx(2 * silu(1.0) + 0.5, abs=1e-6)
    assert out.kl.item() == pytest.approx((1 + 4 - math.log(4) - 1) / 2, abs=1e-6)
    # noise 1.5: z = 1 + 2 * 1.5 = 4
    assert head(h, torch.tensor([[1.5]])).values.item() == pytest.approx(2 * silu(4.0) + 0.5, abs=1e-6)


def test_bottleneck_by_hand():
    check_by_hand(by_hand())


@pytest.mark.parametrize("part", ["encoder", "inner", "output"])
def test_the_check_can_fail(part):
    head = by_hand()
    with torch.no_grad():
        getattr(head, part).weight.mul_(1.01)
    with pytest.raises(AssertionError):
        check_by_hand(head)


def test_logvar_is_clamped_so_that_nothing_overflows():
    head = by_hand()
    out = head(torch.tensor([[0.0, 1e6], [0.0, -1e6]]), torch.ones(2, 1))
    # logvar 4: KL = (e^4 - 5) / 2; logvar -10: KL = (e^-10 + 10 - 1) / 2
    torch.testing.assert_close(out.kl, torch.tensor([(math.exp(4) - 5) / 2, (math.exp(-10) + 9) / 2]))
    # z = e^2 and e^-5
    torch.testing.assert_close(
        out.values, torch.tensor([2 * silu(math.exp(2)) + 0.5, 2 * silu(math.exp(-5)) + 0.5])
    )


def test_scalar_head_is_a_dot_product_and_keeps_nothing_back():
    head = ScalarHead(2, generator=generator())
    with torch.no_grad():
        head.output.weight.copy_(torch.tensor([[3.0, -1.0]]))
        head.output.bias.fill_(0.25)
    out = head(torch.tensor([[2.0, 4.0]]), None)
    assert out.values.tolist() == [2.25]  # 3 * 2 - 4 + .25
    assert out.kl.tolist() == [0.0]
    assert head.latent_dim == 0


@pytest.mark.parametrize("d", [16, 128, 576])
def test_first_values_are_near_zero_and_sigma_is_near_one(d):
    hidden = torch.randn(256, d, generator=generator(1))  # unit scale, as after a norm
    head = build_head(learning.CriticConfig(head=learning.BottleneckHead()), d, generator=generator(2))
    _, logvar = head.encoder(hidden).chunk(2, dim=-1)
    assert logvar.abs().max() < 0.1
    assert head(hidden, None).values.abs().max() < 0.5
    scalar = build_head(learning.CriticConfig(), d, generator=generator(2))
    assert scalar(hidden, None).values.abs().max() < 1.5
    assert scalar.output.weight.std().item() == pytest.approx(1 / (d + 1), rel=0.6)


def test_default_latent_dim_is_an_eighth_between_16_and_256():
    assert [default_latent_dim(d) for d in (16, 128, 576, 4096)] == [16, 16, 72, 256]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), tokens=st.integers(0, 5))
def test_without_noise_values_are_deterministic_and_equal_the_zero_noise_sample(seed, tokens):
    head = build_head(
        learning.CriticConfig(head=learning.BottleneckHead(latent_dim=3)), 8, generator=generator(seed)
    )
    hidden = torch.randn(tokens, 8, generator=generator(seed + 1))
    mean = head(hidden, None)
    assert torch.equal(mean.values, head(hidden, None).values)
    assert torch.equal(mean.values, head(hidden, torch.zeros(tokens, 3)).values)
    assert (mean.kl >= 0).all()


def test_values_are_fp32_from_bf16_features_under_autocast():
    head = build_head(learning.CriticConfig(head=learning.BottleneckHead()), 16, generator=generator())
    hidden = torch.randn(4, 16, generator=generator(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(hidden, None)
    assert out.values.dtype == out.kl.dtype == torch.float32
    assert torch.equal(out.values, head(hidden.float(), None).values)


def test_fresh_heads_come_from_the_generator_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, again, other = (
        build_head(
            learning.CriticConfig(head=learning.BottleneckHead()), 16, generator=generator(s)
        ).state_dict()
        for s in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["encoder.weight"], other["encoder.weight"])


@pytest.mark.parametrize("regression", ["mse", "bce", "hl_gauss"])
@pytest.mark.parametrize(
    "head", [learning.ScalarHead(), learning.BottleneckHead(latent_dim=3)], ids=lambda h: h.type
)
def test_every_head_gives_values_in_every_regression(head, regression):
    config = learning.CriticConfig(head=head, regression=regression)
    found = build_head(config, 8, generator=generator())(torch.randn(5, 8, generator=generator(1)), None)
    assert found.values.shape == (5,) and found.raw.shape == (5, 51 if regression == "hl_gauss" else 1)
    start = 0.5 if regression == "bce" else 0.0
    torch.testing.assert_close(found.values, torch.full((5,), start), atol=1.0, rtol=0.0)


def test_an_uncertainty_branch_says_nothing_at_first_and_learns_apart_from_the_head():
    plain = learning.CriticConfig(head=learning.BottleneckHead(latent_dim=3))
    informed = plain.model_copy(update={"features": "uncertainty"})
    hidden, features = torch.randn(4, 8), torch.rand(4, 7)
    one, other = (build_head(config, 8, generator=generator()) for config in (plain, informed))
    assert torch.equal(one(hidden, None).values, other(hidden, None, features).values)
    other(hidden, None, features).values.sum().backward()
    assert float(other.branch.output.weight.grad.abs().sum()) > 0.0
    with torch.no_grad():
        other.branch.output.bias.fill_(0.25)
    torch.testing.assert_close(other(hidden, None, features).values, one(hidden, None).values + 0.25)
