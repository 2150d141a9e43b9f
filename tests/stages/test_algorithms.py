"""PPO and GRPO: advantages worked by hand, truncation rules, and what reaches the loss."""

import math

import pytest
import torch
from pydantic import ValidationError

from tests.batches import make_batch
from vrpo.algorithms import Grpo, Ppo, build_algorithm
from vrpo.algorithms.base import read_sums
from vrpo.config.learning import GrpoConfig, PpoConfig
from vrpo.functional import kl_estimate
from vrpo.train.metrics import critic_metrics


def valued(lengths=(3,), scores=(1.0,), values=((0.0, 0.5, 0.6, 0.8),), bootstrap=(0.9,), **changes):
    return make_batch(
        lengths,
        scores=scores,
        groups=range(len(lengths)),
        values=torch.tensor(values),
        bootstrap=torch.tensor(bootstrap),
        **changes,
    )


def annotate(batch, explained_var=None, **settings):
    config = PpoConfig(**{"whiten_advantages": False, "lam": 0.5} | settings)
    return Ppo(config).annotate(batch, kl_coef=config.kl_coef, explained_var=explained_var)


def test_ppo_by_hand():
    # r = [0, 0, 1], v = [.5, .6, .8], ends: A_2 = 1 - .8 = .2; A_1 = (.8 - .6) + .5 * .2 = .3; A_0 = (.6 - .5) + .5 * .3 = .25
    done = annotate(valued())
    torch.testing.assert_close(done.advantages, torch.tensor([[0.0, 0.25, 0.3, 0.2]]))
    torch.testing.assert_close(done.targets, torch.tensor([[0.0, 1.0, 1.0, 1.0]]))  # lam_value 1: the outcome


def test_decoupled_lambda_moves_targets_alone():
    done = annotate(valued(), lam_value=0.0)
    torch.testing.assert_close(done.advantages, torch.tensor([[0.0, 0.25, 0.3, 0.2]]))
    torch.testing.assert_close(done.targets, torch.tensor([[0.0, 0.6, 0.8, 1.0]]))  # r + V of the next state


def test_truncation_rules():
    cut = torch.tensor([True])
    terminal = annotate(valued(truncated=cut))
    bootstrap = annotate(valued(truncated=cut), truncation="bootstrap")
    # the last delta gains V after the last token: A_2 = 1 + .9 - .8 = 1.1
    assert terminal.advantages[0, 3] == pytest.approx(0.2)
    assert bootstrap.advantages[0, 3] == pytest.approx(1.1)
    ended = annotate(valued(), truncation="bootstrap")
    torch.testing.assert_close(ended.advantages, terminal.advantages)


def test_length_adaptive_lambda_replaces_lambda():
    # alpha = .5, length 3: lam = 1 - 1 / 1.5 = 1/3; A_0 = .1 + (.2 + .2 / 3) / 3
    done = annotate(valued(), length_adaptive_alpha=0.5)
    assert done.advantages[0, 1] == pytest.approx(0.1 + (0.2 + 0.2 / 3) / 3)


def judged(values):
    """Two responses of one token, paid 1 and 0, with these values before them."""
    return make_batch(
        (1, 1),
        prompt=1,
        scores=(1.0, 0.0),
        groups=(0, 1),
        values=torch.tensor(values)[:, None],
        bootstrap=torch.zeros(2),
    )


@pytest.mark.parametrize(
    ("values", "trust", "expected"),
    [
        ((0.1, 0.9), "full", (0.9, -0.9)),
        ((0.1, 0.9), "gate", (0.5, -0.5)),  # EV = 1 - .81 / .25 < 0: the mean return is the baseline
        ((0.7, 0.3), "gate", (0.3, -0.3)),  # EV = 1 - .09 / .25 = .64 > 0
        ((0.1, 0.9), "soft", (0.5, -0.5)),
        ((0.7, 0.3), "soft", (1 - (0.64 * 0.7 + 0.36 * 0.5), -(0.64 * 0.3 + 0.36 * 0.5))),
    ],
)
def test_a_critic_is_trusted_as_far_as_it_explains(values, trust, expected):
    done = annotate(judged(values), critic_trust=trust)
    assert done.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert done.targets[:, 0].tolist() == [1.0, 0.0]  # what the critic learns does not change


