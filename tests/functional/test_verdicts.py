"""Bayes' rule on noisy verdicts, for both channels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrpo.errors import RewardError
from vrpo.functional import (
    equal_responses,
    flip_log_likelihoods,
    gaussian_log_likelihoods,
    joint_posterior_rewards,
    joint_verdict_nll,
    posterior_rewards,
    require_verdicts,
    verdict_nll,
)


def flips(seen, fp, fn):
    return flip_log_likelihoods(seen, false_positive=torch.tensor(fp), false_negative=torch.tensor(fn))


def gaussian(seen, low, high, std):
    return gaussian_log_likelihoods(
        seen, low=torch.tensor(low), high=torch.tensor(high), std=torch.tensor(std)
    )


@given(q=st.floats(0.02, 0.98), fp=st.floats(0.0, 0.45), fn=st.floats(0.0, 0.45))
def test_the_posterior_is_bayes_rule_and_its_mean_is_the_belief(q, fp, fn):
    seen = torch.tensor([0.0, 1.0])
    found = posterior_rewards(torch.full((2,), q), *flips(seen, fp, fn)).double()
    likelihood = {1: (fn, 1 - fn), 0: (1 - fp, fp)}  # clean verdict -> P(seen 0), P(seen 1)
    for reward in (0, 1):
        joint = q * likelihood[1][reward], (1 - q) * likelihood[0][reward]
        assert float(found[reward]) == pytest.approx(joint[0] / sum(joint), abs=1e-5)
    p_seen = q * (1 - fn) + (1 - q) * fp
    assert float(found[1]) * p_seen + float(found[0]) * (1 - p_seen) == pytest.approx(q, abs=1e-5)


@given(
    shares=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5),
    said=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8),
    rates=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)),
)
def test_one_right_response_a_prompt_is_bayes_rule_over_which_it_is(shares, said, rates):
    """By writing out every hypothesis: each sampled answer is the right one, or none of them is."""
    fp, fn = rates
    answers = [answer % (len(shares) - 1) for answer, _ in said]
    sampled = sorted(set(answers))
    q = [share / sum(shares) for share in shares]
    weights = {}
    for right in (*sampled, None):
        weight = 1.0 - sum(q[answer] for answer in sampled) if right is None else q[right]
        for answer, (_, seen) in zip(answers, said, strict=True):
            one = (1 - fn) if answer == right else fp
            weight *= one if seen else 1 - one
        weights[right] = weight
    seen = torch.tensor([float(x) for _, x in said])
    # the same responses to a second prompt change nothing
    belief = torch.tensor([q[answer] for answer in answers] * 2)
    channel = flips(torch.cat([seen, seen]), fp, fn)
    whose = {
        "answers": torch.tensor([*answers, *(answer + 10 for answer in answers)]),
        "group_ids": torch.tensor([7] * len(said) + [3] * len(said)),
    }
    found = joint_posterior_rewards(belief, *channel, **whose, least=1e-9)
    expected = [weights[answer] / sum(weights.values()) for answer in answers]
    assert found.tolist() == pytest.approx(expected * 2, rel=1e-4, abs=1e-6)
    nll = joint_verdict_nll(belief.log(), *channel, **whose)
    assert float(nll) == pytest.approx(-2 * math.log(sum(weights.values())), rel=1e-4)


def test_the_joint_gradient_is_what_all_verdicts_say_against_what_nobody_sampled():
    """On log q_y: q_y / w_0 P(none | all) - P(y | all), once an answer, however often it was sampled."""
    log_q = torch.tensor([0.3, 0.3, 0.3, 0.2]).log().requires_grad_()
    channel = flips(torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.3, 0.2)
    whose = {"answers": torch.tensor([5, 5, 5, 9]), "group_ids": torch.zeros(4, dtype=torch.long)}
    joint_verdict_nll(log_q, *channel, **whose).backward()
    with torch.no_grad():
        p = joint_posterior_rewards(log_q.exp(), *channel, **whose, least=1e-9)
    none = 1.0 - p[0] - p[3]
    assert float(log_q.grad[:3].sum()) == pytest.approx(float(none * 0.3 / 0.5 - p[0]), rel=1e-4)
    assert float(log_q.grad[3]) == pytest.approx(float(none * 0.2 / 0.5 - p[3]), rel=1e-4)


@given(q=st.floats(0.01, 0.99), fp=st.floats(0.0, 0.45), fn=st.floats(0.0, 0.45))
def test_one_response_a_prompt_is_judged_alone(q, fp, fn):
    log_q, channel = torch.full((2,), math.log(q)), flips(torch.tensor([0.0, 1.0]), fp, fn)
    together = joint_verdict_nll(
        log_q, *channel, answers=torch.tensor([0, 1]), group_ids=torch.tensor([0, 1])
    )
    torch.testing.assert_close(together, verdict_nll(log_q, *channel).sum(), rtol=1e-4, atol=1e-4)


def test_answers_held_for_certain_have_a_finite_joint_loss_and_gradient():
    log_q = torch.zeros(3, requires_grad=True)
    channel = flips(torch.tensor([0.0, 1.0, 0.0]), 0.0, 0.0)
    nll = joint_verdict_nll(log_q, *channel, answers=torch.arange(3), group_ids=torch.tensor([0, 0, 1]))
    nll.backward()
    assert bool(nll.isfinite()) and bool(log_q.grad.isfinite().all())


def test_equal_answers_tell_the_rates_where_the_belief_is_weak():
    """Nine verdicts on each prompt's one answer, right in half of the prompts, 30 % flipped; the belief is too low."""
    generator = torch.Generator().manual_seed(1)
    right = (torch.rand(1000, generator=generator) < 0.5).repeat_interleave(9)
    seen = (right ^ (torch.rand(9000, generator=generator) < 0.3)).float()
    prompts = torch.arange(1000).repeat_interleave(9)
    learned = {}
    for name in ("joint", "alone"):
        numbers = torch.full((2,), -1.4, requires_grad=True)
        optimizer = torch.optim.Adam([numbers], lr=0.05)
        for _ in range(150):
            fp, fn = 0.5 * numbers.sigmoid()
            channel = flip_log_likelihoods(seen, false_positive=fp, false_negative=fn)
            log_q = torch.full((9000,), math.log(0.3))
            whose = {"answers": prompts, "group_ids": prompts}
            nll = (
                joint_verdict_nll(log_q, *channel, **whose)
                if name == "joint"
                else verdict_nll(log_q, *channel).sum()
            )
            optimizer.zero_grad()
            nll.backward()
            optimizer.step()
        learned[name] = (0.5 * numbers.sigmoid()).tolist()
    assert learned["joint"] == pytest.approx([0.3, 0.3], abs=0.08)
    assert learned["alone"][1] < 0.05


