"""Critic diagnostics."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.mutants import assert_catches, close
from vrpo.functional import (
    auc,
    expected_calibration_error,
    explained_variance,
    explained_variance_by_position,
    frac_zero_std,
    gae,
    masked_correlation,
    sibling_ranking_accuracy,
)

NAN = math.nan
SCALAR = "scaled shifted negated"


def test_golden_explained_variance():
    def check(f) -> None:
        # R = 0, 2, 4: Var 8/3.  R - V = 0, 1, -1: Var 2/3.  1 - 1/4 = .75
        targets, values = torch.tensor([0.0, 2.0, 4.0, NAN]), torch.tensor([0.0, 1.0, 5.0, NAN])
        assert close(f(targets, values, torch.tensor([True, True, True, False])), 0.75)

    assert_catches(check, explained_variance, SCALAR)


def test_explained_variance_of_known_critics():
    targets, mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert explained_variance(targets, targets, mask) == 1
    assert explained_variance(targets, targets + 7, mask) == 1  # an offset costs nothing
    assert explained_variance(targets, torch.full((1, 4), 0.3), mask).item() == pytest.approx(0)
    assert explained_variance(targets, 1 - targets, mask) == -3
    assert explained_variance(torch.full((1, 4), 0.1), targets, mask).isnan()
    assert explained_variance(targets, targets, ~mask).isnan()


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -3.0])
def test_returns_that_are_equal_but_for_rounding_have_nothing_to_explain(reward):
    values, mask = torch.rand(64, 9, generator=torch.Generator().manual_seed(0)), torch.ones(64, 9) > 0
    rewards = torch.zeros(64, 9).index_fill_(1, torch.tensor([8]), reward)
    _, targets = gae(rewards, values, torch.zeros(64), mask, gamma=1.0, lam=1.0)
    targets = targets + 1e-7 * torch.rand(64, 9, generator=torch.Generator().manual_seed(1))
    assert 0.0 < targets.max() - targets.min() < 1e-5
    assert explained_variance(targets, values, mask).isnan()
    assert explained_variance_by_position(targets, values, mask).isnan().all()


def test_golden_explained_variance_by_position():
    def check(f) -> None:
        # 2 bins; rows of 4 and 2 tokens, the second with a hole: first halves {0, 2 | 4}, second {1, 1 | 3}
        mask = torch.tensor([[True, True, True, True], [False, True, False, True]])
        targets = torch.tensor([[0.0, 2.0, 1.0, 1.0], [NAN, 4.0, NAN, 3.0]])
        # errors: first half 0, 1, -1 -> .75 as above; second half: R = V -> 1
        values = torch.tensor([[0.0, 1.0, 1.0, 1.0], [NAN, 5.0, NAN, 3.0]])
        assert close(f(targets, values, mask, bins=2), [0.75, 1.0])

    assert_catches(check, explained_variance_by_position, SCALAR + " reversed")


def test_positions_of_short_responses_leave_bins_empty():
    mask = torch.tensor([[True, False], [True, False]])
    out = explained_variance_by_position(
        torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([[0.0, 0], [1, 0]]), mask, bins=3
    )
    assert close(out, [1.0, NAN, NAN])


def test_golden_calibration():
    def check(f) -> None:
        # 2 bins: {.1, .3} against {0, 1}: |.4 - 1| = .6;  {.6, .8, 1.2} against {1, 0, 1}: |2.6 - 2| = .6
        # (.6 + .6) / 5 = .24
        values, outcomes = torch.tensor([0.1, 0.3, 0.6, 0.8, 1.2]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
        assert close(f(values, outcomes, bins=2), 0.24)

    assert_catches(check, expected_calibration_error, SCALAR)
    assert expected_calibration_error(
        torch.tensor([-0.2, 1.0]), torch.tensor([0.0, 1.0])
    ).item() == pytest.approx(0.1)
    assert expected_calibration_error(torch.zeros(0), torch.zeros(0)).isnan()


def test_golden_auc():
    def check(f) -> None:
        # positives 3, 1; negatives 1, 0: pairs 3>1, 3>0, 1=1, 1>0: (1 + 1 + .5 + 1) / 4 = .875
        assert close(f(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, False, False])), 0.875)

    assert_catches(check, auc, SCALAR)


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_auc_needs_both_classes(labels):
    assert auc(torch.tensor([0.0, 1.0]), torch.tensor(labels)).isnan()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_auc_reads_only_the_order_and_mirrors(seed):
    g = torch.Generator().manual_seed(seed)
    scores, labels = torch.randint(5, (20,), generator=g).float(), torch.rand(20, generator=g) < 0.5
    labels[:2] = torch.tensor([True, False])
    area = auc(scores, labels)
    assert torch.equal(auc(torch.exp(scores), labels), area)
    assert close(auc(-scores, labels), 1 - area)
    assert close(auc(scores, ~labels), 1 - area)


def test_golden_sibling_ranking():
    def check(f) -> None:
        # group 0: outcomes 1, 0, 0, values .5, .5, .9: tie 1/2, wrong 0.  group 1: 1 against 0: right 1.
        # group 2: equal outcomes, no pair; the NaN outcome is in no pair.  (0.5 + 0 + 1) / 3 = .5
        groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 1])
        outcomes = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, NAN])
        values = torch.tensor([0.5, 0.5, 0.9, 0.2, 0.3, 0.1, 0.8, 0.0])
        assert close(f(values, outcomes, groups), 0.5)

    assert_catches(check, sibling_ranking_accuracy, SCALAR)
    assert sibling_ranking_accuracy(torch.rand(2), torch.tensor([0.0, 1.0]), torch.tensor([0, 1])).isnan()


def test_golden_correlation():
    def check(f) -> None:
        # x - mean = -1, 0, 1; y - mean = -1, 1, 0: sum of products 1; norms sqrt 2 each: 1 / 2
        x, y = torch.tensor([1.0, 2.0, 3.0, NAN]), torch.tensor([4.0, 6.0, 5.0, NAN])
        assert close(f(x, y, torch.tensor([True, True, True, False])), 0.5)

    assert_catches(check, masked_correlation, SCALAR)
    both = torch.ones(2, dtype=torch.bool)
    assert masked_correlation(torch.tensor([0.1, 0.1]), torch.tensor([0.0, 1.0]), both).isnan()
    assert masked_correlation(torch.rand(2), torch.rand(2), ~both).isnan()
    assert masked_correlation(torch.tensor([0.0, 1.0]), torch.tensor([5.0, -9.0]), both) == -1


def test_golden_frac_zero_std():
    def check(f) -> None:
        # group 4: 1, 1 -> equal; group 9: 0, 1 -> mixed; group 2: one valid -> equal; group 5: none, not counted
        groups = torch.tensor([4, 9, 4, 9, 2, 2, 5])
        scores = torch.tensor([1.0, 0, 1, 1, 1, NAN, 0])
        valid = torch.tensor([True, True, True, True, True, False, False])
        assert close(f(scores, groups, valid), 2 / 3)

    assert_catches(check, frac_zero_std, SCALAR)
    none = torch.zeros(2, dtype=torch.bool)
    assert frac_zero_std(torch.zeros(2), torch.zeros(2, dtype=torch.long), none).isnan()


@pytest.mark.parametrize("measure", [explained_variance, masked_correlation, explained_variance_by_position])
def test_a_mask_of_zeros_and_ones_is_a_mask(measure):
    """As tokenizers give it; taken for positions it would say something else. Annotations ask for bool: without their check here."""
    x, y = torch.rand(6, 5), torch.rand(6, 5)
    mask = torch.rand(6, 5) < 0.6
    plain = inspect.unwrap(measure)
    torch.testing.assert_close(plain(x, y, mask.long()), measure(x, y, mask), equal_nan=True)


def test_labels_of_zeros_and_ones_are_labels():
    scores, labels = torch.tensor([0.1, 0.9, 0.8, 0.2]), torch.tensor([0, 1, 1, 0])
    assert inspect.unwrap(auc)(scores, labels) == 1.0
    share = inspect.unwrap(frac_zero_std)(
        torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), labels
    )
    assert share == 1.0  # of each group one is valid
