"""What a run reports: clean evaluation, live noise rates, and the critic's evidence, each by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.batches import make_batch
from vrpo.algorithms import Ppo
from vrpo.config.learning import PpoConfig
from vrpo.config.rewards import RewardsConfig
from vrpo.errors import RewardError
from vrpo.rewards import build_rewards
from vrpo.train.evaluate import evaluate
from vrpo.train.metrics import critic_metrics, mean_kl, policy_metrics, reward_metrics, rollout_metrics
from vrpo.train.update import UpdateStats
from vrpo.types import Prompt, Rollout


def rollout(index: int, completion: str, *, logp: float = -0.5, sampled: float = -0.5) -> Rollout:
    columns = {"answer": "46"}
    prompt = Prompt(prompt_id=f"eval/{index}", prompt="12+34=", token_ids=np.array([3, 4]), columns=columns)
    return Rollout(
        sample_id=f"s0/p{index}/k0",
        prompt=prompt,
        token_ids=np.array([3, 4, 5, 2]),
        action_mask=np.array([False, False, True, True]),
        logprobs=np.array([0, 0, sampled, sampled], dtype=np.float32),
        policy_logprobs=np.array([0, 0, logp, logp], dtype=np.float32),
        completion=completion,
        stop="eos",
        policy_version=0,
    )


class Scripted:
    """An engine that answers every prompt rightly when greedy, and the first one only when it samples."""

    def generate(self, prompts, *, num_generations, step, policy_version, greedy=False, stream="sample"):
        return [
            rollout(i, "46" if greedy or i == 0 else "47")
            for i in range(len(prompts))
            for _ in range(num_generations)
        ]


def inverted():
    """Rewards whose noise shows every verdict upside down."""
    noise = {"type": "adversarial", "false_positive": 1.0, "false_negative": 1.0}
    return build_rewards(RewardsConfig(functions=[{"type": "exact"}], noise=noise), seed=0)


def test_evaluation_never_sees_the_noise():
    rollouts = [rollout(0, "46"), rollout(1, "47")]
    assert [s.reward for s in inverted().score(rollouts, step=1)] == [0.0, 1.0]
    prompts = [rollout(i, "").prompt for i in range(4)]
    result = evaluate(Scripted(), inverted(), prompts, samples=3, step=0, policy_version=0)
    assert (result.greedy, result.sampled, result.prompts, result.samples) == (1.0, 0.25, 4, 3)
    assert result.entropy == 0.5  # nats a token: two of -0.5 in every response


def test_missing_rewards_of_the_denoisers_model_are_counted_and_end_nothing():
    class Mute(Scripted):
        def generate(self, prompts, **settings):
            return [replace(r, completion="") for r in super().generate(prompts, **settings)]

    def judge(prompts, completions, **columns):
        return [float(c == "46") if c else None for c in completions]

    prompts = [rollout(i, "").prompt for i in range(4)]
    rewards = build_rewards(RewardsConfig(), seed=0, extra_functions=[judge])
    settings = {"samples": 3, "step": 0, "policy_version": 0}
    result = evaluate(Scripted(), rewards, prompts, **settings, believer=Scripted())
    assert (result.denoiser_greedy, result.missing) == (1.0, 0)
    result = evaluate(Scripted(), rewards, prompts, **settings, believer=Mute())
    assert (result.greedy, result.denoiser_greedy, result.missing) == (1.0, None, 4)
    told = r"^no completion has a clean reward by rewards\.functions: of 4, judge has none for 4; hold out rows that have a verdict$"
    with pytest.raises(RewardError, match=told):
        evaluate(Mute(), rewards, prompts, **settings)
    both = build_rewards(
        RewardsConfig(), seed=0, extra_functions=[judge, lambda prompts: [1.0] * len(prompts)]
    )
    with pytest.raises(RewardError, match=r"set rewards\.combine to answered"):
        evaluate(Mute(), both, prompts, **settings)


def noisy_batch():
    # clean 1 1 0 0 0, seen 1 0 1 0 0: one of two successes and one of three failures are seen wrongly
    batch = make_batch((2,) * 5, scores=(1.0, 0.0, 1.0, 0.0, 0.0), groups=(0, 0, 1, 1, 1))
    return batch.with_(clean_scores=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))


def test_live_rates_and_rewards_by_hand():
    metrics = reward_metrics(noisy_batch(), kl_coef=0.0, belief_coef=0.0)
    assert metrics["noise/false_positive"] == pytest.approx(1 / 3)
    assert metrics["noise/false_negative"] == pytest.approx(1 / 2)
    assert metrics["noise/informativeness"] == pytest.approx(1 / 6)
    assert metrics["noise/seen_accuracy"] == pytest.approx(3 / 5)
    assert (metrics["objective/scores"], metrics["objective/scores_clean"]) == pytest.approx((2 / 5, 2 / 5))
    # both groups are mixed as seen; neither is in truth: noise makes dead groups look alive
    assert (metrics["noise/frac_zero_std_seen"], metrics["noise/frac_zero_std_clean"]) == (0.0, 1.0)


def test_the_false_negative_rate_is_the_share_of_successes_that_were_not_seen():
    batch = make_batch((1,) * 4, scores=(1.0, 1.0, 0.0, 0.0), groups=(0, 0, 1, 1))
    metrics = reward_metrics(
        batch.with_(clean_scores=torch.tensor([1.0, 1.0, 1.0, 0.0])), kl_coef=0.0, belief_coef=0.0
    )
    assert metrics["noise/false_negative"] == pytest.approx(1 / 3)
    assert metrics["noise/false_positive"] == 0.0


def below(batch, nats):
    """Log-probabilities `nats` a token under the sampler's, anything where nothing was sampled."""
    return torch.where(batch.mask, batch.old_logp - nats, 7.0)