def test_trust_follows_the_steps_before():
    """EV = .64 in this step; -2 or 1 before it."""
    gated = annotate(judged((0.7, 0.3)), explained_var=-2.0, critic_trust="gate")  # .8 * -2 + .2 * .64 < 0
    assert gated.advantages[:, 0].tolist() == pytest.approx((0.5, -0.5))
    trust = 0.8 + 0.2 * 0.64
    soft = annotate(judged((0.7, 0.3)), explained_var=1.0, critic_trust="soft")
    assert soft.advantages[0, 0] == pytest.approx(1 - (trust * 0.7 + (1 - trust) * 0.5), abs=1e-6)


def test_lambda_is_1_without_trust():
    # EV < 0: the reward reaches the first token in full although lam = .5
    batch = valued(
        lengths=(2, 2), scores=(1.0, 0.0), values=((0.0, 0.0, 0.0), (0.0, 1.0, 1.0)), bootstrap=(0.0, 0.0)
    )
    done = annotate(batch, critic_trust="gate")
    torch.testing.assert_close(done.advantages, torch.tensor([[0.0, 0.5, 0.5], [0.0, -0.5, -0.5]]))


def test_without_spread_nothing_is_trusted_and_nothing_is_learned():
    done = annotate(judged((0.3, 0.7)).with_(rewards=torch.zeros(2, 1)), critic_trust="soft")
    assert torch.equal(done.advantages, torch.zeros(2, 1))


@pytest.mark.parametrize("trust", ["gate", "soft"])
def test_what_rounding_leaves_of_equal_returns_is_not_whitened(trust):
    """Values that siblings complete differ from the mean return by 1e-8, which whitening would scale to 1."""
    batch = make_batch(
        (1, 1, 1, 1),
        prompt=1,
        scores=(0.3, 0.3, 0.3, 0.3),
        groups=(0, 0, 1, 1),
        values=torch.tensor([0.1, 0.7, 0.4, 0.9])[:, None],
        bootstrap=torch.zeros(4),
        old_logp=torch.tensor([-0.3, -1.1, -0.7, -0.9])[:, None],
    )
    done = annotate(batch, critic_trust=trust, sibling_coverage=True, whiten_advantages=True)
    assert torch.equal(done.advantages, torch.zeros(4, 1))


@pytest.mark.parametrize(
    "settings", [{"critic_trust": "gate"}, {"critic_trust": "soft"}, {"sibling_correction": True}]
)
def test_a_critic_that_is_not_trusted_pays_nothing_for_being_cut(settings):
    """Every reward is 0 and V is .5 everywhere: a cut response ends with that .5, which is no merit."""
    batch = make_batch(
        (1, 1, 1, 1),
        prompt=1,
        scores=(0.0, 0.0, 0.0, 0.0),
        groups=(0, 0, 0, 0),
        values=torch.full((4, 1), 0.5),
        bootstrap=torch.full((4,), 0.5),
        truncated=torch.tensor([True, True, False, False]),
    )
    done = annotate(batch, truncation="bootstrap", **settings)
    torch.testing.assert_close(done.advantages, torch.zeros(4, 1))


def siblings(**settings):
    """Two responses of one token to each of two prompts, paid 1, 0 and 1, 1; V = .5 before all, probabilities 1/2."""
    batch = make_batch(
        (1, 1, 1, 1),
        prompt=1,
        scores=(1.0, 0.0, 1.0, 1.0),
        groups=(0, 0, 1, 1),
        values=torch.full((4, 1), 0.5),
        bootstrap=torch.zeros(4),
    )
    return annotate(batch.with_(old_logp=torch.full((4, 1), 0.5).log()), lam=1.0, **settings)


def test_siblings_correct_the_value_of_their_prompt():
    # e = .5, -.5, .5, .5: means 0 and .5, sigma^2 = .5 / 2 = .25, tau^2 = mean(0 - .125, .25 - .125) = 0
    plain = [0.5, -0.5, 0.5, 0.5]
    assert siblings().advantages[:, 0].tolist() == plain
    assert siblings(sibling_correction=True).advantages[:, 0].tolist() == plain
    # V = .5 where the second prompt pays 5: e = .5, -.5, 4.5, 4.5; tau^2 = mean(-.125, 20.125) = 10, w = 10 / 10.25
    batch = siblings()
    batch = batch.with_(rewards=torch.tensor([[1.0], [0.0], [5.0], [5.0]]))
    done = annotate(batch, lam=1.0, sibling_correction=True)
    w = 10 / 10.25
    assert done.advantages[:, 0].tolist() == pytest.approx(
        [0.5 + 0.5 * w, -0.5 - 0.5 * w, 4.5 - 4.5 * w, 4.5 - 4.5 * w], abs=1e-5
    )
    torch.testing.assert_close(done.targets, batch.rewards)  # what the critic learns does not change