def test_beliefs_that_leave_nothing_for_other_answers_leave_them_the_least():
    found = joint_posterior_rewards(
        torch.tensor([0.6, 0.6]),
        *flips(torch.tensor([1.0, 1.0]), 0.2, 0.2),
        answers=torch.tensor([0, 1]),
        group_ids=torch.tensor([0, 0]),
        least=0.02,
    )
    assert found.tolist() == pytest.approx([2.4 / 4.82] * 2)


def test_equal_responses_have_one_number():
    ids = torch.tensor([[5, 8, 2, 0], [5, 8, 2, 9], [5, 8, 3, 0], [5, 8, 2, 0], [5, 8, 0, 0]])
    mask = torch.tensor([[True, True, False]] * 4 + [[True, False, False]])
    first, padded, other, elsewhere, short = equal_responses(
        ids, mask, torch.tensor([0, 0, 0, 1, 0])
    ).tolist()
    assert first == padded and len({first, other, elsewhere, short}) == 4


def test_without_noise_the_posterior_is_the_seen_reward():
    seen = torch.tensor([0, 1, 1, 0])
    found = posterior_rewards(torch.tensor([0.98, 0.02, 0.5, 0.02]), *flips(seen, 0.0, 0.0))
    torch.testing.assert_close(found, seen.float(), rtol=0.0, atol=1e-9)


