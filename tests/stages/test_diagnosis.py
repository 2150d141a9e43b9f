"""`vrpo diagnose`: known noise is found again, biases are named, and the advice follows from the numbers."""

import json

import numpy as np
import pytest

from vrpo.cli import main
from vrpo.errors import DataError
from vrpo.train.advice import advise
from vrpo.train.diagnosis import Judged, diagnose, read_judged


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
        ({"false_positive": 0.3, "false_negative": 0.3}, "use `denoiser"),
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


def test_length_and_keywords_that_pay_are_named():
    def longer(row, draw):
        return row | {"rewards": (row["rewards"][0] + 0.1 * row["length"],)}

    def phrase(row, draw):
        said = draw.random() < 0.5
        return row | {
            "completion": "I am certain" if said else "I guess",
            "rewards": (row["rewards"][0] + said,),
        }

    found = diagnose(sample(change=longer))
    assert found.length_correlation > 0.5 and not found.binary and found.informativeness is None
    assert any("longer completions" in line for line in advise(found))
    assert sum("the same denoiser, told more" in line for line in advise(found)) == 1
    found = diagnose(sample(change=phrase))
    assert {word for word, _ in found.keywords} == {"certain", "guess"}
    assert sum("nuisance: tokens" in line for line in advise(found)) == 2
    assert sum("the same denoiser, told more" in line for line in advise(found)) == 1
    assert not any("told more" in line for line in advise(diagnose(sample())))
    assert (
        diagnose(sample(false_positive=0.3)).keywords == ()
        and abs(diagnose(sample()).length_correlation) < 0.1
    )


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


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "no JSON"),
        ('{"completion": "x", "prompt": "p"}', "no reward"),
        ('{"completion": "x", "reward": 1}', "no prompt"),
        ('{"completion": "x", "reward": "good", "prompt": "p"}', "'good'"),
        ('{"completion": "x", "reward": [], "prompt": "p"}', "must be numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, part):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"completion": "x", "reward": 1, "prompt": "p"}}\n{line}\n')
    with pytest.raises(DataError, match="line 2") as caught:
        read_judged(path)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.jsonl"], "no file"),
        (["recipes/arith_cpu", "--gold", "nothing"], "FILE.py:FUNCTION"),
        (["recipes/arith_cpu", "--set", "rewards.noise={type: majority}"], "majority noise"),
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
