"""`vrpo diagnose`: known noise is found again, biases are named, and the advice follows from the numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import norm

from vrpo.cli import main
from vrpo.config import Config, build
from vrpo.errors import DataError
from vrpo.train.advice import MEASURED, advise
from vrpo.train.diagnosis import Judged, diagnose
from vrpo.train.diagnosis_files import read_judged

ROOT = Path(__file__).parents[2]


def sample(prompts=100, group=8, *, false_positive=0.0, false_negative=0.0, seed=0, gold=True, change=None):
    """Right with probability 0.4, then through the channel."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for _ in range(group):
            right = float(draw.random() < 0.4)
            flipped = draw.random() < (false_negative if right else false_positive)
            row = {
                "prompt_id": f"p{prompt}",
                "completion": "answer",
                "length": int(draw.integers(5, 50)),
                "rewards": (1.0 - right if flipped else right,),
                "gold": right if gold else None,
            }
            rows.append(Judged(**(change(row, draw) if change else row)))
    return rows


@pytest.mark.parametrize(("up", "down"), [(0.0, 0.0), (0.3, 0.3), (0.1, 0.4)])
def test_the_channel_is_found_within_its_interval(up, down):
    found = diagnose(sample(false_positive=up, false_negative=down))
    for rate, truth in (
        (found.false_positive, up),
        (found.false_negative, down),
        (found.informativeness, 1 - up - down),
    ):
        assert rate.low - 0.01 <= truth <= rate.high + 0.01
        assert rate.value == pytest.approx(truth, abs=0.06)
    assert found.binary and found.missing == 0.0 and found.gold_mean == pytest.approx(0.4, abs=0.05)


def test_intervals_cover_the_truth():
    runs = [diagnose(sample(25, 4, false_positive=0.2, false_negative=0.3, seed=s)) for s in range(60)]
    covered = [r.informativeness.low <= 0.5 <= r.informativeness.high for r in runs]
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize(
    ("rates", "part"),
    [
        ({}, "little noise"),
        ({"false_positive": 0.3, "false_negative": 0.3}, "use `denoiser: {false_positive: 0."),
        ({"false_positive": 0.5, "false_negative": 0.5, "seed": 4}, "may be 0"),
        ({"false_positive": 0.8, "false_negative": 0.8}, "surely below 0"),
        ({"gold": False}, "no gold verdicts"),
    ],
)
def test_advice_follows_from_the_channel(rates, part):
    assert any(part in line for line in advise(diagnose(sample(**rates))))


def test_a_reward_that_never_differs_teaches_nothing():
    rows = sample(4, 4, change=lambda row, draw: row | {"rewards": (1.0,)})
    found = diagnose(rows)
    assert found.ties == 1.0 and "nothing can be learned" in advise(found)[0]


def test_a_length_that_pays_is_named():
    def longer(row, draw):
        return row | {"rewards": (row["rewards"][0] + 0.1 * row["length"],)}

    found = diagnose(sample(change=longer))
    assert found.length_correlation > 0.5 and not found.binary and found.informativeness is None
    assert any("the longer ones are paid more" in line for line in advise(found))
    assert sum("nuisance: tokens" in line for line in advise(found)) == 1
    assert not any("nuisance" in line or "paid more" in line for line in advise(diagnose(sample())))
    assert abs(diagnose(sample(false_positive=0.3)).length_correlation) < 0.1


def test_right_answers_that_are_longer_are_no_liking_for_length():
    def right_is_long(row, draw):
        return row | {"length": 10 + 10 * int(row["gold"]) + int(draw.integers(3))}

    noisy = {"false_positive": 0.2, "false_negative": 0.2}
    assert abs(diagnose(sample(**noisy, change=right_is_long)).length_correlation) < 0.15
    without = diagnose(
        sample(**noisy, gold=False, change=lambda row, draw: right_is_long(row, draw) if row["gold"] else row)
    )
    assert without.length_correlation is not None and not without.equally_right
    assert diagnose(sample(change=right_is_long)).length_correlation is None  # nothing is left to explain