def test_rewards_that_are_no_verdicts_are_named():
    require_verdicts(torch.tensor([0.0, 1.0]), "flips", "do not")
    with pytest.raises(RewardError, match=r"^flips got the reward 0\.3, .*; use others$"):
        require_verdicts(torch.tensor([1.0, 0.3]), "flips", "use others")


@given(q=st.floats(0.001, 0.999), fp=st.floats(0.0, 0.45), fn=st.floats(0.0, 0.45))
def test_verdict_nll_is_the_cross_entropy_of_the_noisy_channel(q, fp, fn):
    found = verdict_nll(torch.full((2,), math.log(q)), *flips(torch.tensor([0.0, 1.0]), fp, fn))
    p = fp + (1 - fp - fn) * q
    assert float(found[1]) == pytest.approx(-math.log(p), rel=1e-3, abs=1e-4)
    assert float(found[0]) == pytest.approx(-math.log(1 - p), rel=1e-3, abs=1e-4)


def test_a_flip_cannot_make_an_unlikely_response_likely():
    """The gradient on log q is -J q / (rho+ + J q) for a seen 1: small where q is, never beyond 1."""
    log_q = torch.tensor([-12.0, -2.0, -0.01], requires_grad=True)
    verdict_nll(log_q, *flips(torch.ones(3), 0.3, 0.3)).sum().backward()
    q = log_q.detach().exp()
    torch.testing.assert_close(log_q.grad, -0.4 * q / (0.3 + 0.4 * q))
    assert abs(float(log_q.grad[0])) < 1e-4 and float(log_q.grad.abs().max()) < 1.0
    clean = torch.tensor([-12.0], requires_grad=True)  # without noise it counts in full
    verdict_nll(clean, *flips(torch.ones(1), 0.0, 0.0)).sum().backward()
    assert float(clean.grad[0]) == pytest.approx(-1.0, abs=1e-3)


def test_a_response_held_for_certain_has_a_finite_loss_and_gradient():
    log_q = torch.zeros(2, requires_grad=True)
    nll = verdict_nll(log_q, *flips(torch.tensor([0.0, 1.0]), 0.0, 0.0))
    nll.sum().backward()
    assert bool(nll.isfinite().all()) and bool(log_q.grad.isfinite().all())


@given(
    q=st.floats(0.02, 0.98),
    seen=st.floats(-2.0, 3.0),
    low=st.floats(-1.0, 0.4),
    high=st.floats(0.5, 2.0),
    std=st.floats(0.2, 2.0),
)
def test_the_gaussian_channel_is_a_mixture_of_two_normal_densities(q, seen, low, high, std):
    def density(mean):
        return math.exp(-0.5 * ((seen - mean) / std) ** 2) / std

    channel = gaussian(torch.tensor([seen]), low, high, std)
    joint = q * density(high), (1 - q) * density(low)
    nll = float(verdict_nll(torch.tensor([math.log(q)]), *channel))
    assert nll == pytest.approx(-math.log(sum(joint)), rel=1e-3, abs=1e-4)
    posterior = float(posterior_rewards(torch.tensor([q]), *channel))
    assert posterior == pytest.approx(joint[0] / sum(joint), rel=1e-3, abs=1e-5)


def test_a_narrow_gaussian_channel_believes_the_reward_and_a_wide_one_the_belief():
    seen, belief = torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.2])
    narrow = posterior_rewards(belief, *gaussian(seen, 0.0, 1.0, 0.1))
    torch.testing.assert_close(narrow, seen, rtol=0.0, atol=1e-6)
    wide = posterior_rewards(belief, *gaussian(seen, 0.0, 1.0, 100.0))
    torch.testing.assert_close(wide, belief, rtol=0.0, atol=1e-3)
