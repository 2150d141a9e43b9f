"""Noise models: rates, streams, what they leave alone, and the facts of the method about them."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stages.data.samples import make_rollout, step_of
from vrpo.config.rewards import (
    AdversarialNoise,
    ExactReward,
    FlipNoise,
    GaussianNoise,
    KeywordBiasNoise,
    LengthBiasNoise,
    MajorityNoise,
    MissingNoise,
    PersistentNoise,
    PromptFlipNoise,
    RewardsConfig,
    SourceNoise,
    WrongLabelNoise,
)
from vrpo.errors import ConfigError, RewardError
from vrpo.functional import group_advantages
from vrpo.rewards import build_rewards, named
from vrpo.rng import stream_uniform
from vrpo.train.pseudo_labels import _reader

FLIP = FlipNoise(false_positive=0.3, false_negative=0.1)
PERSISTENT = PersistentNoise(false_positive=0.3, false_negative=0.1)
SOURCE = SourceNoise(column="answer", rates={"1": FlipNoise(false_positive=0.3, false_negative=0.1)})
WRONG = WrongLabelNoise(rate=0.5)
MAJORITY = MajorityNoise()
PER_SAMPLE = [
    FLIP,
    PromptFlipNoise(rate=0.3),
    PERSISTENT,
    SOURCE,
    WRONG,
    MAJORITY,
    KeywordBiasNoise(phrase="1", bonus=0.5),
    MissingNoise(rate=0.3),
    AdversarialNoise(),
]
EVERY = [*PER_SAMPLE, GaussianNoise(scale=0.5), LengthBiasNoise(coef=0.3)]


class Votes(dict):
    """Every prompt's vote is "0"."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return "0"


def pipeline(*noise, seed=0, labels=None, answers=("0", "1", "2")):
    return build_rewards(
        RewardsConfig(functions=(ExactReward(),), noise=noise, max_failed=1.0),
        seed=seed,
        answers=lambda column: answers,
        labels=Votes() if labels is None else labels,
    )


def seen(scored):
    return [item.reward for item in scored]


def rate(scored, clean):
    """(share of `clean` rewards that were seen inverted, how many there were)."""
    rewards = [item.reward for item in scored if item.clean_reward == clean]
    return sum(reward != clean for reward in rewards) / len(rewards), len(rewards)


def assert_rate(scored, clean, expected):
    share, count = rate(scored, clean)
    # Five standard deviations of a binomial share: a false alarm in two million.
    assert abs(share - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-9) / count)


# --- what every kind leaves alone ---------------------------------------------------------------


@pytest.mark.parametrize("noise", EVERY, ids=lambda n: n.type)
def test_clean_values_order_and_rollouts_are_untouched(noise):
    rollouts = step_of(prompts=20, samples=4)
    clean = pipeline(noise).score_clean(rollouts)
    noisy = pipeline(noise).score(rollouts, step=0)
    assert [item.rollout for item in noisy] == rollouts
    assert (
        [item.clean_reward for item in noisy]
        == [item.clean_reward for item in clean]
        == [1.0, 1.0, 0.0, 0.0] * 20
    )
    assert [item.parts for item in noisy] == [item.parts for item in clean]
    assert seen(noisy) != seen(clean)


@pytest.mark.parametrize("noise", EVERY, ids=lambda n: n.type)
def test_missing_stays_missing(noise):
    rollouts = [make_rollout("1", prompt_index=i, answer="" if i % 3 else "1") for i in range(30)]
    broken = (
        SourceNoise(column="answer", rates={**SOURCE.rates, "": FlipNoise()}) if noise is SOURCE else noise
    )
    scored = pipeline(broken).score(rollouts, step=0)
    assert all(item.reward is None and item.errors for i, item in enumerate(scored) if i % 3)


@pytest.mark.parametrize("noise", PER_SAMPLE, ids=lambda n: n.type)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_a_draw_does_not_depend_on_what_else_is_scored(noise, seed):
    rollouts = step_of(prompts=6, samples=4)
    judge = pipeline(noise, seed=seed)
    whole = {item.rollout.sample_id: item.reward for item in judge.score(rollouts, step=3)}
    part = random.Random(seed).sample(rollouts, 9)
    assert seen(judge.score(part, step=3)) == [whole[rollout.sample_id] for rollout in part]