# --- words and characters ---------------------------------------------------------------------------


def texts(seed, *, words, pays=lambda text: 0.0, noise=0.0, prompts=64, group=8, gold=True):
    """Numbers of two digits, or words, as answers; gold is whether one begins as its prompt's, the reward that and what `pays` says."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for _ in range(group):
            text = words(draw)
            right = float(draw.random() < 0.4)
            seen = 1.0 - right if draw.random() < noise else right
            rows.append(
                Judged(
                    prompt_id=f"p{prompt}",
                    completion=text,
                    length=len(text),
                    rewards=(seen + pays(text),),
                    gold=right if gold else None,
                )
            )
    return rows


def numbers(draw):
    return str(draw.integers(10, 100))


def sentences(draw):
    return " ".join(f"w{i}" for i in draw.integers(0, 400, size=draw.integers(5, 40)))


def coin(seed, *, gold):
    draw = np.random.default_rng(seed)
    return [
        Judged(
            prompt_id=f"p{row // 8}",
            completion=sentences(draw),
            length=1,
            rewards=(float(draw.random() < 0.5),),
            gold=float(draw.random() < 0.5) if gold else None,
        )
        for row in range(64 * 8)
    ]


@pytest.mark.parametrize("gold", [False, True])
def test_a_coin_pays_for_no_word(gold):
    found = [bool(diagnose(coin(seed, gold=gold)).keywords) for seed in range(20)]
    assert sum(found) <= 1


@pytest.mark.parametrize("gold", [False, True])
def test_a_character_that_pays_is_named_alone(gold):
    rows = texts(0, words=numbers, pays=lambda text: 0.5 * ("9" in text), noise=0.1, gold=gold)
    found = diagnose(rows)
    assert [word for word, _ in found.keywords] == ["9"] and found.short
    assert found.keywords[0][1] == pytest.approx(0.5, abs=0.15)
    assert any("for '9'" in line for line in advise(found))


def test_short_words_that_pay_are_named_and_single_characters_of_texts_are_not():
    rows = texts(
        1, words=sentences, pays=lambda text: 0.5 * ("w7" in text.split()) - 0.5 * ("w8" in text.split())
    )
    found = diagnose(rows)
    assert {word for word, _ in found.keywords} == {"w7", "w8"} and not found.short
    assert dict(found.keywords) == {"w7": pytest.approx(0.5), "w8": pytest.approx(-0.5)}


def test_of_words_that_stand_together_the_one_that_is_paid_is_named():
    found = diagnose(
        texts(
            2,
            words=lambda draw: "I am certain" if draw.random() < 0.5 else "I guess",
            pays=lambda text: float("certain" in text),
        )
    )
    assert found.keywords == (("certain", pytest.approx(1.0)),)
    assert sum("nuisance: tokens" in line for line in advise(found)) == 1


def test_a_judge_that_errs_by_text_pays_for_no_word():
    """Equal answers to a prompt get the same wrong verdict: copies are no evidence."""

    def errs(seed):
        draw = np.random.default_rng(seed)
        rows = []
        for prompt in range(60):
            answers = [numbers(draw) for _ in range(3)]
            verdicts = dict(zip(answers, draw.integers(0, 2, size=3), strict=True))
            for answer in draw.choice(answers, size=16):
                reward = float(verdicts[str(answer)])
                rows.append(
                    Judged(prompt_id=f"p{prompt}", completion=str(answer), length=2, rewards=(reward,))
                )
        return rows

    assert sum(bool(diagnose(errs(seed)).keywords) for seed in range(20)) <= 1


@pytest.mark.parametrize("pays", [float, np.sqrt], ids=["straight", "bent"])
def test_a_judge_that_pays_for_length_pays_for_no_word(pays):
    def judged(seed, bonus):
        draw = np.random.default_rng(seed)
        rows = []
        for row in range(64 * 8):
            said = sentences(draw)
            length = len(said.split())
            reward = 0.1 * pays(length) + bonus * ("w7" in said.split()) + 0.05 * draw.normal()
            rows.append(
                Judged(prompt_id=f"p{row // 8}", completion=said, length=length, rewards=(float(reward),))
            )
        return rows

    found = [diagnose(judged(seed, 0.0)) for seed in range(10)]
    assert all(x.length_correlation > 0.8 for x in found)
    assert sum(bool(x.keywords) for x in found) <= 1
    assert [word for word, _ in diagnose(judged(0, 0.5)).keywords] == ["w7"]


def test_what_is_right_is_not_mistaken_for_what_pays():
    def says_so(row, draw):
        return row | {"completion": "yes indeed" if row["gold"] or draw.random() < 0.2 else "never"}

    noisy = {"false_positive": 0.2, "false_negative": 0.2, "change": says_so}
    assert diagnose(sample(**noisy)).keywords == ()
    without = [
        Judged(prompt_id=j.prompt_id, completion=j.completion, length=j.length, rewards=j.rewards)
        for j in sample(**noisy)
    ]
    assert [word for word, _ in diagnose(without).keywords] == ["indeed"]


def test_a_slope_is_not_advised_for_rewards_that_are_0_or_1():
    def certain(row, draw):
        said = draw.random() < 0.5
        reward = float(said) if draw.random() < 0.5 else row["gold"]
        return row | {"completion": "I am certain" if said else "I guess", "rewards": (reward,)}

    lines = advise(diagnose(sample(change=certain)))
    assert any("'certain'" in line for line in lines) and not any("nuisance" in line for line in lines)
    assert any("nothing here takes a liking out" in line for line in lines)


# --- gold -------------------------------------------------------------------------------------------


def scores(seed, strength, *, prompts=60, group=8):
    """A score on a scale, right completions `strength` standard deviations above wrong ones of the same prompt."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        easy = 3.0 * draw.normal()
        for _ in range(group):
            right = float(draw.random() < 0.4)
            reward = 5.0 + easy + strength * right + draw.normal()
            rows.append(
                Judged(prompt_id=f"p{prompt}", completion="x", length=1, rewards=(reward,), gold=right)
            )
    return rows


