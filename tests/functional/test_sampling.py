"""Sampling as a function of (logits, uniform)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import close
from vrpo.functional import sample_tokens, sampling

CUTS = [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.8), (1, 1.0), (0, 1e-6), (0, 0.0), (100, 0.95)]


def grid(n: int) -> torch.Tensor:
    """(i + 1/2) / n: the frequencies of a draw at these uniforms are its probabilities to 1 / n."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_golden_draws():
    # p = .1, .2, .3, .4: cumulative .1, .3, .6, 1
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(5, 4)
    u = torch.tensor([0.0, 0.15, 0.45, 0.7, 0.999])
    out = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0)
    assert out.token_ids.tolist() == [0, 1, 2, 3, 3]
    assert close(out.policy_logprobs.exp(), [0.1, 0.2, 0.3, 0.4, 0.4])
    assert torch.equal(out.logprobs, out.policy_logprobs)
    # top_k = 2 leaves .3, .4 of .7: 3/7 = .428571, 4/7 = .571429
    out = sample_tokens(logits, u, temperature=1.0, top_k=2, top_p=1.0)
    assert out.token_ids.tolist() == [2, 2, 3, 3, 3]
    assert close(out.logprobs.exp(), [3 / 7, 3 / 7, 4 / 7, 4 / 7, 4 / 7])
    assert close(out.policy_logprobs.exp(), [0.3, 0.3, 0.4, 0.4, 0.4])
    # top_p = .75: .4 + .3 = .7 is not enough, .9 is: leaves .2, .3, .4 of .9
    out = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=0.75)
    assert out.token_ids.tolist() == [1, 1, 2, 3, 3]
    assert close(out.logprobs.exp(), [2 / 9, 2 / 9, 3 / 9, 4 / 9, 4 / 9])
    # both: top_k = 3 leaves .2, .3, .4 of .9; of that .4/.9 = .44 < .75 <= .7/.9 = .78: leaves .3, .4
    out = sample_tokens(logits, u, temperature=1.0, top_k=3, top_p=0.75)
    assert out.token_ids.tolist() == [2, 2, 3, 3, 3]
    # temperature 1/2 squares: .01, .04, .09, .16 of .3
    out = sample_tokens(logits, u, temperature=0.5, top_k=0, top_p=1.0)
    assert close(out.policy_logprobs.exp(), [1 / 30, 4 / 30, 9 / 30, 16 / 30, 16 / 30])


@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_frequencies_are_the_probabilities_it_reports(top_k, top_p):
    n = 20_000
    logits = 2 * torch.randn(13, generator=torch.Generator().manual_seed(0))
    out = sample_tokens(logits.expand(n, 13), grid(n), temperature=0.9, top_k=top_k, top_p=top_p)
    frequency = torch.bincount(out.token_ids, minlength=13) / n
    reported = torch.zeros(13).index_put((out.token_ids,), out.logprobs.exp())
    assert close(frequency, reported, atol=2 / n)
    policy = torch.softmax(logits / 0.9, -1)
    assert close(out.policy_logprobs.exp(), policy[out.token_ids])
    if top_k == 0 and top_p == 1.0:
        assert close(frequency, policy, atol=2 / n)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), cut=st.sampled_from(CUTS))
def test_a_row_depends_on_its_own_logits_and_uniform_only(seed, cut):
    g = torch.Generator().manual_seed(seed)
    logits, u = torch.randn(6, 11, generator=g), torch.rand(6, generator=g)
    settings_ = {"temperature": 1.0, "top_k": cut[0], "top_p": cut[1]}
    together = sample_tokens(logits, u, **settings_)
    for b in range(6):
        alone = sample_tokens(logits[b : b + 1], u[b : b + 1], **settings_)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9), (3, 0.9)])
def test_a_token_of_probability_zero_is_never_drawn(u, top_k, top_p):
    # forbidden tokens first, in the middle and last, one underflows to 0 in fp32
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -200.0, -math.inf]])
    out = sample_tokens(
        logits, torch.tensor([u], dtype=torch.float64), temperature=1.0, top_k=top_k, top_p=top_p
    )
    assert out.token_ids.item() in (1, 3)
    assert bool(out.logprobs.isfinite().all())