def test_siblings_complete_the_values_with_what_the_policy_would_do():
    done = siblings(sibling_coverage=True)
    assert done.coverage is not None and siblings().coverage is None
    different = bool(done.input_ids[2, 1] != done.input_ids[3, 1])
    # the first prompt: .5 * 1 + .5 * 0; the second: both paid 1, so 1 if they differ, .5 * 1 + .5 * .5 if they are the same
    value = 1.0 if different else 0.75
    assert done.advantages[:, 0].tolist() == pytest.approx([0.5, -0.5, 1 - value, 1 - value])
    assert done.coverage[:, 0].tolist() == [1.0, 1.0] + [1.0 if different else 0.5] * 2
    assert critic_metrics(done)["val/coverage"] == pytest.approx(1.0 if different else 0.75)
    assert "val/coverage" not in critic_metrics(siblings())


def test_values_are_believed_as_far_as_siblings_cover_them():
    """Two responses of two tokens with one beginning; after it the policy goes one way with .5, the other with .25."""
    batch = make_batch(
        (2, 2),
        prompt=1,
        scores=(1.0, 0.0),
        groups=(0, 0),
        values=torch.tensor([[0.3, 0.8], [0.3, 0.8]]),
        bootstrap=torch.zeros(2),
    )
    ids = batch.input_ids.clone()
    ids[:, 1] = ids[0, 1]
    ids[:, 2] = torch.tensor([8, 9])
    batch = batch.with_(input_ids=ids, old_logp=torch.tensor([[0.4, 0.5], [0.4, 0.25]]).log())
    # V' = .5 + .25 * .8 = .7 after the beginning, where .75 is covered, and .2 + .7 * .3 = .41 before it; lambda .2 * .75 + .25
    done = annotate(batch, lam=1.0, lam_covered=0.2, sibling_coverage=True)
    assert done.coverage is not None and done.coverage[0].tolist() == pytest.approx([0.3, 0.75])
    last, first, lam = torch.tensor([0.3, -0.7]), 0.7 - 0.41, 0.2 * 0.75 + 0.25
    torch.testing.assert_close(done.advantages, torch.stack([first + lam * last, last], dim=1))
    # not covered at all, it is lam
    alone = annotate(batch.with_(group_ids=torch.tensor([0, 1]), old_logp=batch.old_logp - 50), lam=0.4,
                     lam_covered=0.0, sibling_coverage=True)  # fmt: skip
    torch.testing.assert_close(alone.advantages, annotate(batch, lam=0.4).advantages)


def test_denoised_rewards_are_what_siblings_tell():
    batch = siblings().with_(denoised=torch.tensor([0.8, 0.2, 0.8, 0.8]))
    done = annotate(batch, lam=1.0, sibling_coverage=True)
    assert done.advantages[:2, 0].tolist() == pytest.approx([0.3, -0.3])


def test_kl_penalty_is_part_of_the_reward():
    batch = valued()
    ref = torch.where(batch.mask, batch.old_logp - 0.5, 0.0)  # k1 = .5 nats a token
    done = annotate(batch.with_(ref_logp=ref), kl_coef=0.1)
    # every r_t falls by .05, so the Monte-Carlo targets fall by .15, .10, .05
    torch.testing.assert_close(done.targets, torch.tensor([[0.0, 0.85, 0.90, 0.95]]))
    assert Ppo(PpoConfig(kl_coef=0.1)).uses_reference and not Ppo(PpoConfig()).uses_reference


def test_a_kl_to_the_belief_is_part_of_the_reward_beside_the_other():
    batch = valued()
    belief = torch.where(batch.mask, batch.old_logp - 0.5, 0.0)
    done = annotate(batch.with_(belief_logp=belief), belief_coef=0.1)
    torch.testing.assert_close(done.targets, torch.tensor([[0.0, 0.85, 0.90, 0.95]]))
    assert not Ppo(PpoConfig(belief_coef=0.1)).uses_reference  # no frozen model for it
    both = annotate(batch.with_(belief_logp=belief, ref_logp=belief), belief_coef=0.1, kl_coef=0.1)
    torch.testing.assert_close(both.targets, torch.tensor([[0.0, 0.70, 0.80, 0.90]]))