@pytest.mark.parametrize(
    ("strength", "part"),
    [
        (0.0, "may be 0.5, where nothing can be learned"),
        (1.0, "learning is possible: AUC"),
        (-1.0, "surely below 0.5"),
        (4.0, "little noise"),
    ],
)
def test_a_score_is_ranked_against_gold(strength, part):
    found = diagnose(scores(0, strength))
    truth = norm.cdf(strength / np.sqrt(2))
    assert found.auc.low <= truth <= found.auc.high and found.auc.high - found.auc.low < 0.16
    assert found.auc_of_siblings and found.informativeness is None
    wrong, right = found.mean_if
    assert right - wrong == pytest.approx(strength, abs=0.8)
    lines = advise(found)
    assert any(part in line for line in lines)
    assert any("channel: gaussian" in line for line in lines) == (strength == 1.0)


def test_intervals_of_rankings_cover_the_truth():
    truth = norm.cdf(1 / np.sqrt(2))
    siblings = [diagnose(scores(seed, 1.0, prompts=20, group=4)).auc for seed in range(60)]
    assert np.mean([x.low <= truth <= x.high for x in siblings]) >= 0.9
    spread = norm.cdf(1 / np.sqrt(2 * 10))  # prompts differ by three standard deviations
    strangers = [diagnose(scores(seed, 1.0, prompts=80, group=1)) for seed in range(60)]
    assert not any(x.auc_of_siblings for x in strangers)
    assert np.mean([x.auc.low <= spread <= x.auc.high for x in strangers]) >= 0.9


def test_a_few_prompts_that_agree_are_no_certainty():
    found = diagnose(scores(3, 20.0, prompts=2))
    assert found.auc.value == 1.0 and found.auc.low <= 0.5


