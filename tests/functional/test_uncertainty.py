"""Uncertainty features: known values, nothing from the future, nothing from behind the mask."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vrpo.functional import UNCERTAINTY_FEATURES, uncertainty_features


def test_golden():
    nll = torch.tensor([[9.0, 1.0, 3.0, 2.0]])
    entropy = torch.tensor([[9.0, 0.5, 0.25, 0.75]])
    mask = torch.tensor([[False, True, True, True]])
    found = torch.expm1(uncertainty_features(entropy, nll, mask))
    expected = torch.tensor(
        [  # last, sum, max of surprisals; entropy now; sum, max of entropies; tokens
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0],
            [1.0, 1.0, 1.0, 0.25, 0.5, 0.5, 1.0],
            [3.0, 4.0, 3.0, 0.75, 0.75, 0.5, 2.0],
            [2.0, 6.0, 3.0, 0.0, 1.5, 0.75, 3.0],
        ]
    )
    torch.testing.assert_close(found, expected[None])
    assert found.shape[-1] == len(UNCERTAINTY_FEATURES)


def test_the_last_token_of_the_policy_is_remembered_over_tokens_of_an_environment():
    nll, mask = torch.tensor([[2.0, 7.0, 1.0]]), torch.tensor([[True, False, True]])
    last = torch.expm1(uncertainty_features(torch.zeros(1, 3), nll, mask))[0, :, 0]
    torch.testing.assert_close(last, torch.tensor([0.0, 2.0, 2.0, 1.0]))


@given(st.integers(0, 4), st.integers(0, 2**31))
def test_a_state_knows_nothing_of_later_tokens_nor_of_masked_ones(at, seed):
    draw = torch.Generator().manual_seed(seed)
    nll, entropy = torch.rand(2, 5, generator=draw), torch.rand(2, 5, generator=draw)
    mask = torch.rand(2, 5, generator=draw) > 0.3
    before = uncertainty_features(entropy, nll, mask)
    later = torch.arange(5) >= at
    changed = uncertainty_features(entropy, torch.where(later, nll + 5.0, nll), mask)
    assert torch.equal(before[:, : at + 1], changed[:, : at + 1])
    hidden = uncertainty_features(
        torch.where(mask, entropy, torch.nan), torch.where(mask, nll, torch.nan), mask
    )
    assert torch.equal(before, hidden)