@pytest.mark.parametrize(
    "noise", [*PER_SAMPLE[:5], MissingNoise(rate=0.3), GaussianNoise(scale=1.0)], ids=lambda n: n.type
)
def test_same_seed_same_noise_other_seed_other_noise(noise):
    rollouts = step_of(prompts=30, samples=4)
    first = seen(pipeline(noise, seed=1).score(rollouts, step=0))
    assert first == seen(pipeline(noise, seed=1).score(rollouts, step=0))
    assert first != seen(pipeline(noise, seed=2).score(rollouts, step=0))


def test_global_random_state_is_untouched():
    # Not Python's `random`: the type checker that tests switch on draws from it.
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for noise in EVERY:
        pipeline(noise).score(step_of(prompts=2, samples=4), step=0)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


# --- flips ----------------------------------------------------------------------------------------


def check_flip_golden(score):
    # u of a sample is the draw named (seed 5, noise, flip, position 0, sample id); a reward is inverted
    # when u < 0.3 (r = 0) or u < 0.1 (r = 1).
    rollouts = step_of(prompts=40, samples=4)
    for item in score(rollouts):
        u = stream_uniform(5, "noise", "flip", 0, item.rollout.sample_id)
        clean = float(item.rollout.completion == "1")
        assert item.reward == (1.0 - clean if u < (0.1 if clean else 0.3) else clean)


def test_flip_golden():
    check_flip_golden(lambda rollouts: pipeline(FLIP, seed=5).score(rollouts, step=0))


@pytest.mark.parametrize(
    "mutant",
    [
        FlipNoise(false_positive=0.1, false_negative=0.3),  # rates exchanged
        FlipNoise(false_positive=0.33, false_negative=0.1),
        FlipNoise(false_positive=0.3, false_negative=0.16),
        PromptFlipNoise(rate=0.3),
        PERSISTENT,
    ],
    ids=lambda n: n.type,
)
def test_flip_golden_can_fail(mutant):
    with pytest.raises(AssertionError):
        check_flip_golden(lambda rollouts: pipeline(mutant, seed=5).score(rollouts, step=0))


@pytest.mark.parametrize("noise", [FLIP, PERSISTENT, SOURCE], ids=lambda n: n.type)
def test_rates_are_what_was_asked_for(noise):
    rollouts = [
        # every completion differs, so that persistent noise draws anew for each
        make_rollout("1" if i % 2 else f"wrong {i}", prompt_index=i, answer="1")
        for i in range(4000)
    ]
    scored = pipeline(noise).score(rollouts, step=0)
    assert_rate(scored, 0.0, 0.3)
    assert_rate(scored, 1.0, 0.1)


@pytest.mark.parametrize(
    ("noise", "low", "high"), [(FlipNoise(), 0.0, 1.0), (FlipNoise(false_positive=0.999), 0.99, 1.0)]
)
def test_extreme_rates(noise, low, high):
    rewards = seen(pipeline(noise).score(step_of(prompts=100, samples=2), step=0))
    assert statistics.mean(rewards[1::2]) >= low and rewards[0::2] == [high] * 100
    assert statistics.mean(rewards[1::2]) <= (0.0 if low == 0.0 else 1.0)


def test_samples_flip_independently_and_steps_too():
    judge = pipeline(FlipNoise(false_positive=0.3, false_negative=0.3))
    first, second = (judge.score(step_of(prompts=200, samples=2, step=s), step=s) for s in (0, 1))
    wrong = [item.reward != item.clean_reward for item in first]
    assert any(a != b for a, b in zip(wrong[0::2], wrong[1::2], strict=True))
    assert wrong != [item.reward != item.clean_reward for item in second]


def test_two_of_a_kind_draw_independently():
    # Two symmetric channels of 0.3: wrong when exactly one of them flips, 2 * 0.3 * 0.7 = 0.42; the same
    # draw twice would give 0.
    noise = FlipNoise(false_positive=0.3, false_negative=0.3)
    scored = pipeline(noise, noise).score(step_of(prompts=1000, samples=2), step=0)
    assert_rate(scored, 0.0, 0.42)


