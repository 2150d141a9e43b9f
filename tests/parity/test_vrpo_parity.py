"""The fast VRPO arithmetic against the slow, obviously right one."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import vrpo_numpy as slow
from vrpo import functional as fast

SEEDS = st.integers(0, 1_000_000)
SIZES = st.integers(1, 5)
FEW = settings(deadline=None, max_examples=25)


def draws(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers that fp32 holds exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def tensor(array: np.ndarray) -> torch.Tensor:
    """As fp32."""
    return torch.tensor(array, dtype=torch.float32)


def same(actual: torch.Tensor, expected, *, tol: float = 1e-5) -> bool:
    """Equal up to fp32 rounding."""
    return np.allclose(actual.numpy(), expected, rtol=tol, atol=tol)


@FEW
@given(seed=SEEDS, rows=SIZES, dims=SIZES)
def test_gaussian_kl_and_sample(seed, rows, dims):
    mean, logvar, noise = 2 * draws(seed, 3, rows, dims)
    kl = fast.gaussian_kl(tensor(mean), tensor(logvar))
    z = fast.reparameterise(tensor(mean), tensor(logvar), tensor(noise))
    for i in range(rows):
        assert same(kl[i], slow.gaussian_kl_one(mean[i], logvar[i]))
        assert same(z[i], slow.reparameterise_one(mean[i], logvar[i], noise[i]))


@FEW
@given(seed=SEEDS, batch=SIZES, length=SIZES, chunk=st.integers(1, 30))
def test_token_entropy_and_nll(seed, batch, length, chunk):
    hidden, weight = draws(seed, batch, length, 4), draws(seed + 1, 9, 4)
    ids = np.random.default_rng(seed).integers(0, 9, (batch, length))
    ours = fast.token_entropy_and_nll(tensor(hidden), tensor(weight), torch.tensor(ids), chunk=chunk)
    exact = slow.token_entropy_and_nll(hidden, weight, ids)
    assert same(ours[0], exact[0])
    assert same(ours[1], exact[1])


@FEW
@given(
    seed=SEEDS,
    temperature=st.floats(0.3, 2.0),
    with_bias=st.booleans(),
    softcap=st.none() | st.floats(1.0, 30.0),
    logit_scale=st.floats(0.1, 2.0),
)
def test_linear_logprobs_and_entropy(seed, temperature, with_bias, softcap, logit_scale):
    hidden, weight, bias = draws(seed, 3, 4), draws(seed + 1, 7, 4), draws(seed + 2, 7)
    ids = np.random.default_rng(seed).integers(0, 7, 3)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    logp, entropy = fast.linear_logprobs_and_entropy(
        tensor(hidden),
        tensor(weight),
        torch.tensor(ids),
        chunk=2,
        bias=tensor(bias) if with_bias else None,
        **options,
    )
    for i in range(3):
        exact = slow.logprob_and_entropy(
            hidden[i], weight, ids[i], bias=bias if with_bias else None, **options
        )
        assert same(logp[i], exact[0], tol=2e-5)
        assert same(entropy[i], exact[1], tol=2e-5)


@FEW
@given(seed=SEEDS, rows=SIZES)
def test_linear_kl(seed, rows):
    hidden_p, weight_p = draws(seed, rows, 3), draws(seed + 1, 8, 3)
    hidden_q, weight_q = draws(seed + 2, rows, 5), draws(seed + 3, 8, 5)  # the two models may differ in width
    ours = fast.linear_kl(tensor(hidden_p), tensor(weight_p), tensor(hidden_q), tensor(weight_q), chunk=2)
    for i in range(rows):
        assert same(ours[i], slow.categorical_kl(weight_p @ hidden_p[i], weight_q @ hidden_q[i]), tol=2e-5)


@FEW
@given(
    seed=SEEDS,
    batch=SIZES,
    length=SIZES,
    fraction=st.floats(0.0, 1.0),
    threshold=st.none() | st.floats(-1.0, 1.0),
)
def test_uncertain_tokens(seed, batch, length, fraction, threshold):
    scores = draws(seed, batch, length)
    mask = np.random.default_rng(seed + 1).random((batch, length)) < 0.7
    ours = fast.uncertain_tokens(tensor(scores), torch.tensor(mask), fraction=fraction, threshold=threshold)
    assert np.array_equal(
        ours.numpy(), slow.uncertain_tokens(scores, mask, fraction=fraction, threshold=threshold)
    )


@FEW
@given(seed=SEEDS, n=st.integers(1, 20), fp=st.floats(0.0, 0.45), fn=st.floats(0.0, 0.45))
def test_flips_and_debiasing(seed, n, fp, fn):
    rng = np.random.default_rng(seed)
    clean, u = rng.integers(0, 2, n), rng.random(n)
    rates = {"false_positive": fp, "false_negative": fn}
    seen = fast.flip_rewards(tensor(clean), uniforms=torch.tensor(u), **rates)
    exact = slow.flip_rewards(clean, uniforms=u, **rates)
    assert same(seen, exact)
    assert same(fast.debias_rewards(seen, **rates), slow.debias_rewards(exact, **rates))