def test_gold_of_one_kind_gives_no_verdict():
    rows = sample(10, change=lambda row, draw: row | {"gold": 1.0})
    assert any("every completion with a gold verdict is right" in line for line in advise(diagnose(rows)))


def test_gold_that_is_no_verdict_is_refused(tmp_path, capsys):
    rows = [
        {"prompt": "p", "completion": "x", "reward": 0.5, "gold": 1},
        {"prompt": "p", "completion": "y", "reward": 1, "gold": 3},
    ]
    out, err, status = run(tmp_path, capsys, "\n".join(map(json.dumps, rows)))
    assert status == 2 and out == "" and "line 2: gold is 3, a gold verdict is 0 (wrong) or 1 (right)" in err
    with pytest.raises(DataError, match=r"gold is 0\.4 for completion 'x'"):
        diagnose([Judged(prompt_id="p", completion="x", length=1, rewards=(1.0,), gold=0.4)])


def clean_rows(seen):
    draw = np.random.default_rng(0)
    for row in range(200):
        clean = float(draw.random() < 0.4)
        yield {"prompt_id": f"p{row // 8}", "completion": "x", "clean_reward": clean, **seen(clean, draw)}


def test_a_judge_is_not_compared_with_itself(tmp_path, capsys):
    line = "1. clean_reward equals reward in every row: no gold; give --gold or a gold key\n"

    def diagnosed(seen):
        out, _, status = run(tmp_path, capsys, "\n".join(json.dumps(row) for row in clean_rows(seen)))
        assert status == 0
        return out

    itself = diagnosed(lambda clean, draw: {"reward": clean})
    assert line in itself and "J =" not in itself and "little noise" not in itself
    # a missing reward is no difference
    partly = diagnosed(lambda clean, draw: {"reward": clean if draw.random() < 0.9 else None})
    assert line in partly and "J =" not in partly
    noisy = diagnosed(lambda clean, draw: {"reward": clean if draw.random() < 0.7 else 1 - clean})
    assert line not in noisy and "J = 1" in noisy
    # a key named gold is always gold
    trusted = diagnosed(lambda clean, draw: {"reward": clean, "gold": clean})
    assert line not in trusted and "little noise" in trusted
    scored = diagnosed(lambda clean, draw: {"clean_reward": clean + 0.5, "reward": clean + draw.random()})
    assert "is no verdict of 0 or 1: no gold" in scored and "AUC" not in scored


@pytest.mark.parametrize("given", [40, 400])
def test_the_gold_that_would_tell_is_more_than_there_is(given):
    """With J at 0 no number tells."""
    half = given // 4

    def rows(wrong_paid, right_paid):
        kinds = [(0.0, 1.0, wrong_paid), (0.0, 0.0, 2 * half - wrong_paid), (1.0, 1.0, right_paid)]
        kinds.append((1.0, 0.0, 2 * half - right_paid))
        return [
            Judged(prompt_id="p", completion="x", length=1, rewards=(reward,), gold=gold)
            for gold, reward, count in kinds
            for _ in range(count)
        ]

    lines = advise(diagnose(rows(half, half)))
    assert any("cannot be told apart from 0" in line for line in lines)
    assert not any("gold verdicts in all" in line for line in lines)
    for sign in (1, -1):
        lines = advise(diagnose(rows(half, half + sign * (3 if given == 40 else 12))))
        needed = [int(m) for line in lines for m in re.findall(r"about (\d+) gold verdicts", line)]
        assert len(needed) == 1 and given < needed[0] < 20 * given


# --- advice -----------------------------------------------------------------------------------------


def texts_of_many_words(row, draw):
    return row | {"completion": " ".join(["because"] * 50)}