def test_prompt_flip_inverts_whole_groups_and_negates_centred_rewards():
    rollouts = step_of(prompts=400, samples=8)
    scored = pipeline(PromptFlipNoise(rate=0.3)).score(rollouts, step=0)
    ids = torch.arange(400).repeat_interleave(8)
    clean, noisy = (
        group_advantages(torch.tensor([getattr(item, name) for item in scored]), ids, scale="std").reshape(
            400, 8
        )
        for name in ("clean_reward", "reward")
    )
    wrong = torch.tensor([item.reward != item.clean_reward for item in scored]).reshape(400, 8)
    assert torch.equal(wrong.any(dim=1), wrong.all(dim=1))
    sign = torch.where(wrong.any(dim=1, keepdim=True), -1.0, 1.0)
    assert torch.allclose(noisy, sign * clean, atol=1e-6)
    # 400 prompts at 0.3: 120, standard deviation 9.2
    assert abs(int(wrong[:, 0].sum()) - 120) < 46


def test_prompt_flip_draws_anew_each_step():
    judge = pipeline(PromptFlipNoise(rate=0.4))
    rollouts = step_of(prompts=50, samples=2)
    assert seen(judge.score(rollouts, step=0)) != seen(judge.score(rollouts, step=1))


def test_persistent_noise_is_a_function_of_prompt_and_answer():
    noise = PersistentNoise(false_positive=0.4, false_negative=0.4)
    judge = pipeline(noise)
    rollouts = [
        make_rollout(text, prompt_index=p, sample=k, step=s, answer="1")
        for s in range(3)
        for p in range(40)
        for k, text in enumerate(["1", "0", " 1\n", "7", "0"])
    ]
    verdicts = {}
    for item in judge.score(rollouts, step=0):
        key = item.rollout.prompt.prompt_id, item.rollout.completion.strip()
        assert verdicts.setdefault(key, item.reward) == item.reward
    # ... and differs between prompts and between answers
    assert len({verdicts[f"train/{p}", "0"] for p in range(40)}) == 2
    assert any(verdicts[f"train/{p}", "0"] != verdicts[f"train/{p}", "7"] for p in range(40))


def test_source_noise_has_rates_by_source():
    noise = SourceNoise(rates={"dirty": FlipNoise(false_positive=0.4), "clean": FlipNoise()})
    rollouts = [
        make_rollout("0", prompt_index=i, answer="1", source=("dirty", "clean")[i % 2]) for i in range(2000)
    ]
    scored = pipeline(noise).score(rollouts, step=0)
    assert_rate(scored[0::2], 0.0, 0.4)
    assert seen(scored[1::2]) == [0.0] * 1000
    with pytest.raises(RewardError, match=r"source='other', rates are given for \['clean', 'dirty'\]"):
        pipeline(noise).score([make_rollout("0", answer="1", source="other")], step=0)


@pytest.mark.parametrize(
    "noise", [FLIP, PromptFlipNoise(rate=0.1), PERSISTENT, SOURCE, AdversarialNoise()], ids=lambda n: n.type
)
def test_flips_refuse_rewards_that_are_not_0_or_1(noise):
    def half(completions):
        return [0.5] * len(completions)

    judge = build_rewards(RewardsConfig(noise=(noise,)), seed=0, extra_functions=[half])
    with pytest.raises(RewardError, match=f"{noise.type} noise got the reward 0.5 of s0/p0/k0"):
        judge.score([make_rollout("x", answer="1")], step=0)


@pytest.mark.parametrize(
    ("false_positive", "false_negative"), [(0.5, 0.5), (0.7, 0.3), (0.6, 0.8), (1.0, 1.0)]
)
def test_adversarial_noise_informs_not_at_all_or_backwards(false_positive, false_negative):
    noise = AdversarialNoise(false_positive=false_positive, false_negative=false_negative)
    scored = pipeline(noise).score(step_of(prompts=1000, samples=4), step=0)
    # E[r~ | r] = rho+ + J r, so the difference of the means is J: 0 or negative.
    means = [statistics.mean(i.reward for i in scored if i.clean_reward == r) for r in (0.0, 1.0)]
    j = 1 - false_positive - false_negative
    assert j <= 1e-12
    assert abs((means[1] - means[0]) - j) <= 5 * math.sqrt(2 * 0.25 / 2000)


def test_flips_make_dead_groups_look_alive():
    # All wrong, G = 8, rho+ = 0.1: mixed unless no sample flips (all-flipped is negligible), 1 - 0.9^8 = 0.570.
    rollouts = [
        make_rollout("0", prompt_index=p, sample=k, answer="1") for p in range(1000) for k in range(8)
    ]
    rewards = seen(pipeline(FlipNoise(false_positive=0.1)).score(rollouts, step=0))
    mixed = sum(len(set(rewards[8 * p : 8 * p + 8])) == 2 for p in range(1000)) / 1000
    assert abs(mixed - (1 - 0.9**8)) < 5 * math.sqrt(0.57 * 0.43 / 1000)


