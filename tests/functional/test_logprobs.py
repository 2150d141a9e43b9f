"""Log-probabilities and entropies without the full table of logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.functional.mutants import assert_catches, close
from vrpo.functional import linear_kl, linear_logprobs_and_entropy, token_entropy_and_nll, token_logprobs

N, V, D = 23, 31, 6


def head(seed: int, *, rows: int = N, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, token ids."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = scale * torch.randn(rows, D, generator=g), torch.randn(V, D, generator=g)
    return hidden, weight, torch.randn(V, generator=g), torch.randint(V, (rows,), generator=g)


def full(hidden, weight, ids, *, temperature, bias=None, softcap=None, logit_scale=1.0):
    """The same numbers from one N x V table."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    dist = torch.distributions.Categorical(logits=logits / temperature)
    return dist.log_prob(ids), dist.entropy()


def check_golden(f) -> None:
    # weight = log of (1, 2, 5) in one dimension, hidden 1: p = .125, .25, .625
    #   logp(2) = log .625 = -.470004;  H = .125*2.079442 + .25*1.386294 + .625*.470004 = .900256
    # hidden 0: p = 1/3 each: logp = -1.098612, H = 1.098612
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logp, entropy = f(torch.tensor([[1.0], [0.0]]), weight, torch.tensor([2, 0]), temperature=1.0)
    assert close(logp, [-0.470004, -1.098612])
    assert close(entropy, [0.900256, 1.098612])


def test_golden():
    assert_catches(check_golden, linear_logprobs_and_entropy, "scaled shifted negated reversed")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": head(0)[2]},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.25},
    "all": {"bias": head(0)[2], "softcap": 3.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_equals_the_full_softmax_with_its_gradients(chunk, option, temperature):
    hidden, weight, _, ids = head(1)
    results = []
    for f, extra in ((linear_logprobs_and_entropy, {"chunk": chunk}), (full, {})):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = f(h, w, ids, temperature=temperature, **OPTIONS[option], **extra)
        (logp * torch.linspace(-1, 2, N) + entropy**2).sum().backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        assert close(ours, exact, atol=2e-5)


def test_a_forbidden_token_has_no_part_in_entropy_or_gradient():
    hidden, weight, bias, ids = head(2)
    bias[20:] = -torch.inf
    results = []
    for rows, offset in ((V, bias), (20, bias[:20])):
        h = hidden.clone().requires_grad_()
        logp, entropy = linear_logprobs_and_entropy(
            h, weight[:rows], ids % 20, temperature=0.7, bias=offset, chunk=7
        )
        (logp.sum() + (entropy**2).sum()).backward()
        results.append((logp.detach(), entropy.detach(), h.grad))
    for forbidden, absent in zip(*results, strict=True):
        assert torch.isfinite(forbidden).all() and close(forbidden, absent, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30.0))
def test_entropy_stays_exact_for_flat_and_for_peaky_heads(seed, scale):
    hidden, weight, _, ids = head(seed, scale=scale)
    _, entropy = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=5)
    _, exact = full(hidden.double(), weight.double(), ids, temperature=1.0)
    assert close(entropy, exact, atol=1e-5 * max(1.0, scale * 3))


def test_the_chunk_size_changes_no_bit_of_a_row():
    hidden, weight, _, ids = head(2)
    one = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=4)
    two = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with torch.no_grad():
        quiet = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(one, quiet, strict=True))


def test_a_frozen_weight_gets_no_gradient_and_stays_as_it_is():
    hidden, weight, _, ids = head(3)
    before = weight.clone()
    hidden.requires_grad_()
    logp, entropy = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=5)
    (logp + entropy).sum().backward()
    assert weight.grad is None
    assert torch.equal(weight, before)
    assert bool((hidden.grad != 0).any())


def test_no_rows():
    hidden, weight, _, ids = (x.requires_grad_() if x.is_floating_point() else x for x in head(4, rows=0))
    logp, entropy = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(V, D))
    assert linear_kl(hidden, weight, hidden, weight).shape == (0,)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_table_of_logits_exists_and_nothing_of_its_size_is_kept():
    hidden, weight, _, ids = (x.requires_grad_() if x.is_floating_point() else x for x in head(5, rows=320))
    kept = []
    with (
        _Largest() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):
        logp, entropy = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0, chunk=64)
        (logp + entropy).sum().backward()
    assert seen.numel == 64 * V  # one chunk, forward and backward
    assert max(kept, default=0) <= 320 * D


def test_half_precision_models_give_fp32_results():
    hidden, weight, _, ids = head(6)
    logp, entropy = linear_logprobs_and_entropy(hidden.bfloat16(), weight.bfloat16(), ids, temperature=1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    # a bf16 backbone under an fp32 head: the product is fp32, only the input was rounded
    mixed, _ = linear_logprobs_and_entropy(hidden.bfloat16(), weight, ids, temperature=1.0)
    exact, _ = full(hidden.bfloat16().float(), weight, ids, temperature=1.0)
    assert close(mixed, exact, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_kl_equals_the_full_one_with_its_gradient(chunk, temperature):
    (hp, wp, _, _), (hq, wq, _, _) = head(7), head(8)
    dist = torch.distributions
    results = []
    for which in range(2):
        h, w = hq.clone().requires_grad_(), wq.clone().requires_grad_()
        if which == 0:
            kl = linear_kl(hp, wp, h, w, chunk=chunk, temperature=temperature)
        else:
            p, q = (dist.Categorical(logits=a @ b.T / temperature) for a, b in ((hp, wp), (h, w)))
            kl = dist.kl_divergence(p, q)
        (kl * torch.linspace(0, 1, N)).sum().backward()
        results.append((kl.detach(), h.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        assert close(ours, exact, atol=2e-5)


def test_linear_kl_is_zero_on_itself_and_sends_no_gradient_to_p():
    hidden, weight, _, _ = head(9)
    assert torch.equal(linear_kl(hidden, weight, hidden, weight, chunk=6), torch.zeros(N))
    p, q = hidden.clone().requires_grad_(), (hidden + 1).requires_grad_()
    linear_kl(p, weight, q, weight, chunk=6).sum().backward()
    assert p.grad is None
    assert bool((q.grad != 0).any())


def test_token_logprobs_agrees_in_any_shape():
    hidden, weight, _, ids = head(10, rows=24)
    chunked, _ = linear_logprobs_and_entropy(hidden, weight, ids, temperature=0.8)
    logits = hidden @ weight.T
    assert close(token_logprobs(logits, ids, temperature=0.8), chunked, atol=1e-5)
    cube = token_logprobs(logits.view(2, 3, 4, V), ids.view(2, 3, 4), temperature=0.8)
    assert close(cube, chunked.view(2, 3, 4), atol=1e-5)


def test_token_entropy_and_nll_is_the_same_in_batches():
    hidden, weight, _, ids = head(11, rows=24)
    logp, entropy = linear_logprobs_and_entropy(hidden, weight, ids, temperature=1.0)
    h, nll = token_entropy_and_nll(hidden.view(4, 6, D), weight, ids.view(4, 6), chunk=5)
    assert close(h, entropy.view(4, 6))
    assert close(nll, -logp.view(4, 6))