@pytest.mark.parametrize(
    "rows",
    [
        sample(false_positive=0.3, false_negative=0.3),
        texts(0, words=numbers, pays=lambda text: 0.5 * ("9" in text)),
        scores(0, 1.0),
    ],
    ids=["flips", "nine", "score"],
)
def test_what_is_advised_is_a_configuration_and_filters(rows):
    lines = advise(diagnose(rows))
    advised = next(line for line in lines if "use `denoiser" in line)
    config = {
        "model": {"path": "vrpo:tiny"},
        "task": {"type": "arithmetic"},
        "rewards": {"functions": [{"type": "exact"}]},
    }
    for settings in re.findall(r"`(\w+: \{[^`]*\})`", advised):
        config |= yaml.safe_load(settings)
    built = build(Config, config)
    assert built.denoiser.one_right and built.algorithm.belief_coef == 0.3
    assert built.denoiser.channel == ("flip" if diagnose(rows).binary else "gaussian")
    assert sum("use `" in line for line in lines) == 1


def test_long_answers_are_not_promised_a_filter():
    noisy = {"false_positive": 0.3, "false_negative": 0.3}
    lines = advise(diagnose(sample(**noisy, change=texts_of_many_words)))
    assert not any("use `" in line or "one_right" in line for line in lines)
    assert sum("nothing better is known here" in line for line in lines) == 1


def test_gold_on_few_prompts_is_compared_with_the_rewards_of_these_prompts():
    """Judged prompts are alive by both; that most others have equal rewards says nothing about noise, and the other way round."""

    def judged(alive_by_reward, alive_by_gold, gold):
        return [
            Judged(
                prompt_id=f"p{n} {alive_by_reward} {alive_by_gold}",
                completion="answer",
                length=9,
                rewards=(float(k % 2) if alive_by_reward else 1.0,),
                gold=(float(k % 2) if alive_by_gold else 1.0) if gold else None,
            )
            for n in range(20)
            for k in range(4)
        ]

    told = "noise makes dead groups look alive"
    honest = [*judged(False, False, True), *judged(True, None, False), *judged(True, True, True)]
    found = diagnose(honest)
    assert (found.mixed, found.different) == (0.5, 0.5) and found.ties == pytest.approx(1 / 3)
    assert not any(told in line for line in advise(found))
    noisy = [*judged(True, False, True), *judged(False, None, False), *judged(True, True, True)]
    assert any(
        f"{told}: 100% of the prompts have different rewards, 50%" in line for line in advise(diagnose(noisy))
    )
    # partial credit that comes out the same again is an order, not noise
    graded = [
        Judged(
            prompt_id=j.prompt_id,
            completion=j.completion,
            length=j.length,
            rewards=(5 * j.rewards[0] - 1,) * 2,
            gold=j.gold,
        )
        for j in noisy
    ]
    lines = advise(diagnose(graded))
    assert not any(told in line for line in lines)
    assert any("orders completions that gold calls equally right: 100%" in line for line in lines)


def test_prompts_whose_rewards_are_missing_are_counted():
    rows = [
        Judged(prompt_id=f"p{n}", completion="a", length=1, rewards=(None if n == 0 else float(k),))
        for n in range(3)
        for k in range(2)
    ]
    found = diagnose(rows)
    assert (found.completions, found.prompts) == (6, 3)
    assert any("33%" in line and "rewards.combine: answered" in line for line in advise(found))


def test_more_generations_are_advised_only_where_they_would_help():
    def tied(group, rewards):
        return [
            Judged(prompt_id=f"p{n}", completion="answer", length=9, rewards=(rewards[n % len(rewards)],))
            for n in range(20)
            for _ in range(group)
        ]

    def line(rows):
        return next(line for line in advise(diagnose(rows)) if "group methods learn nothing" in line)

    assert "use more generations (with 4 most prompts" in line(tied(2, [0.0, 1.0]))
    assert "too easy or too hard" in line(tied(8, [0.0, 1.0])) and "more gen" not in line(tied(8, [0.0, 1.0]))
    assert line(tied(8, [0.0, 2.5])).endswith("use more generations, other prompts, or a critic")


def test_errors_that_stay_are_told():
    def twice(row, draw):
        return row | {"rewards": row["rewards"] * 2}

    noisy = {"false_positive": 0.2, "false_negative": 0.2}
    assert any("few prompts seen often" in line for line in advise(diagnose(sample(**noisy, change=twice))))
    assert not any("few prompts" in line for line in advise(diagnose(sample(**noisy))))