# --- additive kinds -----------------------------------------------------------------------------------


def test_gaussian_noise_has_the_spread_of_the_clean_rewards():
    # Clean rewards are half 1, half 0: population standard deviation 0.5; scale 0.4 gives 0.2.
    scored = pipeline(GaussianNoise(scale=0.4)).score(step_of(prompts=1000, samples=4), step=0)
    added = [item.reward - item.clean_reward for item in scored]
    assert abs(statistics.mean(added)) < 5 * 0.2 / math.sqrt(4000)
    assert abs(statistics.pstdev(added) / 0.2 - 1) < 5 / math.sqrt(2 * 4000)


def test_gaussian_noise_on_equal_rewards_is_none():
    rollouts = [make_rollout("1", prompt_index=i, answer="1") for i in range(5)]
    assert seen(pipeline(GaussianNoise(scale=1.0)).score(rollouts, step=0)) == [1.0] * 5


def test_length_bias_by_hand():
    # Lengths 1, 2, 3: mean 2, population standard deviation sqrt(2/3) = 0.8165; z = -1.2247, 0, 1.2247.
    rollouts = [make_rollout("1", prompt_index=i, answer="1", num_tokens=i + 1) for i in range(3)]
    rewards = seen(pipeline(LengthBiasNoise(coef=0.5)).score(rollouts, step=0))
    assert rewards == pytest.approx([1 - 0.61237, 1.0, 1 + 0.61237], abs=1e-5)
    equal = [make_rollout("1", prompt_index=i, answer="1") for i in range(3)]
    assert seen(pipeline(LengthBiasNoise(coef=0.5)).score(equal, step=0)) == [1.0] * 3


def test_length_bias_is_taken_over_rewarded_samples():
    rollouts = [make_rollout("1", prompt_index=i, answer="1", num_tokens=i + 1) for i in range(3)]
    rollouts.append(make_rollout("1", prompt_index=3, answer=None, num_tokens=500))
    rewards = seen(pipeline(LengthBiasNoise(coef=0.5)).score(rollouts, step=0))
    assert rewards[3] is None and rewards[1] == 1.0


def test_keyword_bias():
    rollouts = [
        make_rollout(t, prompt_index=i, answer="1") for i, t in enumerate(["1", "I am sure", "i am sure"])
    ]
    assert seen(pipeline(KeywordBiasNoise(phrase="I am", bonus=0.7)).score(rollouts, step=0)) == [
        1.0,
        0.7,
        0.0,
    ]


def test_missing_rate_and_missing_is_none():
    scored = pipeline(MissingNoise(rate=0.2)).score(step_of(prompts=1000, samples=4), step=0)
    gone = [item.reward is None for item in scored]
    assert abs(statistics.mean(gone) - 0.2) < 5 * math.sqrt(0.16 / 4000)
    assert all(item.clean_reward is not None for item in scored)
    assert all(item.reward == item.clean_reward for item, lost in zip(scored, gone, strict=True) if not lost)


def test_noises_apply_in_order():
    rollouts = [make_rollout("0 sure", prompt_index=i, answer="1") for i in range(50)]
    flip, bonus = FlipNoise(false_positive=0.5), KeywordBiasNoise(phrase="sure", bonus=0.25)
    assert set(seen(pipeline(flip, bonus).score(rollouts, step=0))) == {0.25, 1.25}
    with pytest.raises(ValueError, match=r"flip noise stands after keyword_bias noise.*put flip first"):
        pipeline(bonus, flip)


# --- label noise ----------------------------------------------------------------------------------------


def test_wrong_label_pays_another_prompts_answer_on_a_fixed_share_of_prompts():
    judge = pipeline(WrongLabelNoise(rate=0.4), answers=("1", "2"))
    rollouts = [
        make_rollout(text, prompt_index=p, sample=k, answer="1")
        for p in range(500)
        for k, text in enumerate("123")
    ]
    scored = judge.score(rollouts, step=0)
    groups = [tuple(seen(scored[3 * p : 3 * p + 3])) for p in range(500)]
    # Right label: "1" pays. Wrong label, which can only be "2": "2" pays. "3" never does.
    assert set(groups) == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)}
    assert abs(groups.count((0.0, 1.0, 0.0)) - 200) < 5 * math.sqrt(500 * 0.24)
    assert seen(scored) == seen(judge.score(rollouts, step=9))
    assert [item.clean_reward for item in scored[:3]] == [1.0, 0.0, 0.0]