def test_kl_is_a_sum_per_response_and_is_subtracted():
    batch = noisy_batch()  # of 2 tokens each
    metrics = reward_metrics(batch.with_(ref_logp=below(batch, 0.25)), kl_coef=0.1, belief_coef=0.3)
    assert metrics["objective/kl"] == pytest.approx(0.5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.05)
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.35)


def test_the_kl_to_the_denoisers_model_is_subtracted_too():
    batch = noisy_batch()
    batch = batch.with_(ref_logp=below(batch, 0.25), belief_logp=below(batch, 0.5))
    metrics = reward_metrics(batch, kl_coef=0.1, belief_coef=0.3)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.05 - 0.3)
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.4 - 0.35)
    assert "objective/kl" not in reward_metrics(
        batch.with_(ref_logp=None), kl_coef=0.1, belief_coef=0.3
    )  # that is the reference's alone


def valued(columns):
    """The noisy batch with V given per response at its first and last token; targets are the seen outcomes."""
    batch = noisy_batch()
    values = torch.zeros_like(batch.old_logp)
    values[batch.mask] = torch.tensor(columns).flatten()
    return batch.with_(values=values, targets=torch.where(batch.mask, batch.scores[:, None], 0.0))


def test_a_critic_that_knows_the_truth_and_not_the_noise():
    # V = .5 on successes, .25 on failures, at both tokens
    metrics = critic_metrics(valued([[0.5, 0.5], [0.5, 0.5], [0.25, 0.25], [0.25, 0.25], [0.25, 0.25]]))
    # clean: R - V = .5 .5 -.25 -.25 -.25, variance .75^2 * .24 = .135; Var(R) = .24
    assert metrics["val/explained_var_clean"] == pytest.approx(1 - 0.135 / 0.24, abs=1e-5)
    # seen: R - V = .5 -.5 .75 -.25 -.25: mean .05, mean square .2375; Var(R) = .24
    assert metrics["val/explained_var"] == pytest.approx(1 - (0.2375 - 0.0025) / 0.24, abs=1e-5)
    assert metrics["val/bias"] == pytest.approx(-0.05, abs=1e-6)
    assert metrics["val/mean"] == pytest.approx(0.35) and metrics["val/return_mean"] == pytest.approx(0.4)
    # seen levels: 1/3 on failures, 1/2 on successes; V = .5 is above the midpoint 5/12, .25 below: all verdicts right
    assert metrics["val/verdict_accuracy"] == 1.0
    assert math.isnan(metrics["val/sibling_accuracy"])  # no group holds both a success and a failure