def test_easy_prompts_do_not_look_like_a_length_bias():
    rows = [
        Judged(
            prompt_id=f"p{p}",
            completion="x",
            length=10 * p + k,
            rewards=(float(p >= 5) + 0.01 * ((k * 7 + p * 3) % 5),),
        )
        for p in range(10)
        for k in range(5)
    ]
    raw = np.corrcoef([r.length for r in rows], [r.rewards[0] for r in rows])[0, 1]
    assert raw > 0.7 and abs(diagnose(rows).length_correlation) < 0.4


def test_repeated_scoring_separates_the_judges_own_noise():
    def twice(row, draw):
        again = 1.0 - row["gold"] if draw.random() < 0.2 else row["gold"]
        return row | {"rewards": (row["gold"], again)}

    found = diagnose(sample(change=twice))
    assert found.repeat_share == pytest.approx(0.2, abs=0.05)
    # variance between scorings: 0.2 * 1/2 on average, of a whole of about 1/4
    assert found.repeat_variance == pytest.approx(0.1 / 0.245, abs=0.08)
    # of a judge that says nothing all variance is its own
    alone = Judged(prompt_id="p", completion="x", length=1, rewards=(0.0, 1.0))
    assert diagnose([alone]).repeat_variance == pytest.approx(1.0)
    assert diagnose(sample()).repeat_share is None
    assert any("one_right: true" in line for line in advise(found))

    def on_a_scale(row, draw):
        return row | {"rewards": tuple(row["gold"] + draw.random() for _ in range(2))}

    lines = advise(diagnose(sample(change=on_a_scale)))
    assert any("averaging k" in line for line in lines) and not any("one_right" in line for line in lines)


def test_disagreement_and_missing_rewards():
    def parts(row, draw):
        missing = draw.random() < 0.2
        named = {"a": row["gold"], "b": 1.0 - row["gold"], "c": row["gold"]}
        return row | {"parts": named, "rewards": (None if missing else row["gold"],)}

    found = diagnose(sample(change=parts))
    assert found.disagreement["a, b"] == pytest.approx(-1.0) and found.disagreement["a, c"] == pytest.approx(
        1.0
    )
    assert found.missing == pytest.approx(0.2, abs=0.04)
    lines = advise(found)
    assert any("a, b agree little" in line for line in lines) and any("are missing" in line for line in lines)
    # a lone null beside lists of scorings stands for all of its own
    twice = [j if j.rewards == (None,) else replace(j, rewards=j.rewards * 2) for j in sample(change=parts)]
    assert diagnose(twice).missing == pytest.approx(found.missing)
    with pytest.raises(DataError, match="no reward among them"):
        diagnose([Judged(prompt_id="p", completion="x", length=1, rewards=(None,))])


def test_files(tmp_path, capsys):
    path = tmp_path / "judged.jsonl"
    rows = [
        {"prompt": "2+2", "completion": "4", "reward": [1, 0], "gold": 1},
        {"prompt": "2+2", "completion": "5", "reward": None, "gold": 0},
        {"prompt": "2+3", "completion": "5", "reward": 0.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    judged = read_judged(path)
    assert [j.rewards for j in judged] == [(1.0, 0.0), (None,), (0.0,)] and judged[2].gold is None
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(path)])
    assert ended.value.code == 0 and "completions" in capsys.readouterr().out