def test_the_penalty_follows_the_coefficient_in_force_and_a_target_steers_it():
    batch = valued()
    ref = torch.where(batch.mask, batch.old_logp - 0.5, 0.0)
    rule = Ppo(PpoConfig(kl_coef=0.1, kl_target=2.0, kl_horizon=100, whiten_advantages=False))
    done = rule.annotate(batch.with_(ref_logp=ref), kl_coef=0.2)
    torch.testing.assert_close(done.targets, torch.tensor([[0.0, 0.70, 0.80, 0.90]]))
    # KL 2.2: e = .1, ten responses of a horizon of 100: .2 * (1 + .1 * .1); KL 0: e is cut at -.2
    assert rule.next_kl_coef(0.2, kl=2.2, responses=10) == pytest.approx(0.202)
    assert rule.next_kl_coef(0.2, kl=0.0, responses=10) == pytest.approx(0.196)
    assert rule.next_kl_coef(0.2, kl=9e9, responses=10) == pytest.approx(0.204)
    assert rule.next_kl_coef(0.2, kl=2.0, responses=10) == 0.2
    assert rule.next_kl_coef(0.2, kl=0.0, responses=10_000) == 0.0  # never negative
    assert Ppo(PpoConfig(kl_coef=0.1)).next_kl_coef(0.1, kl=9.0, responses=10) == 0.1
    with pytest.raises(ValueError, match="steers nothing"):
        PpoConfig(kl_target=2.0)


def test_whitening_is_over_the_step():
    batch = valued((3, 2), (1.0, 0.0), ((0.0, 0.5, 0.6, 0.8), (0.0, 0.1, 0.2, 0.0)), (0.0, 0.0))
    done = annotate(batch, whiten_advantages=True)
    chosen = done.advantages[batch.mask]
    assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(chosen.std(correction=0)) == pytest.approx(1.0, abs=0.15)
    assert bool((done.advantages[~batch.mask] == 0).all())


def test_grpo_by_hand():
    # group 0 scores 1, 0: mean .5; group 1 scores 0, 1. scale none: +-.5 on every token
    batch = make_batch()
    done = Grpo(GrpoConfig(scale="none")).annotate(batch, kl_coef=0.0)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5])[:, None] * batch.mask
    torch.testing.assert_close(done.advantages, expected)
    assert done.targets is None


def test_grpo_leaves_missing_samples_out_of_the_group():
    batch = make_batch((1, 1, 1), scores=(1.0, 0.0, 0.0), groups=(0, 0, 0))
    mask = batch.mask.clone()
    mask[2] = False
    done = Grpo(GrpoConfig(scale="none")).annotate(
        batch.with_(mask=mask, valid=torch.tensor([True, True, False])), kl_coef=0.0
    )
    assert done.advantages.sum(dim=1).tolist() == pytest.approx([0.5, -0.5, 0.0])


@pytest.mark.parametrize("rule", [Ppo(PpoConfig()), Grpo(GrpoConfig())], ids=["ppo", "grpo"])
def test_loss_at_the_sampling_weights_is_minus_the_mean_advantage(rule):
    batch = make_batch()
    advantages = torch.where(batch.mask, torch.arange(4.0)[:, None] - 1.0, 0.0)
    batch = batch.with_(advantages=advantages)
    loss, sums = rule.loss(
        batch.old_logp, torch.ones_like(batch.old_logp), batch, num_tokens=batch.num_tokens
    )
    assert float(loss.detach()) == pytest.approx(-float(advantages.sum()) / batch.num_tokens)
    assert sums["ratio"] / batch.num_tokens == pytest.approx(1.0)
    assert sums["clip_low"] == sums["clip_high"] == 0.0
    assert sums["entropy"] == batch.num_tokens


def test_clip_is_asymmetric():
    batch = make_batch((1, 1), scores=(1.0, 1.0), groups=(0, 1))
    for shift, sign, active in (
        (math.log(1.25), 1.0, 0.0),
        (math.log(1.3), 1.0, 1.0),
        (math.log(0.75), -1.0, 1.0),
    ):
        marked = batch.with_(advantages=sign * batch.mask.float())
        _, sums = Ppo(PpoConfig()).loss(
            batch.old_logp + shift, torch.zeros_like(batch.old_logp), marked, num_tokens=2
        )
        assert (sums["clip_low"] + sums["clip_high"]) / 2 == active