def test_gold_verdicts_are_put_into_the_units_of_the_rewards():
    # V in percent, rewards of 0 and 100: what a critic of 0/1 rewards knows, it knows
    columns = [[0.5, 0.5], [0.5, 0.5], [0.25, 0.25], [0.25, 0.25], [0.25, 0.25]]
    percent = valued([[100 * v for v in pair] for pair in columns])
    percent = percent.with_(scores=100 * percent.scores, targets=100 * percent.targets)
    metrics = critic_metrics(percent, has_gold=True)
    # the mean reward of a success is 50, of a failure 100/3: R - V = 0 and 100/12, twice 100/12 in the spread of R
    level = 100 / 3 - 25
    assert metrics["val/explained_var_clean"] == pytest.approx(
        1 - (0.24 * level**2) / (0.24 * (50 - 100 / 3) ** 2), abs=1e-5
    )
    assert "val/calibration" not in metrics and metrics["val/verdict_accuracy"] == 1.0
    # without gold the clean reward has the units of the seen one by definition
    assert "val/calibration" in critic_metrics(percent)
    # and 0/1 rewards beside gold are left as they are
    assert critic_metrics(valued(columns), has_gold=True) == pytest.approx(
        critic_metrics(valued(columns)), nan_ok=True
    )


def test_auc_is_read_at_the_start_the_middle_and_the_end():
    batch = make_batch((3, 3), scores=(1.0, 0.0), groups=(0, 0))
    values = torch.zeros_like(batch.old_logp)
    # start: the failure is valued higher; middle: a tie; end: the success is valued higher
    values[batch.mask] = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.5, 0.0])
    metrics = critic_metrics(batch.with_(values=values, targets=batch.rewards))
    assert [metrics[f"val/auc_{place}"] for place in ("start", "middle", "end")] == [0.0, 0.5, 1.0]
    assert (metrics["val/sibling_accuracy"], metrics["val/calibration"]) == (1.0, 0.0)