def run(tmp_path, capsys, content):
    """What `vrpo diagnose` prints about a file of this content, and its status."""
    path = tmp_path / "judged.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(path)])
    captured = capsys.readouterr()
    return captured.out, captured.err, ended.value.code


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "no JSON"),
        (b"[1]", "[1] is no object"),
        (b'{"completion": "x", "prompt": "p"}', "no reward"),
        (b'{"completion": "x", "reward": 1}', "no prompt"),
        (b'{"completion": 5, "reward": 1, "prompt": "p"}', "completion is 5, text is needed"),
        (b'{"completion": "x", "reward": "good", "prompt": "p"}', "reward is 'good', a number"),
        (b'{"completion": "x", "reward": [], "prompt": "p"}', "reward is []"),
        (b'{"completion": "x", "reward": NaN, "prompt": "p"}', "reward is nan"),
        (b'{"completion": "x", "reward": 1' + b"0" * 400 + b', "prompt": "p"}', "reward is 1000"),
        (b'{"completion": "x", "reward": 1' + b"0" * 5000 + b', "prompt": "p"}', "no JSON"),
        (b'{"completion": "x", "reward": 1, "prompt": ' + b"[" * 100_000 + b"}", "no JSON"),
        (b'{"completion": "x", "reward": 1, "prompt": "p", "tokens": "abc"}', "tokens is 'abc', a number"),
        (b'{"completion": "x", "reward": 1, "prompt": "p", "tokens": 1.5}', "tokens is 1.5, a count"),
        (b'{"completion": "x", "reward": 1, "prompt": "p", "gold": "yes"}', "gold is 'yes', a number"),
        (b'{"completion": "x", "reward": 1, "prompt": "p", "parts": "abc"}', "parts is 'abc', an object"),
        (b'{"completion": "x", "reward": 1, "prompt": "p", "parts": {"a": "b"}}', "a is 'b', a number"),
        ('{"completion": "\xe9", "reward": 1, "prompt": "p"}'.encode("latin-1"), "byte 0xe9 is no UTF-8"),
    ],
)
def test_a_bad_line_is_one_line_with_file_and_number(tmp_path, capsys, line, part):
    out, err, status = run(
        tmp_path, capsys, b'{"completion": "x", "reward": 1, "prompt": "p"}\n' + line + b"\n"
    )
    assert status == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert "judged.jsonl, line 2: " in err and part in err and "; " in err and len(err) < 400


