"""What siblings add to a value model: known values, exactness where they cover everything, and nothing where they share nothing."""

import itertools
import math

import torch

from tests.functional.mutants import assert_catches, close
from vrpo.functional import covered_values, sibling_correction

GROUPS = torch.tensor([7, 3, 7, 3, 7])  # ids in any order
PAIR = torch.zeros(2, dtype=torch.long)


def check_coverage(f) -> None:
    # prompt 5; responses "1 2" (paid 1), "1 3" (0), "1 2" (0), "4" (.5); p(1) = .6, p(2 | 1) = .5, p(3 | 1) = .25, p(4) = .3
    ids = torch.tensor([[5, 1, 2], [5, 1, 3], [5, 1, 2], [5, 4, 0]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    logp = torch.tensor([[0.6, 0.5], [0.6, 0.25], [0.6, 0.5], [0.3, math.nan]]).log()
    returns = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.5, math.nan]])
    values = torch.where(mask, 0.2, math.nan)
    found, covered = f(values, returns, logp, ids, mask, group_ids=torch.zeros(4, dtype=torch.long))
    # "1 2" is worth (1 + 0) / 2; at the prompt .3 * .5 + .15 * 0 + .3 * .5 = .3 of .75 known; after 1: .5 * .5 = .25 of .75
    assert close(covered, [[0.75, 0.75], [0.75, 0.75], [0.75, 0.75], [0.75, 0.0]])
    assert close(found, [[0.35, 0.30], [0.35, 0.30], [0.35, 0.30], [0.35, 0.0]])


def test_golden_coverage():
    assert_catches(check_coverage, covered_values, "scaled shifted negated reversed")


def test_siblings_that_cover_everything_give_the_exact_value_whatever_the_value_model_says():
    # all four responses of two binary tokens; the exact value is the expectation, written out
    responses = torch.tensor(list(itertools.product([1, 2], repeat=2)))
    ids = torch.cat([torch.full((4, 1), 9), responses], dim=1)
    first, second = {1: 0.7, 2: 0.3}, {1: {1: 0.2, 2: 0.8}, 2: {1: 0.9, 2: 0.1}}
    logp = torch.tensor([[first[a], second[a][b]] for a, b in responses.tolist()]).log()
    paid = torch.tensor([1.0, 0.0, 0.5, 2.0])
    found, covered = covered_values(
        torch.full((4, 2), 1000.0),
        paid[:, None].expand(4, 2),
        logp,
        ids,
        torch.ones(4, 2, dtype=torch.bool),
        group_ids=torch.zeros(4, dtype=torch.long),
    )
    after = {1: 0.2 * 1.0 + 0.8 * 0.0, 2: 0.9 * 0.5 + 0.1 * 2.0}
    start = 0.7 * after[1] + 0.3 * after[2]
    assert close(covered, torch.ones(4, 2))
    assert close(found, [[start, after[a]] for a, _ in responses.tolist()], atol=1e-3)


def one_pair(ids, mask, groups=PAIR, value=0.25):
    """V' and c of two responses of probability 1/2 a token, paid 1 and 0."""
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    returns = torch.where(mask, torch.tensor([[1.0], [0.0]]), 0.0)
    logp = torch.where(mask, math.log(0.5), 0.0)
    return covered_values(torch.where(mask, value, 0.0), returns, logp, ids, mask, group_ids=groups)


def test_of_a_long_response_nothing_is_known_at_its_start():
    mask = [[True] * 40] * 2
    found, covered = one_pair([[9, *range(40)], [9, *range(50, 90)]], mask)
    assert float(covered[:, 0].max()) < 1e-11
    torch.testing.assert_close(found[:, 0], torch.tensor([0.25, 0.25]))


def test_prompts_do_not_mix_and_missing_siblings_take_no_part():
    same = [[9, 1, 2], [9, 1, 2]]
    _, alone = one_pair(same, [[True, True]] * 2, groups=torch.tensor([0, 1]))
    assert close(alone, [[0.25, 0.5], [0.25, 0.5]])
    together, _ = one_pair(same, [[True, True]] * 2)
    assert close(together, [[0.5 * 0.25 + 0.75 * 0.25, 0.5 * 0.5 + 0.5 * 0.25]] * 2)
    found, covered = one_pair(same, [[True, True], [False, False]])
    assert close(covered, [[0.25, 0.5], [0.0, 0.0]])
    assert close(found, [[1.0 * 0.25 + 0.75 * 0.25, 1.0 * 0.5 + 0.5 * 0.25], [0.0, 0.0]])


def test_padding_that_looks_like_a_token_is_none():
    # "1" and "1 2" are two responses, though the first is padded with 2
    _, covered = one_pair([[9, 1, 2], [9, 1, 2]], [[True, False], [True, True]])
    assert close(covered, [[0.5 + 0.25, 0.0], [0.5 + 0.25, 0.5]])


def test_environment_tokens_cost_nothing_and_must_agree():
    # response, environment, response: 1 (5) 2 and 1 (6) 2
    mask = [[True, False, True]] * 2
    _, covered = one_pair([[9, 1, 5, 2], [9, 1, 6, 2]], mask)
    assert close(covered, [[0.5, 0.0, 0.5]] * 2)
    _, covered = one_pair([[9, 1, 5, 2], [9, 1, 5, 2]], mask)
    assert close(covered, [[0.25, 0.0, 0.5]] * 2)


def check_correction(f) -> None:
    # group 7: residuals 3, 2, 1: mean 2, squares 2; group 3: -1, -3: mean -2, squares 2
    # sigma^2 = 4 / 3; tau^2 = mean(4 - 4/9, 4 - 2/3) = 31/9
    # group 7: w = 2 * 31/9 / (2 * 31/9 + 4/3) = 62 / 74; group 3: w = 31 / 43
    residuals = torch.tensor([3.0, -1.0, 2.0, -3.0, 1.0])
    big, small = 62 / 74, 31 / 43
    assert close(f(residuals, GROUPS), [1.5 * big, -3 * small, 2 * big, -1 * small, 2.5 * big])


def test_golden_correction():
    assert_catches(check_correction, sibling_correction, "scaled shifted negated reversed")


def test_a_value_model_that_is_right_about_prompts_is_not_corrected():
    # the means of both groups are 0: tau^2 would be negative
    assert torch.equal(sibling_correction(torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0]), GROUPS), torch.zeros(5))


def test_a_cold_value_model_is_replaced_by_the_siblings():
    # V = 0 and returns that hardly differ inside a prompt: the correction is the mean of the others
    residuals = torch.tensor([10.01, -5.0, 10.0, -5.01, 9.99])
    expected = [9.995, -5.01, 10.0, -5.0, 10.005]
    assert close(sibling_correction(residuals, GROUPS), expected, atol=1e-3)


def test_missing_rewards_take_no_part():
    valid = torch.tensor([True, True, False, True, True])
    numbers = torch.tensor([3.0, -1.0, math.nan, -3.0, 1.0])
    found = sibling_correction(numbers, GROUPS, valid=valid)
    assert close(found[valid], sibling_correction(numbers[valid], GROUPS[valid]))
    assert float(found[2]) == 0.0


def test_without_siblings_nothing_is_corrected():
    assert torch.equal(sibling_correction(torch.tensor([5.0, 1.0]), torch.arange(2)), torch.zeros(2))