def test_grpo_kl_is_in_the_loss():
    batch = make_batch().with_(advantages=torch.zeros(4, 4))
    ref = torch.where(batch.mask, batch.old_logp - 0.5, 0.0)
    rule = Grpo(GrpoConfig(kl_coef=2.0, kl_estimator="k2"))  # d^2 / 2
    loss, sums = rule.loss(
        batch.old_logp, torch.zeros(4, 4), batch.with_(ref_logp=ref), num_tokens=batch.num_tokens
    )
    assert float(loss.detach()) == pytest.approx(2.0 * 0.125)
    assert sums["loss"] / batch.num_tokens == pytest.approx(0.25)
    rule = Grpo(GrpoConfig(kl_coef=2.0, belief_coef=3.0, kl_estimator="k2"))
    logp = batch.old_logp.clone().requires_grad_()
    loss, _ = rule.loss(
        logp,
        torch.zeros(4, 4),
        batch.with_(ref_logp=ref, belief_logp=ref - batch.mask.float()),
        num_tokens=batch.num_tokens,
    )
    assert float(loss.detach()) == pytest.approx(2.0 * 0.125 + 3.0 * 1.125)
    loss.backward()  # the surrogate's is 0
    torch.testing.assert_close(logp.grad, (2.0 * 0.5 + 3.0 * 1.5) * batch.mask.float() / batch.num_tokens)


def test_grpo_has_no_estimator_that_pulls_nowhere():
    """The mean gradient of k1 in a loss is that of a sum of probabilities, which is 0; k2's is the KL's."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], requires_grad=True)
    other = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    (exact,) = torch.autograd.grad((logp.exp() * (logp - other)).sum(), logits, retain_graph=True)
    for kind, expected in (("k1", torch.zeros(4)), ("k2", exact)):
        estimate = kl_estimate(logp, other, kind=kind)
        (found,) = torch.autograd.grad((p * estimate).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValidationError, match="kl_estimator"):
        GrpoConfig(kl_estimator="k1")


def test_distrust_of_the_critic_leaves_lambda_alone_where_siblings_speak():
    """Coverage 1 and lambda 0 there: V has no part in the advantages, so trust in it has none either."""
    batch = make_batch().with_(coverage=torch.ones(4, 4))
    rule = Ppo(PpoConfig(sibling_coverage=True, lam_covered=0.0, lam=0.95))
    assert all((rule._lam(batch, trust) == 0.0).all() for trust in (1.0, 0.5, 0.0))
    half = batch.with_(coverage=torch.full((4, 4), 0.5))
    for trust, lam in ((1.0, 0.95), (0.5, 0.975), (0.0, 1.0)):
        torch.testing.assert_close(rule._lam(half, trust), torch.full((4, 4), 0.5 * lam))


def test_vrpo_is_ppo_with_another_critic():
    assert isinstance(build_algorithm(PpoConfig(type="vrpo")), Ppo)
    assert isinstance(build_algorithm(GrpoConfig()), Grpo)


@pytest.mark.parametrize(
    "build", [lambda c: Ppo(PpoConfig(entropy_coef=c)), lambda c: Grpo(GrpoConfig(entropy_coef=c))]
)
def test_the_entropy_bonus_is_the_mean_entropy_and_takes_a_gradient(build):
    batch = make_batch().with_(advantages=torch.zeros_like(make_batch().old_logp))
    mean = None
    for coefficient in (0.0, 0.5, -0.5):
        entropy = torch.full_like(batch.old_logp, 0.7).requires_grad_()
        loss, sums = build(coefficient).loss(batch.old_logp, entropy, batch, num_tokens=batch.num_tokens)
        # no advantage: the surrogate is 0, and what is left is -coefficient * 0.7 nats
        assert float(loss.detach()) == pytest.approx(-coefficient * 0.7, abs=1e-6)
        assert sums["loss"] == pytest.approx(float(loss.detach()) * batch.num_tokens, abs=1e-5)
        if coefficient:
            loss.backward()
            mean = entropy.grad[batch.mask]
            torch.testing.assert_close(mean, torch.full_like(mean, -coefficient / batch.num_tokens))
    assert mean is not None


def test_sums_are_read_to_the_last_digit():
    """Counts beyond the 24 bits of fp32 and fp32 numbers side by side."""
    tenth = torch.tensor(0.1, requires_grad=True)
    sums = read_sums({"count": torch.tensor(2**24 + 1), "loss": tenth * 3})
    assert sums == {"count": 2.0**24 + 1, "loss": float((tenth * 3).detach())}
