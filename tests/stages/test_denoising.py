"""The terminal denoiser: what it believes, what it learns from, and that it comes back from a checkpoint."""

import math
from dataclasses import replace

import pytest
import torch

from tests.batches import make_batch
from vrpo.algorithms import Grpo, Ppo
from vrpo.algorithms.critic_objective import CriticState
from vrpo.config.learning import DenoiserConfig, GrpoConfig, PpoConfig
from vrpo.errors import RewardError
from vrpo.functional import posterior_rewards, verdict_nll
from vrpo.train.channels import GaussianChannel
from vrpo.train.denoising import CHANNEL_LEARNING_RATE, Denoiser
from vrpo.train.microbatches import Splitter
from vrpo.train.nuisance import TokenSlopes
from vrpo.train.values import evaluate_batch
from vrpo.types import join

SPLIT = Splitter(4, None, 0)
KNOWN = {"false_positive": 0.3, "false_negative": 0.3}


def build(make_policy, **settings):
    policy = make_policy("llama_tied")
    config = DenoiserConfig(**{"learning_rate": 1e-2} | settings)
    return policy, Denoiser(config, policy, weight_decay=0.0, seed=0)


def denoise(denoiser, batch):
    """Stage 4 as the loop has it: the second model reads the responses, then its belief meets their rewards."""
    read, _ = evaluate_batch(
        batch,
        reference=None,
        critic=None,
        objective=None,
        state=CriticState(),
        temperature=1.0,
        split=SPLIT,
        believer=denoiser.model,
    )
    return denoiser.denoise(read)


def test_the_belief_is_the_likelihood_of_the_response(make_policy):
    policy, denoiser = build(make_policy)
    batch = make_batch()
    with torch.no_grad():
        log_probs = policy.causal_lm(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
        logp = log_probs.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
        expected = torch.where(batch.mask, logp, 0.0).sum(dim=1)
        torch.testing.assert_close(denoiser._log_belief(batch), expected, rtol=1e-4, atol=1e-4)


def test_denoised_rewards_lie_between_the_levels_of_the_seen_one_and_follow_it(make_policy):
    _, denoiser = build(make_policy, **KNOWN)
    batch = make_batch()
    done, metrics = denoise(denoiser, batch)
    assert bool((done.denoised >= 0.3 - 1e-6).all()) and bool((done.denoised <= 0.7 + 1e-6).all())
    other, _ = denoise(denoiser, batch.with_(scores=1.0 - batch.scores))
    seen_one = batch.scores > 0.5
    assert bool(
        (
            torch.where(seen_one, done.denoised, other.denoised)
            > torch.where(seen_one, other.denoised, done.denoised)
        ).all()
    )
    assert metrics["denoiser/informativeness"] == pytest.approx(0.4)
    apart = torch.where(batch.mask, batch.old_logp - done.belief_logp, 0.0)
    assert metrics["denoiser/kl"] == pytest.approx(float(apart.sum(dim=1).mean()), rel=1e-5)
    assert torch.equal(done.scores, batch.scores) and torch.equal(done.rewards, batch.rewards)


def test_verdicts_on_equal_responses_add_up_and_a_missing_one_says_nothing(make_policy):
    _, denoiser = build(make_policy, **KNOWN, one_right=True)
    batch = make_batch(lengths=(2,) * 5, scores=(1.0, 1.0, 0.0, 1.0, 1.0), groups=(0, 0, 0, 0, 1))
    ids = batch.input_ids.clone()
    ids[1] = ids[0]  # the same answer twice
    batch = batch.with_(input_ids=ids)
    done, _ = denoise(denoiser, batch)
    p = (done.denoised - 0.3) / 0.4
    belief = done.belief_logp.sum(dim=1).exp().clamp(0.02, 0.98)
    ratio = 0.7 / 0.3
    weights = torch.stack([belief[0] * ratio**2, belief[2] / ratio, belief[3] * ratio])
    unseen = (1 - belief[0] - belief[2] - belief[3]).clamp(min=0.02)
    expected = weights / (unseen + weights.sum())
    torch.testing.assert_close(p[[0, 2, 3]], expected, rtol=1e-4, atol=1e-5)
    assert p[1] == p[0]
    torch.testing.assert_close(
        p[4:],
        posterior_rewards(belief[4:], *denoiser.channel.log_likelihoods(batch.select(torch.tensor([4])))),
    )
    mask = batch.mask.clone()
    mask[1] = False
    alone, _ = denoise(denoiser, batch.with_(mask=mask, scores=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])))
    once = belief[0] * ratio / (unseen + belief[0] * ratio + weights[1:].sum())
    torch.testing.assert_close((alone.denoised[0] - 0.3) / 0.4, once, rtol=1e-4, atol=1e-5)


