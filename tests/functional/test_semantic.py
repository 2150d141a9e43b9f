"""Which tokens the semantic losses act on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.functional import clamped_nll, ema, quantile_threshold, uncertain_tokens

SCORES = torch.tensor([[0.1, 0.9, math.nan], [0.5, 0.7, 0.3]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_golden_quantile():
    # counted, in order: .1 .3 .5 .7 .9; fraction .2: place .8 * 4 = 3.2, so .7 + .2 * .2 = .74
    assert quantile_threshold(SCORES, MASK, fraction=0.2) == pytest.approx(0.74, abs=1e-6)
    # fraction .5: place 2, the median
    assert quantile_threshold(SCORES, MASK, fraction=0.5) == pytest.approx(0.5, abs=1e-6)
    assert quantile_threshold(SCORES, MASK, fraction=0.0) == pytest.approx(0.9)
    assert quantile_threshold(SCORES, MASK, fraction=1.0) == pytest.approx(0.1)


def check_selection(f) -> None:
    assert f(SCORES, MASK, fraction=0.2).tolist() == [[False, True, False], [False, False, False]]
    assert f(SCORES, MASK, fraction=0.5).tolist() == [[False, True, False], [False, True, False]]
    # counted .1 .9 .5 .7: the median is .6
    assert f(SCORES[:, :2], MASK[:, :2], fraction=0.5).tolist() == [[False, True], [False, True]]
    # a threshold given: the fraction is not used; .5 itself is not above .5
    assert f(SCORES, MASK, fraction=0.2, threshold=0.5).tolist() == [
        [False, True, False],
        [False, True, False],
    ]


def test_golden_selection():
    assert_catches(check_selection, uncertain_tokens, "reversed")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), fraction=st.floats(0.0, 1.0))
def test_about_the_fraction_is_selected_and_masked_tokens_never(seed, fraction):
    g = torch.Generator().manual_seed(seed)
    scores, mask = torch.rand(6, 9, generator=g), torch.rand(6, 9, generator=g) < 0.8
    selected = uncertain_tokens(torch.where(mask, scores, math.nan), mask, fraction=fraction)
    assert not bool((selected & ~mask).any())
    assert abs(int(selected.sum()) - fraction * int(mask.sum())) <= 1
    # junk under False does not move the threshold
    junk = torch.where(mask, scores, torch.full_like(scores, 1e9))
    assert torch.equal(uncertain_tokens(junk, mask, fraction=fraction), selected)


def test_ties_are_left_out():
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert uncertain_tokens(scores, torch.ones(4, dtype=torch.bool), fraction=0.9).tolist() == [False] * 3 + [
        True
    ]
    equal = torch.ones(4)
    assert not bool(uncertain_tokens(equal, torch.ones(4, dtype=torch.bool), fraction=0.9).any())


def test_no_token_counts():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert math.isnan(quantile_threshold(SCORES, nothing, fraction=0.2))
    assert not bool(uncertain_tokens(SCORES, nothing, fraction=0.2).any())


def test_selection_carries_no_gradient():
    scores = torch.rand(5, requires_grad=True)
    assert not uncertain_tokens(scores, torch.ones(5, dtype=torch.bool), fraction=0.4).requires_grad
    # the loss on the subset has gradient inside it and nowhere else
    selected = uncertain_tokens(scores, torch.ones(5, dtype=torch.bool), fraction=0.4)
    torch.where(selected, scores, 0.0).sum().backward()
    assert torch.equal(scores.grad, selected.float())


def test_golden_ema():
    # .9 * 2 + .1 * 4 = 2.2
    assert ema(2.0, 4.0, decay=0.9) == pytest.approx(2.2)
    assert ema(None, 4.0, decay=0.9) == 4.0
    # nothing measured leaves it; nothing measured before is nothing seen yet
    assert ema(2.0, math.nan, decay=0.9) == 2.0
    assert ema(math.nan, 4.0, decay=0.9) == 4.0
    assert ema(2.0, 4.0, decay=1.0) == 2.0  # fixed where it was first


def test_golden_clamped_nll():
    def check(f) -> None:
        assert close(f(torch.tensor([0.5, 10.0, 15.0, math.inf])), [0.5, 10, 10, 10])

    assert_catches(check, clamped_nll, "scaled shifted negated reversed")


def test_a_clamped_token_has_no_gradient():
    nll = torch.tensor([3.0, 15.0], requires_grad=True)
    clamped_nll(nll).sum().backward()
    assert nll.grad.tolist() == [1.0, 0.0]