def test_wrong_labels_differ_from_the_own_answer_and_among_prompts():
    pool = tuple(str(i) for i in range(10))
    judge = pipeline(WrongLabelNoise(rate=1.0), answers=pool)
    labels = []
    for p in range(60):
        rollouts = [make_rollout(a, prompt_index=p, sample=k, answer=str(p % 10)) for k, a in enumerate(pool)]
        paid = [item.rollout.completion for item in judge.score(rollouts, step=0) if item.reward == 1.0]
        assert len(paid) == 1 and paid[0] != str(p % 10)
        labels.append(paid[0])
    assert len(set(labels)) == 10


def test_wrong_label_needs_a_pool_with_two_answers():
    with pytest.raises(ConfigError, match="there is no wrong answer to take"):
        pipeline(WRONG, answers=("1",))
    with pytest.raises(ConfigError, match="pass answers=task.answers".replace(".", r"\.")):
        build_rewards(RewardsConfig(functions=(ExactReward(),), noise=(WRONG,)), seed=0)


def test_majority_judges_by_the_vote():
    labels = {"train/0": "7", "train/1": "1", "train/2": None}
    rollouts = [
        make_rollout(text, prompt_index=p, sample=k, answer="1")
        for p in range(3)
        for k, text in enumerate("17")
    ]
    scored = pipeline(MAJORITY, labels=labels).score(rollouts, step=0)
    assert seen(scored) == [0.0, 1.0, 1.0, 0.0, None, None]
    assert [item.clean_reward for item in scored] == [1.0, 0.0] * 3


def test_majority_labels_may_be_filled_later_but_not_be_absent():
    labels = {}
    judge = pipeline(MAJORITY, labels=labels)
    rollout = make_rollout("7", answer="1")
    with pytest.raises(RewardError, match="prompt train/0 has no pseudo-label"):
        judge.score([rollout], step=0)
    labels["train/0"] = "7"
    assert seen(judge.score([rollout], step=0)) == [1.0]
    with pytest.raises(ConfigError, match="needs pseudo-labels"):
        build_rewards(RewardsConfig(functions=(ExactReward(),), noise=(MAJORITY,)), seed=0)


def test_errors_of_a_second_judgement_are_shown():
    def picky(completions, answer):
        return [1.0 if a == "1" else 1 / 0 for a in answer]

    config = RewardsConfig(noise=(MAJORITY,))
    judge = build_rewards(config, seed=0, extra_functions=[picky], labels={"train/0": "2", "train/1": "1"})
    scored = judge.score([make_rollout("x", prompt_index=i, answer="1") for i in range(2)], step=0)
    assert seen(scored) == [None, 1.0]
    assert scored[0].errors == ("picky: raised: ZeroDivisionError: division by zero",)
    assert scored[0].clean_reward == 1.0


@pytest.mark.parametrize("noise", [WRONG, MAJORITY], ids=lambda n: n.type)
def test_label_noise_comes_first_and_must_change_something(noise):
    with pytest.raises(ConfigError, match=f"{noise.type} is number 2.*put it first"):
        pipeline(FLIP, noise)
    pipeline(noise, FLIP).score(step_of(prompts=3, samples=2), step=0)

    def ignores(completions):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="'answer', which no reward function reads"):
        build_rewards(
            RewardsConfig(noise=(noise,)),
            seed=0,
            extra_functions=[named(ignores)],
            answers=lambda c: "12",
            labels={},
        )


def test_votes_are_read_as_the_function_reads_that_judges_the_column():
    by_word, format_check = ExactReward(prefix=True), ExactReward(column="layout")
    for functions in ((by_word, format_check), (format_check, by_word)):
        read = _reader(RewardsConfig(functions=functions), "answer", {})
        assert [read(text) for text in ("46 so", "46 is", " ")] == ["46", "46", None]
    assert _reader(RewardsConfig(functions=(format_check,)), "answer", {})(" 46 so ") == "46 so"