def test_knowing_which_prompts_are_hard_is_not_knowing_which_answers_are_right(make_policy):
    _, denoiser = build(make_policy, **KNOWN)
    # the easy prompt has two right answers of three, the hard one none
    batch = make_batch(lengths=(2,) * 6, scores=(1.0, 0.0, 1.0, 0.0, 0.0, 0.0), groups=(0, 0, 0, 1, 1, 1))
    batch = batch.with_(clean_scores=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    _, metrics = denoise(denoiser, batch)
    assert metrics["denoiser/corr_seen"] == pytest.approx(0.25)
    # seen 1/3, -2/3, 1/3 and clean 1/3, 1/3, -2/3 about the prompt's means: -1/3 over 2/3
    assert metrics["denoiser/corr_seen_siblings"] == pytest.approx(-0.5)


def test_without_noise_the_denoised_reward_is_the_seen_one(make_policy):
    _, denoiser = build(make_policy, false_positive=0.0, false_negative=0.0)
    done, _ = denoise(denoiser, make_batch())
    torch.testing.assert_close(done.denoised, make_batch().scores)


def test_other_rewards_than_0_and_1_are_refused(make_policy):
    _, denoiser = build(make_policy)
    with pytest.raises(RewardError, match=r"denoiser got the reward 0\.5"):
        denoise(denoiser, make_batch(scores=(1.0, 0.5, 0.0, 1.0)))


@pytest.mark.parametrize("pieces", [(1, 3), (2, 1, 1)])
def test_gradient_does_not_depend_on_the_split_and_skips_missing_rewards(make_policy, pieces):
    policy, denoiser = build(make_policy)
    whole = make_batch()
    mask = whole.mask.clone()
    mask[1] = False  # its reward is missing
    whole = whole.with_(mask=mask, valid=torch.tensor([True, False, True, True]))

    def gradient(parts):
        denoiser.optimizer.zero_grad()
        for part in parts:
            if part.num_tokens:
                denoiser.loss(part, responses=3)[0].backward()
        return [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None] + [
            denoiser.channel.numbers.grad.clone()
        ]

    rows = torch.arange(4).split(list(pieces))
    for a, b in zip(gradient([whole]), gradient([whole.select(r) for r in rows]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    flipped = whole.with_(scores=torch.where(whole.valid, whole.scores, 1.0 - whole.scores))
    for a, b in zip(gradient([whole]), gradient([flipped]), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in policy.parameters())


def test_siblings_judged_together_are_one_loss_wherever_prompts_are_cut_apart(make_policy):
    _, denoiser = build(make_policy, one_right=True)
    whole = make_batch(lengths=(2,) * 6, scores=(1.0, 1.0, 0.0, 1.0, 0.0, 1.0), groups=(0, 0, 0, 1, 1, 1))
    ids = whole.input_ids.clone()
    ids[1] = ids[0]
    mask = whole.mask.clone()
    mask[4] = False  # its reward is missing
    whole = whole.with_(input_ids=ids, mask=mask)

    def gradient(parts):
        denoiser.optimizer.zero_grad()
        for part in parts:
            denoiser.loss(part, responses=5)[0].backward()
        return [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None] + [
            denoiser.channel.numbers.grad.clone()
        ]

    cut = replace(SPLIT, whole_prompts=True)
    for a, b in zip(gradient([whole]), gradient([part for _, part in cut(whole)]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    flipped = whole.with_(scores=torch.where(mask.any(dim=1), whole.scores, 1.0 - whole.scores))
    for a, b in zip(gradient([whole]), gradient([flipped]), strict=True):
        assert torch.equal(a, b)
    alone = gradient([whole.with_(group_ids=torch.arange(6))])
    assert not torch.allclose(alone[-1], gradient([whole])[-1])


def test_it_learns_which_response_is_right_and_how_noisy_the_reward_is(make_policy):
    """Two responses to one prompt, the first right, 30 % and 10 % of the verdicts flipped."""
    _, denoiser = build(make_policy)
    batch = make_batch(lengths=(2, 2) * 100, scores=(1.0, 0.0) * 100, groups=(0,) * 200)
    ids = batch.input_ids.clone()
    ids[::2], ids[1::2] = ids[0].clone(), ids[1].clone()
    draw = torch.rand(200, generator=torch.Generator().manual_seed(3))
    right = batch.scores > 0.5
    seen = torch.where(draw < torch.where(right, 0.1, 0.3), 1.0 - batch.scores, batch.scores)
    batch = batch.with_(input_ids=ids, scores=seen)
    for _ in range(400):
        denoiser.optimizer.zero_grad()
        denoiser.loss(batch, responses=200)[0].backward()
        denoiser.optimizer.step()
    done, metrics = denoise(denoiser, batch)
    belief = denoiser._log_belief(batch).detach().exp()
    assert float(belief[0]) > 0.8 and float(belief[1]) < 0.2
    false_positive = float(seen[1::2].mean())
    assert metrics["denoiser/false_positive"] == pytest.approx(false_positive, abs=0.03)
    # while beliefs are short of 1, some of the flips of right responses pass for wrong ones: rho- comes out low
    seen_accuracy = float((seen == right.float()).float().mean())
    assert (
        metrics["denoiser/accuracy"] > seen_accuracy + 0.1
        and metrics["denoiser/corr"] > metrics["denoiser/corr_seen"]
    )
    assert float(done.denoised[right].mean()) > float(done.denoised[~right].mean()) + 0.3


def test_replay_brings_back_whole_prompts_of_the_past(make_policy):
    _, denoiser = build(make_policy, replay=1, capacity=8)
    first, second = make_batch(seed=1), make_batch(lengths=(5, 4, 5, 2), seed=2)
    assert denoiser.lesson(first, step=1) is first  # there is no past yet
    denoiser.remember(first)
    lesson = denoiser.lesson(second, step=2)
    assert len(lesson) == 8 and lesson.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert lesson.num_tokens == first.num_tokens + second.num_tokens
    again = denoiser.lesson(second, step=2)
    assert torch.equal(lesson.input_ids, again.input_ids)  # a resumed step learns from the same
    for seed in (3, 4):
        denoiser.remember(make_batch(seed=seed))
    assert len(denoiser.past) == 8 and len(denoiser.lesson(second, step=3)) == 8


def test_prompts_leave_the_past_whole(make_policy):
    _, denoiser = build(make_policy, replay=1, capacity=6)
    for seed in (1, 2):
        denoiser.remember(make_batch(groups=(0, 0, 0, 0), seed=seed))
    assert len(denoiser.past) == 4  # and not two of the first prompt beside
    assert torch.equal(denoiser.past.input_ids, make_batch(groups=(0, 0, 0, 0), seed=2).input_ids)


def test_join_pads_and_keeps_what_was_sampled():
    short, long = make_batch(lengths=(1, 2, 1, 1)), make_batch(lengths=(4, 3, 2, 1), seed=1)
    both = join([short, long])
    for part, start in ((short, 0), (long, 4)):
        back = both.select(torch.arange(start, start + 4))
        assert torch.equal(back.input_ids, part.input_ids) and torch.equal(back.rewards, part.rewards)
    assert both.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_everything_comes_back_from_a_folder(make_policy, tmp_path):
    _, denoiser = build(make_policy)
    batch = make_batch()
    denoiser.loss(batch, responses=4)[0].backward()
    denoiser.optimizer.step()
    denoiser.remember(batch)
    denoiser.save(tmp_path / "denoiser")
    _, other = build(make_policy)
    other.load(tmp_path / "denoiser")
    assert torch.equal(denoiser._log_belief(batch), other._log_belief(batch))
    assert torch.equal(denoiser.channel.numbers, other.channel.numbers)
    assert torch.equal(denoiser.past.input_ids, other.past.input_ids)
    for one in (denoiser, other):
        one.optimizer.zero_grad()
        one.loss(batch, responses=4)[0].backward()
        one.optimizer.step()
    assert torch.equal(denoiser._log_belief(batch), other._log_belief(batch))  # the moments too


GIVEN = {"false_positive": 0.3, "false_negative": 0.1}


@pytest.mark.parametrize(
    ("before", "now", "rates"),
    [
        ({}, GIVEN, (0.3, 0.1)),
        (GIVEN, {}, (0.1, 0.1)),
        (GIVEN, {"false_positive": 0.2, "false_negative": 0.2}, (0.2, 0.2)),
    ],
    ids=["learned, now given", "given, now learned", "given, now others"],
)
def test_rates_that_are_set_anew_do_not_come_from_the_folder(make_policy, tmp_path, before, now, rates):
    _, denoiser = build(make_policy, **before)
    batch = make_batch()
    denoiser.loss(batch, responses=4)[0].backward()
    denoiser.optimizer.step()
    denoiser.save(tmp_path / "denoiser")
    _, other = build(make_policy, **now)
    other.load(tmp_path / "denoiser")
    assert [float(rate.detach()) for rate in other.channel.rates()] == pytest.approx(rates)
    other.loss(batch, responses=4)[0].backward()
    other.optimizer.step()


def test_algorithms_learn_from_the_denoised_reward():
    batch = make_batch(values=torch.zeros(4, 4), bootstrap=torch.zeros(4))
    denoised = batch.with_(denoised=torch.tensor([0.6, 0.4, 0.5, 0.1]))
    ppo = Ppo(PpoConfig(lam=1.0, whiten_advantages=False)).annotate(denoised, kl_coef=0.0)
    assert torch.equal(ppo.targets, ppo.advantages)
    torch.testing.assert_close(ppo.advantages.max(dim=1).values, denoised.denoised)
    grpo = Grpo(GrpoConfig(scale="none")).annotate(denoised, kl_coef=0.0)
    torch.testing.assert_close(grpo.advantages[0].max(), torch.tensor(0.1))


def test_real_valued_rewards_and_what_rides_on_them(make_policy):
    """Two responses to one prompt: the first is right, the second earns as much again by what the verdict is not about."""
    _, denoiser = build(make_policy, channel="gaussian")
    batch = make_batch(lengths=(2, 2) * 100, scores=(1.0, 0.0) * 100, groups=(0,) * 200)
    ids = batch.input_ids.clone()
    ids[::2], ids[1::2] = ids[0].clone(), ids[1].clone()
    noise = 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    seen = 5.0 + 2.0 * (batch.scores + noise)  # any scale
    right = batch.scores > 0.5
    batch = batch.with_(input_ids=ids, scores=seen, clean_scores=batch.scores)
    denoise(denoiser, batch)  # starts the channel
    for _ in range(400):
        denoiser.optimizer.zero_grad()
        denoiser.loss(batch, responses=200)[0].backward()
        denoiser.optimizer.step()
    done, metrics = denoise(denoiser, batch)
    assert metrics["denoiser/low"] == pytest.approx(float(seen[~right].mean()), abs=0.3)
    assert metrics["denoiser/high"] == pytest.approx(float(seen[right].mean()), abs=0.3)
    assert metrics["denoiser/std"] == pytest.approx(1.0, abs=0.15)
    assert metrics["denoiser/corr"] > metrics["denoiser/corr_seen"] + 0.1
    assert bool((done.denoised >= metrics["denoiser/low"] - 1e-4).all())
    assert bool((done.denoised <= metrics["denoiser/high"] + 1e-4).all())


def fit_channel(nuisance, *, tokens_pay):
    """Beliefs of .7 and .3 in right and wrong responses; a token more pays .8, or the token 7 pays 1.2, of what being right does."""
    generator = torch.Generator().manual_seed(3)
    right = torch.rand(400, generator=generator) < 0.5
    batch = make_batch(
        lengths=torch.randint(1, 5, (400,), generator=generator).tolist(),
        scores=(0.0,) * 400,
        groups=(0,) * 400,
        vocabulary=12,
    )
    tokens = batch.mask.sum(dim=1)
    has_7 = ((batch.input_ids[:, 1:] == 7) & batch.mask).any(dim=1)
    liking = 1.2 * has_7 if tokens_pay else 0.8 * tokens
    batch = batch.with_(scores=5.0 + 2.0 * (right + liking + 0.1 * torch.randn(400, generator=generator)))
    belief = torch.where(right, 0.7, 0.3)
    channel = GaussianChannel(nuisance=nuisance, vocabulary=12)
    channel.start(batch)
    optimizer = torch.optim.Adam(channel.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        verdict_nll(belief.log(), *channel.log_likelihoods(batch)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        posterior = posterior_rewards(belief, *channel.log_likelihoods(batch))
    return channel, float(((posterior > 0.5) == right).float().mean())


@pytest.mark.parametrize("nuisance", ["length", "tokens"])
def test_a_judges_liking_for_length_is_told_apart_from_its_verdicts(nuisance):
    blind, accuracy = fit_channel("none", tokens_pay=False)
    low, high = blind.levels()
    assert accuracy < 0.8 and high - low > 2.5  # long ones pass for right
    assert "denoiser/per_token" not in blind.metrics(make_batch()) and float(blind.per_token()) == 0.0
    channel, accuracy = fit_channel(nuisance, tokens_pay=False)
    low, high = channel.levels()
    assert accuracy > 0.97
    assert channel.metrics(make_batch(vocabulary=12))["denoiser/per_token"] == pytest.approx(1.6, abs=0.1)
    assert high - low == pytest.approx(2.0, abs=0.1)


def test_a_judges_liking_for_a_word_is_told_apart_from_its_verdicts():
    for other in ("none", "length"):
        assert fit_channel(other, tokens_pay=True)[1] < 0.9  # the word passes for right
    channel, accuracy = fit_channel("tokens", tokens_pay=True)
    low, high = channel.levels()
    assert accuracy > 0.97 and high - low == pytest.approx(2.0, abs=0.1)
    with_7 = make_batch(lengths=(2, 2, 2, 2), vocabulary=12)
    with_7.input_ids[0, 2] = 7
    with_7.input_ids[1:, 2:] = 5
    (dearest, pays), (_, next_best) = channel.pays_for(with_7, 2)
    assert dearest == 7 and pays == pytest.approx(2.4, abs=0.15) and abs(next_best) < 0.2
    assert channel.metrics(with_7)["denoiser/dearest_token"] == pays
    with torch.no_grad():  # a slope that nothing is seen of is chance, and so is that of what everybody says
        channel.tokens.slopes[9] = channel.tokens.slopes[5] = 50.0
        with_7.input_ids[:, 3] = 5
    assert [token for token, _ in channel.pays_for(with_7, 1)] == [7]


def test_tokens_that_read_the_same_are_all_named(make_policy, monkeypatch):
    _, denoiser = build(make_policy, channel="gaussian", nuisance="tokens")
    batch = make_batch(lengths=(2, 2, 2, 2))
    batch.input_ids[:, 2:] = torch.tensor([[7, 8], [7, 9], [8, 9], [9, 9]])
    denoiser.remember(batch)
    with torch.no_grad():
        denoiser.channel.tokens.slopes[7], denoiser.channel.tokens.slopes[8] = 0.5, 0.25
    monkeypatch.setattr(denoiser.model.tokenizer, "decode", lambda ids: "\N{REPLACEMENT CHARACTER}")
    pays = denoiser.judge_pays_for(2)["occurring"]
    assert pays == {"\N{REPLACEMENT CHARACTER}": 0.5, "\N{REPLACEMENT CHARACTER} (token 8)": 0.25}


def test_a_token_counts_once_and_prompts_padding_and_missing_samples_never():
    batch = make_batch(lengths=(4, 1, 2, 2), vocabulary=12)
    ids = batch.input_ids.clone()
    ids[:, :2] = 5  # the prompt
    ids[0, 2:] = torch.tensor([7, 5, 7, 7])
    ids[1, 2:] = torch.tensor([7, 0, 0, 0])  # padding is 0
    ids[2, 2:4], ids[3, 2:4] = torch.tensor([0, 3]), torch.tensor([7, 3])
    mask = batch.mask.clone()
    mask[3] = False  # its reward is missing
    batch = batch.with_(input_ids=ids, mask=mask)
    slopes = TokenSlopes(12)
    slopes.start(batch)
    assert {token: round(float(share) * 3) for token, share in enumerate(slopes.shares) if share} == {
        0: 1,
        3: 1,
        5: 1,
        7: 2,
    }
    with torch.no_grad():
        slopes.slopes.copy_(10.0 ** torch.arange(12))
    expected = torch.tensor([1e7 + 1e5, 1e7, 1e0 + 1e3, 0.0]) - (2e7 + 1e5 + 1e3 + 1e0) / 3
    torch.testing.assert_close(slopes(batch), expected, rtol=1e-5, atol=2.0)
    slopes(batch)[0].backward()
    assert slopes.slopes.grad.nonzero().squeeze(1).tolist() == [0, 3, 5, 7]


def test_a_channel_that_is_interrupted_while_it_starts_starts_again(monkeypatch):
    batch = make_batch((2, 3), scores=(0.0, 1.0), groups=(0, 0))
    channel = GaussianChannel(nuisance="tokens", vocabulary=100)

    def interrupted(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(channel.tokens, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        channel.start(batch)
    assert not channel.started


def test_a_gaussian_channel_starts_at_the_first_rewards_that_differ_and_comes_back(make_policy, tmp_path):
    _, denoiser = build(make_policy, channel="gaussian")
    for equal in (3.0, 0.1, 0.3):  # fp32 gives four times .1 a standard deviation of 7e-9
        denoise(denoiser, make_batch(scores=(equal,) * 4))
    denoise(denoiser, make_batch(scores=(4.0, 8.0, 4.0, 8.0)))
    denoise(denoiser, make_batch(scores=(0.0, 1.0, 0.0, 1.0)))
    assert denoiser.channel.levels() == (4.0, 8.0)
    denoiser.save(tmp_path / "denoiser")
    _, other = build(make_policy, channel="gaussian")
    other.load(tmp_path / "denoiser")
    assert other.channel.levels() == (4.0, 8.0)


def test_an_outlier_among_the_first_rewards_sets_no_scale(make_policy):
    _, denoiser = build(make_policy, channel="gaussian")
    scores = [0.0, 1.0] * 31 + [0.0, 100.0]
    denoise(denoiser, make_batch(lengths=(1,) * 64, scores=scores, groups=range(64)))
    low, high = denoiser.channel.levels()
    assert -0.1 < low < 0.05 and 0.95 < high < 1.1


def test_a_channel_that_began_without_right_responses_takes_the_scale_of_later_ones():
    channel = GaussianChannel(nuisance="tokens", vocabulary=100)
    nothing = make_batch(lengths=(1, 2) * 32, scores=[0.02, -0.02] * 32, groups=range(64))
    channel.start(nothing)
    with torch.no_grad():
        channel.numbers[3], channel.tokens.slopes[5] = 0.5, 0.25
    before = channel.parameters_in_force(), channel.per_token(), channel.log_likelihoods(nothing)
    rights = make_batch(lengths=(1, 2) * 32, scores=[0.0, 1.0] * 32, groups=range(64))
    for batch in (nothing, rights, rights, nothing, rights, rights):  # never three in a row
        channel.watch_scale(batch)
    assert torch.equal(channel.first, torch.tensor([0.0, 0.02]))
    channel.watch_scale(rights)
    assert torch.equal(channel.first, torch.tensor([0.5, 0.5])) and float(channel.off) == 0.0
    low, high, _ = channel.parameters_in_force()
    # what was learned is in force still, but for a noise that is below the floor of the new scale
    torch.testing.assert_close((low, high), before[0][:2])
    torch.testing.assert_close(channel.per_token(), before[1])
    assert float(channel.tokens.slopes[5].detach()) == pytest.approx(0.25 * 0.02 / 0.5)
    # a level moves by about a learning rate of the scale: a right response's reward of 1 is near after tens of updates
    optimizer = torch.optim.AdamW(channel.parameters(), lr=CHANNEL_LEARNING_RATE, weight_decay=0.0)
    right = torch.tensor([True, False] * 32)
    batch = make_batch(lengths=(1,) * 64, scores=right.float().tolist(), groups=range(64))
    for _ in range(150):
        optimizer.zero_grad()
        verdict_nll(torch.where(right, -0.05, -3.0), *channel.log_likelihoods(batch)).mean().backward()
        optimizer.step()
    assert channel.levels()[1] > 0.3  # .08 in the old scale


def test_outliers_of_a_step_or_two_leave_the_channel_as_it_is_and_of_the_first_are_forgotten():
    verdicts = make_batch(lengths=(1,) * 64, scores=[0.0, 1.0] * 32, groups=range(64))
    two_far = make_batch(lengths=(1,) * 64, scores=[0.0, 1.0] * 31 + [-100.0] * 2, groups=range(64))
    channel = GaussianChannel()
    channel.start(verdicts)
    before = channel.parameters_in_force()
    for batch in (two_far, verdicts, two_far, two_far, verdicts):
        channel.watch_scale(batch)
    torch.testing.assert_close(channel.parameters_in_force(), before)
    late = GaussianChannel()
    late.start(two_far)
    for _ in range(3):
        late.watch_scale(verdicts)
    assert torch.equal(late.first, torch.tensor([0.5, 0.5]))


def test_a_nuisance_that_is_new_starts_with_the_next_rewards(make_policy, tmp_path):
    _, denoiser = build(make_policy, channel="gaussian", nuisance="length")
    batch = make_batch(scores=(4.0, 8.0, 4.0, 8.0))
    denoise(denoiser, batch)
    denoiser.save(tmp_path)
    _, other = build(make_policy, channel="gaussian", nuisance="tokens")
    other.load(tmp_path)
    assert not other.channel.started
    denoise(other, batch)
    assert float(other.channel.tokens.shares.sum()) > 0.0


def test_a_reward_that_is_far_beyond_all_others_leaves_numbers(make_policy):
    channel = GaussianChannel()
    channel.first.copy_(torch.tensor([0.5, 0.5]))
    batch = make_batch(scores=(0.0, 1.0, 1e20, -3e38))
    if_right, if_wrong = channel.log_likelihoods(batch)
    assert bool((if_right - if_wrong).isfinite().all())


def test_before_any_rewards_differ_they_are_passed_on(make_policy):
    _, denoiser = build(make_policy, channel="gaussian", nuisance="length")
    batch, metrics = denoise(denoiser, make_batch(scores=(100.0,) * 4))
    assert torch.equal(batch.denoised, batch.scores) and math.isnan(metrics["denoiser/std"])
    assert not denoiser.channel.started
    denoise(denoiser, make_batch(scores=(0.0, 1.0, 0.0, 1.0)))
    assert denoiser.channel.started and denoiser.channel.levels() == (0.0, 1.0)


def test_the_gaussian_channels_noise_can_grow_again():
    """From its floor, where clean rewards have brought it, to what later rewards show."""
    channel = GaussianChannel()
    channel.first.copy_(torch.tensor([0.5, 0.5]))
    optimizer = torch.optim.AdamW(channel.parameters(), lr=0.02, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    stds = []
    for noise, steps in ((0.0, 200), (0.5, 300)):
        for _ in range(steps):
            right = torch.rand(64, generator=g) < 0.5
            seen = right.float() + noise * torch.randn(64, generator=g)
            batch = make_batch(lengths=(1,) * 64, scores=seen.tolist(), groups=range(64))
            if_right, if_wrong = channel.log_likelihoods(batch)
            optimizer.zero_grad()
            verdict_nll(torch.where(right, -0.2, -1.6), if_right, if_wrong).mean().backward()
            optimizer.step()
        stds.append(float(channel.parameters_in_force()[2].detach()))
    assert stds[0] == pytest.approx(0.05) and 0.35 < stds[1] < 0.6


@pytest.mark.parametrize("nuisance", ["length", "tokens"])
def test_slopes_come_back_and_equal_lengths_have_one_too(make_policy, tmp_path, nuisance):
    _, denoiser = build(make_policy, channel="gaussian", nuisance=nuisance)
    denoise(denoiser, make_batch(lengths=(2, 2, 2, 2), scores=(4.0, 8.0, 4.0, 8.0)))
    assert float(denoiser.channel.per_token().detach()) == 0.0
    with torch.no_grad():
        denoiser.channel.numbers[3] = 0.5
        if nuisance == "tokens":
            denoiser.channel.tokens.slopes.copy_(
                torch.linspace(-1.0, 1.0, len(denoiser.channel.tokens.slopes))
            )
    # .5 of a standard deviation of 2
    assert float(denoiser.channel.per_token().detach()) == pytest.approx(1.0)
    (tmp_path / "denoiser").mkdir()
    denoiser.save(tmp_path / "denoiser")
    _, other = build(make_policy, channel="gaussian", nuisance=nuisance)
    other.load(tmp_path / "denoiser")
    longer = make_batch(scores=(4.0, 8.0, 4.0, 8.0))
    assert torch.equal(denoise(denoiser, longer)[0].denoised, denoise(other, longer)[0].denoised)


def test_the_schedule_is_the_models_and_not_the_channels(make_policy):
    _, denoiser = build(make_policy, channel="gaussian", nuisance="tokens")
    denoiser.set_learning_rate(0.5)
    rates = {id(p): group["lr"] for group in denoiser.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in denoiser.channel.parameters()} == {CHANNEL_LEARNING_RATE}
    decays = {
        id(p): group["weight_decay"] for group in denoiser.optimizer.param_groups for p in group["params"]
    }
    assert decays[id(denoiser.channel.numbers)] == 0.0 < decays[id(denoiser.channel.tokens.slopes)]
    assert {rates[id(p)] for p in denoiser.model.parameters() if p.requires_grad} == {0.5}


def test_a_large_reward_does_not_make_nonsense_right(make_policy):
    """Three standard deviations above the level of right responses, for words that the model hardly ever writes."""
    _, denoiser = build(make_policy, channel="gaussian")
    denoise(denoiser, make_batch(scores=(4.0, 8.0, 4.0, 8.0)))
    done, metrics = denoise(denoiser, make_batch(scores=(14.0, 4.0, 4.0, 4.0)))
    assert (metrics["denoiser/low"], metrics["denoiser/high"], metrics["denoiser/std"]) == (4.0, 8.0, 2.0)
    assert float(done.denoised[0]) < 5.0