def test_a_long_tail_is_reached():
    # one token of .999, then 150,000 that share .001: each 6.7e-9, far below one fp32 step at 1
    tail = 150_000
    logits = torch.full((1, tail + 1), math.log(0.001 / tail))
    logits[0, 0] = math.log(0.999)
    for share in (0.25, 0.5, 0.75):
        u = torch.tensor([0.999 + 0.001 * share], dtype=torch.float64)
        out = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0)
        assert out.token_ids.item() == pytest.approx(share * tail, rel=0.01)
    # ten uniforms one tail token apart reach ten tokens; an fp32 running sum moves nine tokens at a time
    u = 0.9995 + 0.001 / tail * (torch.arange(10, dtype=torch.float64) + 0.5)
    drawn = sample_tokens(logits.expand(10, -1), u, temperature=1.0, top_k=0, top_p=1.0).token_ids
    assert drawn.diff().tolist() == [1] * 9


def test_ties_at_the_edge_of_a_cut_go_to_the_lower_ids():
    n = 1000
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(n, 5)
    drawn = sample_tokens(logits, grid(n), temperature=1.0, top_k=3, top_p=1.0).token_ids
    assert sorted(set(drawn.tolist())) == [0, 1, 4]
    # four equal tokens of .25: .6 needs three of them
    drawn = sample_tokens(torch.zeros(n, 4), grid(n), temperature=1.0, top_k=0, top_p=0.6).token_ids
    assert sorted(set(drawn.tolist())) == [0, 1, 2]
    drawn = sample_tokens(torch.zeros(n, 9), grid(n), temperature=1.0, top_k=4, top_p=0.6).token_ids
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


def test_top_k_one_is_greedy():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    out = sample_tokens(logits, grid(50), temperature=1.0, top_k=1, top_p=1.0)
    assert torch.equal(out.token_ids, logits.argmax(-1))
    assert close(out.logprobs, torch.zeros(50))


def test_no_cut_does_not_sort(monkeypatch):
    def no_sort(*args, **kwargs):
        raise RuntimeError("sorted the vocabulary")

    monkeypatch.setattr(torch.Tensor, "sort", no_sort)
    monkeypatch.setattr(torch.Tensor, "topk", no_sort)
    out = sample_tokens(torch.zeros(2, 4), torch.tensor([0.1, 0.9]), temperature=1.0, top_k=0, top_p=1.0)
    assert out.token_ids.tolist() == [0, 3]


def test_nan_logits_are_visible():
    out = sample_tokens(
        torch.full((1, 3), math.nan), torch.tensor([0.5]), temperature=1.0, top_k=0, top_p=1.0
    )
    assert out.logprobs.isnan().all()
    assert 0 <= out.token_ids.item() < 3


@pytest.mark.parametrize("words", [1, 255, 256, 257, 1000, 5000])
def test_the_inverse_cdf_in_blocks_is_that_of_one_sum(words):
    g = torch.Generator().manual_seed(words)
    logits, u = 3 * torch.randn(200, words, generator=g), torch.rand(200, generator=g, dtype=torch.float64)
    cdf = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    expected = (cdf <= u[:, None]).sum(dim=-1).clamp(max=words - 1)
    drawn = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0).token_ids
    # fp32 probabilities against fp64 ones: a draw may land across an edge of the CDF, about once in a million
    assert int((drawn != expected).sum()) <= 1


def test_a_word_of_probability_zero_is_not_drawn_at_the_end_of_a_block():
    logits = torch.full((3, 600), -torch.inf)
    logits[:, [0, 255, 300]] = 0.0
    u = torch.tensor([0.0, 0.5, 1.0])
    assert sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0).token_ids.tolist() == [0, 255, 300]


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_among_candidates_is_top_p_among_all(monkeypatch, spread, top_p):
    """Peaked rows end among the candidates, flat ones do not, and ties go to the lower ids either way."""
    g = torch.Generator().manual_seed(3)
    logits = (spread * torch.randn(12, 3000, generator=g)).round(decimals=1)
    logits[::3] = logits[::3].clamp(max=1.0)  # many that are equally likely
    u = torch.rand(12, generator=g)
    by_candidates = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=top_p)
    monkeypatch.setattr("vrpo.functional.sampling.CANDIDATES", 3000)
    by_all = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=top_p)
    assert all(torch.equal(a, b) for a, b in zip(by_candidates, by_all, strict=True))


def test_rows_are_sampled_in_pieces_that_stay_in_the_cache(monkeypatch):
    g = torch.Generator().manual_seed(4)
    logits, u = torch.randn(9, 40, generator=g), torch.rand(9, generator=g)
    whole = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=0.9)
    monkeypatch.setitem(sampling.PIECE, "cpu", 160)
    shapes = []
    sample = sampling._sample
    monkeypatch.setattr(sampling, "_sample", lambda x, *rest: shapes.append(x.shape) or sample(x, *rest))
    in_pieces = sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=0.9)
    assert shapes == [(4, 40), (4, 40), (1, 40)]
    assert all(torch.equal(a, b) for a, b in zip(whole, in_pieces, strict=True))