def test_responses_by_hand():
    cut = 0.5  # top-p kept half of the mass: sampled log-probability is higher by log 2
    scored = inverted().score_clean(
        [rollout(0, "46", logp=-1.0, sampled=-1.0 - math.log(cut)), rollout(1, "47", logp=-1.0, sampled=-1.0)]
    )
    metrics = rollout_metrics(scored)
    assert metrics["sampling/kept_mass"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["objective/entropy"] == pytest.approx(2.0)  # two tokens of one nat
    assert metrics["policy/perplexity"] == pytest.approx(math.e)
    assert metrics["completions/mean_length"] == 2.0 and metrics["val/num_eos_tokens"] == 2.0
    assert (
        metrics["rewards/exact/mean"],
        metrics["completions/truncated_frac"],
        metrics["rewards/missing"],
    ) == (0.5, 0.0, 0.0)


def test_perplexity_is_over_tokens_and_cannot_overflow():
    scored = inverted().score_clean([rollout(0, "46", logp=-1.0), rollout(1, "47", logp=-3.0)])
    assert rollout_metrics(scored)["policy/perplexity"] == pytest.approx(math.exp(2.0))
    impossible = inverted().score_clean([rollout(0, "46", logp=-1e4)])
    assert math.isfinite(rollout_metrics(impossible)["policy/perplexity"])


def test_errors_are_counted_by_kind_once_a_response():
    scored = inverted().score_clean([rollout(i, "46") for i in range(3)])
    lines = [("f: timeout: 2 s", "g: timeout: 2 s"), ("f: timeout: 2 s", "g: raised: ValueError"), ()]
    metrics = rollout_metrics([replace(s, errors=e) for s, e in zip(scored, lines, strict=True)])
    kinds = {name: x for name, x in metrics.items() if name.startswith("rewards/errors")}
    assert kinds == {"rewards/errors": 2.0, "rewards/errors/raised": 1.0, "rewards/errors/timeout": 2.0}


def test_the_spread_of_the_seen_reward_and_groups_of_one():
    batch = make_batch((1,) * 4, scores=(1.0, 0.0, 0.0, 0.0), groups=(0, 1, 2, 3))
    metrics = reward_metrics(batch, kl_coef=0.0, belief_coef=0.0)
    assert metrics["objective/scores_std"] == pytest.approx(math.sqrt(3) / 4)
    # with one response a prompt there is nothing to compare
    assert math.isnan(metrics["noise/frac_zero_std_seen"]) and math.isnan(
        metrics["noise/frac_zero_std_clean"]
    )
    equal = reward_metrics(batch.with_(scores=torch.full((4,), 0.1)), kl_coef=0.0, belief_coef=0.0)
    assert equal["objective/scores_std"] == 0.0
    huge = reward_metrics(
        batch.with_(scores=torch.tensor([3e38, -3e38, 3e38, -3e38])), kl_coef=0.0, belief_coef=0.0
    )
    assert huge["objective/scores_std"] == pytest.approx(3e38)
    none = reward_metrics(batch.with_(valid=torch.zeros(4, dtype=torch.bool)), kl_coef=0.0, belief_coef=0.0)
    assert math.isnan(none["objective/scores_std"])


def test_policy_metrics_from_sums():
    # four tokens: |A| = 1 2 3 4 and H = 2 4 6 8 rise together; ratios 1 1 2 2
    sums = {
        "loss": 2.0,
        "clip_low": 1.0,
        "clip_high": 2.0,
        "approx_kl": 0.4,
        "ratio": 6.0,
        "ratio_sq": 10.0,
        "entropy": 20.0,
        "adv": 10.0,
        "adv_sq": 30.0,
        "entropy_sq": 120.0,
        "adv_entropy": 60.0,
    }
    first = {"approx_kl": 0.0, "ratio": 0.75}
    metrics = policy_metrics(UpdateStats(sums=sums, tokens=4, grad_norms=[1.0, 3.0], first=first))
    assert metrics["policy/corr_advantage_entropy"] == pytest.approx(1.0)
    assert (metrics["val/ratio"], metrics["val/ratio_var"]) == pytest.approx((1.5, 0.25))
    assert (
        metrics["policy/clipfrac_low"],
        metrics["policy/clipfrac_high"],
        metrics["policy/clipfrac_avg"],
    ) == (0.25, 0.5, 0.75)
    assert (metrics["policy/grad_norm"], metrics["sampling/trainer_ratio_error"]) == (2.0, 0.25)
    assert policy_metrics(UpdateStats()) == {}


def test_a_step_without_rewards_has_no_kl():
    """0 would tell a controller that the policy has not moved."""
    batch = make_batch()
    other = batch.old_logp - 0.5 * batch.mask
    assert mean_kl(batch, other) == pytest.approx(0.5 * float(batch.mask.sum(dim=1).float().mean()))
    silent = batch.with_(mask=torch.zeros_like(batch.mask))
    assert math.isnan(mean_kl(silent, other))
    steered = Ppo(PpoConfig(kl_coef=0.05, kl_target=6.0))
    assert steered.next_kl_coef(0.05, kl=mean_kl(silent, other), responses=0) == 0.05