def test_only_a_line_feed_ends_a_line(tmp_path, capsys):
    rows = [
        {"prompt": "p", "completion": f"one{end}[/two]", "reward": number}
        for number, end in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\r")
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    # JSON has control characters escaped
    assert [j.completion for j in read(tmp_path, content)] == [row["completion"] for row in rows]
    assert run(tmp_path, capsys, content)[2] == 0


def read(tmp_path, content):
    path = tmp_path / "judged.jsonl"
    path.write_bytes(content.encode())
    return read_judged(path)


def test_words_are_no_markup(tmp_path, capsys):
    rows = [
        {"prompt": f"p{n // 8}", "completion": "[/b] well" if n % 3 else "no", "reward": 0.3 * (n % 3 > 0)}
        for n in range(80)
    ]
    out, _, status = run(tmp_path, capsys, "\n".join(map(json.dumps, rows)))
    assert status == 0 and "paid for" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.jsonl"], "no file"),
        (["recipes/arith_cpu", "--gold", "nothing"], "FILE.py:FUNCTION"),
        (["recipes/arith_cpu", "--set", "rewards.noise={type: majority}"], "majority noise"),
        (["x.jsonl", "--prompts", "3"], "--prompts, --repeats, --gold and --set go with a configuration"),
        (["x.jsonl", "--repeats", "3"], "go with a configuration"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, part):
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", *arguments])
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


def test_a_configuration_is_sampled_and_its_noise_found(capsys):
    settings = [
        "rollout.num_generations=4",
        "train.completions_per_step=4",
        "train.minibatch=4",
        "train.microbatch=4",
    ]
    with pytest.raises(SystemExit) as ended:
        main(
            ["diagnose", "recipes/arith_cpu", "--prompts", "40", *(x for s in settings for x in ("--set", s))]
        )
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "of 1" in out and "rho+" in out and "scored again" in out


def test_a_judge_that_a_9_impresses_is_found_out(capsys):
    bonus = "rewards.noise={type: keyword_bias, phrase: '9', bonus: 0.5}"
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", "recipes/arith_cpu", "--prompts", "32", "--set", bonus])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.count("paid for '") == 1
    assert "paid for '9'" in out and "+0.500" in out and "nuisance: tokens" in out


@pytest.mark.parametrize(("study", "method"), MEASURED, ids=str)
def test_accuracies_in_the_advice_are_those_of_the_records(study, method):
    numbers = json.loads((ROOT / "recipes" / "arith_cpu" / f"{study}.json").read_text())
    row = next(row for row in numbers["rows"] if row["method"] == method)
    assert row["final_greedy"]["value"] == pytest.approx(MEASURED[study, method], abs=5.1e-4)


def test_a_few_completions_go_with_length_by_chance():
    """Length and reward are independent; 20 completions have a rank correlation above .3 in one case of four."""
    claimed = 0
    for seed in range(40):
        found = diagnose(sample(5, 4, seed=seed, gold=False))
        claimed += any("the longer ones" in line or "the shorter ones" in line for line in advise(found))
        if abs(found.length_correlation or 0.0) > 0.3 and found.length_by_chance:
            assert any("may be chance" in note for _, _, note in found.lines())
    assert claimed <= 2


def test_equal_rewards_that_are_no_round_number_teach_nothing():
    found = diagnose(sample(25, 4, gold=False, change=lambda row, draw: row | {"rewards": (0.7,)}))
    assert found.spread == 0.0
    assert advise(found) == [
        advise(diagnose(sample(2, 2, change=lambda row, draw: row | {"rewards": (1.0,)})))[0]
    ]


def test_single_completions_say_nothing_of_ties():
    single = sample(40, 1, gold=False)
    found = diagnose(single)
    assert found.ties is None and not any("equal rewards" in name for name, _, _ in found.lines())
    equal = [
        Judged(prompt_id=f"g{i}", completion="x", length=1, rewards=(float(i % 2),), gold=None)
        for i in range(4)
        for _ in range(4)
    ]
    found = diagnose([*single, *equal])
    assert (found.ties, found.several, found.group) == (1.0, 4, 4)
    assert any(line.startswith("100% of the 4 prompts with several rewards") for line in advise(found))


def test_long_answers_under_a_nearly_right_judge_need_no_remedy():
    def unsteady(row, draw):
        again = 1.0 - row["gold"] if draw.random() < 0.04 else row["gold"]
        return row | {"rewards": (row["gold"], again), "completion": "a long text " * 20}

    lines = advise(diagnose(sample(change=unsteady)))
    assert any("little noise" in line for line in lines) and any("scorings" in line for line in lines)
    assert not any("nothing better is known" in line for line in lines)


def test_what_a_run_kept_for_its_errors_alone_is_no_sample(tmp_path):
    line = {"prompt_id": "p", "completion": "x", "reward": 1.0, "errors": []}
    failed = line | {"reward": None, "errors": ["timed out"]}
    lines = [line, failed, *[failed | {"kept_for": "errors"}] * 8]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert diagnose(read_judged(tmp_path / "rollouts.jsonl")).missing == 0.5


def test_a_judge_that_errs_on_whole_prompts_has_wider_intervals():
    """Half of 64 prompts inverted, eight completions each: J = 0 in truth, and so inside nearly all intervals."""

    def inverted(seed):
        draw = np.random.default_rng(seed)
        return [
            Judged(
                prompt_id=f"p{p}",
                completion=f"{p} {k}",
                length=1,
                rewards=(float(gold != flip),),
                gold=float(gold),
            )
            for p in range(64)
            for flip in [draw.random() < 0.5]
            for k, gold in enumerate(draw.random(8) < 0.5)
        ]

    found = [diagnose(inverted(seed)).informativeness for seed in range(40)]
    assert sum(not j.low <= 0.0 <= j.high for j in found) <= 5
    # the 64 coins alone give J a standard deviation of 1/8, and so an interval of .49
    assert all(0.4 < j.high - j.low < 0.7 for j in found)
