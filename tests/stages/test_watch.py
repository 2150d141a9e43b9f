"""The collapse watch: fires on collapses, once, and not on healthy runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import vrpo
from tests.smoke.test_runs import python_config, rows, run, small
from vrpo.train.progress import Quiet
from vrpo.train.watch import BASELINE, WINDOW, warnings_at

HEALTHY = sorted((Path(__file__).parents[1] / "data").glob("healthy_*.jsonl"))
START = {
    "policy/entropy_avg": 0.8,
    "policy/perplexity": 2.0,
    "policy/approxkl_avg": 0.01,
    "objective/kl": 1.0,
    "objective/scores": 0.4,
    "objective/scores_clean": 0.4,
    "objective/scores_std": 0.49,
    "completions/mean_length": 8.0,
    "completions/truncated_frac": 0.0,
    "val/explained_var": 0.1,
    "noise/frac_zero_std_seen": 0.2,
}
CHANGES = {
    "entropy": [({"policy/entropy_avg": 0.07}, True), ({"policy/entropy_avg": 0.09}, False)],
    "perplexity": [({"policy/perplexity": 1.01}, True), ({"policy/perplexity": 1.1}, False)],
    "kl": [
        ({"policy/approxkl_avg": 0.2}, True),
        ({"policy/approxkl_avg": 0.09}, False),
        ({"objective/kl": 60.0}, True),
        ({"objective/kl": 40.0}, False),
    ],
    "length": [
        ({"completions/mean_length": 16.0}, True),
        ({"completions/mean_length": 15.0}, False),
        ({"completions/mean_length": 1.0}, True),
        ({"completions/truncated_frac": 0.6}, True),
        ({"completions/truncated_frac": 0.4}, False),
    ],
    "explained_variance": [
        ({"val/explained_var": -0.1}, True),
        ({"val/explained_var": -0.02}, False),
        ({"val/explained_var": None}, False),
    ],
    "equal_rewards": [
        ({"noise/frac_zero_std_seen": 1.0}, True),
        ({"noise/frac_zero_std_seen": 0.9}, False),
        ({"noise/frac_zero_std_seen": None, "objective/scores_std": 0.0}, True),
        ({"noise/frac_zero_std_seen": None, "objective/scores_std": 0.1}, False),
    ],
    "silent_function": [
        ({"rewards/format/mean": None}, True),
        ({"rewards/format/mean": 0.0}, False),
    ],
    "hacking": [
        ({"objective/scores": 0.6, "objective/scores_clean": 0.3}, True),
        ({"objective/scores": 0.6, "objective/scores_clean": 0.45}, False),
        ({"objective/scores": 0.6, "objective/scores_clean": 0.38}, False),
        ({"objective/scores": 0.42, "objective/scores_clean": 0.3}, False),
        # the same run with rewards of another size
        ({"objective/scores": 60.0, "objective/scores_clean": 0.3, "objective/scores_std": 400.0}, False),
        ({"objective/scores": 0.6, "objective/scores_clean": None}, False),
    ],
}


def fired(history: list[dict], **settings) -> list[tuple[str, int]]:
    given = {"warmup_steps": 0, "max_completion_length": 16} | settings
    return [
        (warned.kind, warned.step)
        for end in range(1, len(history) + 1)
        for warned in warnings_at(history[:end], **given)
    ]


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [(kind, change, expected) for kind, cases in CHANGES.items() for change, expected in cases],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else str(x),
)
def test_a_sign_is_reported_once_at_the_step_it_has_held_for_a_window(kind, change, expected):
    good, bad = 60, WINDOW + 5
    history = [START] * good + [START | change] * bad
    # means over the window move before all of it has changed
    steps = [step for found, step in fired(history) if found == kind]
    assert len(steps) == int(expected)
    assert all(good < step <= good + WINDOW for step in steps)
    assert all(found == kind for found, _ in fired(history))


def test_nothing_is_said_before_there_is_something_to_compare_with():
    collapsed = START | {"noise/frac_zero_std_seen": 1.0}
    assert fired([collapsed] * (BASELINE + WINDOW - 1)) == []
    assert fired([collapsed] * (BASELINE + WINDOW + 5)) == [("equal_rewards", BASELINE + WINDOW)]
    assert fired([collapsed] * (BASELINE + WINDOW + 5), warmup_steps=5) == [
        ("equal_rewards", BASELINE + WINDOW + 5)
    ]


def test_entropy_must_be_low_and_not_only_lower():
    undecided = START | {"policy/entropy_avg": 5.0}
    assert fired([undecided] * 30 + [START | {"policy/entropy_avg": 0.4}] * 20) == []
    assert fired([undecided] * 30 + [START | {"policy/entropy_avg": 0.09}] * 20) == [("entropy", 40)]


def test_a_step_without_rewards_at_the_start_leaves_the_watch_on():
    gap = {name: x for name, x in START.items() if name != "policy/entropy_avg"}
    collapsed = START | {"policy/entropy_avg": 0.01}
    assert fired([START, gap] + [START] * 28 + [collapsed] * 20) == [("entropy", 40)]


def test_a_reward_that_is_hacked_after_an_honest_rise_is_seen():
    honest = START | {"objective/scores": 0.7, "objective/scores_clean": 0.7}
    hacked = START | {"objective/scores": 0.9, "objective/scores_clean": 0.55}  # still above the start
    found = fired([START] * 20 + [honest] * 60 + [hacked] * 20)
    assert [kind for kind, _ in found] == ["hacking"] and 80 < found[0][1] <= 80 + WINDOW


def test_small_batches_of_a_run_that_stands_still_are_not_taken_for_hacking():
    rng = np.random.default_rng(0)
    for _ in range(20):
        clean = rng.random((100, 16)) < 0.4
        seen = clean ^ (rng.random((100, 16)) < 0.3)
        means = zip(seen.mean(1).tolist(), clean.mean(1).tolist(), seen.std(1).tolist(), strict=True)
        names = ("objective/scores", "objective/scores_clean", "objective/scores_std")
        assert fired([dict(zip(names, line, strict=True)) for line in means]) == []


def test_every_setting_that_a_message_names_exists():
    known = set(re.findall(r'"(\w+)": \{', json.dumps(vrpo.Config.model_json_schema())))
    changes = [change for cases in CHANGES.values() for change, expected in cases if expected]
    messages = [
        warned.message
        for change in [*changes, {"policy/approxkl_avg": 0.7}]
        for end in range(61, 71)
        for warned in warnings_at(
            ([START] * 60 + [START | change] * 10)[:end], warmup_steps=0, max_completion_length=16
        )
    ]
    named = {x for m in messages for x in re.findall(r"(?:train|algorithm|critic|rollout)\.(\w+)", m)}
    assert len(messages) > len(changes) and {"learning_rate", "kl_coef", "warmup_steps"} <= named
    assert named - {"jsonl"} <= known


def test_a_jump_is_reported_at_once_and_once():
    leap = START | {"policy/approxkl_avg": 0.7}
    assert fired([leap, leap, START, leap]) == [("jump", 1), ("jump", 4)]


def test_a_message_is_one_line_that_says_what_to_do():
    history = [START] * 60 + [START | {"policy/approxkl_avg": 0.2}] * WINDOW
    (warned,) = warnings_at(history, warmup_steps=0, max_completion_length=16)
    assert (
        "\n" not in warned.message
        and "train.learning_rate" in warned.message
        and "0.2 nats" in warned.message
    )


@pytest.mark.parametrize("path", HEALTHY, ids=lambda p: p.stem)
def test_healthy_runs_are_left_alone(path):
    history = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(history) == 150
    recorded = set(START) - {"objective/kl"}  # these runs have no reference
    recorded -= set() if "ppo" in path.stem or "vrpo" in path.stem else {"val/explained_var"}
    assert recorded <= set(history[-1])
    assert (
        fired(history, warmup_steps=8 if "val/explained_var" in history[0] else 0, max_completion_length=8)
        == []
    )


HACKED = {
    "constant": (lambda completions, **_: [1.0] * len(completions), 1e-4, "equal_rewards"),
    "length": (lambda completions, **_: [float(len(c)) for c in completions], 1e-3, "length"),
    "one digit": (lambda completions, **_: [float(c.count("9")) for c in completions], 1e-3, "entropy"),
    "far too fast": (lambda completions, **_: [float(len(c)) for c in completions], 3e-2, "jump"),
}


@pytest.mark.parametrize(("reward", "rate", "kind"), HACKED.values(), ids=HACKED.keys())
def test_a_hacked_reward_makes_it_fire(tmp_path, reward, rate, kind):
    train = {
        "steps": 35 if kind == "entropy" else 25,
        "learning_rate": rate,
        "eval_every": 0,
        "completions_per_step": 32,
    }
    config = vrpo.Config(
        algorithm="grpo",
        rollout={"num_generations": 4, "max_completion_length": 12},
        train=python_config(**train).train.model_dump(),
    )
    trainer = vrpo.Trainer(
        model="vrpo:tiny", reward_funcs=reward, train_dataset=rows(), config=config, output_dir=tmp_path
    )
    summary = trainer.train(display=Quiet())
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()}
    assert kind in kinds
    assert len(summary["warnings"]) >= 1


def test_a_reward_upside_down_makes_it_fire(tmp_path):
    """The policy is paid for wrong answers."""
    noise = {"type": "adversarial", "false_positive": 1.0, "false_negative": 1.0}
    train = {"steps": 22, "completions_per_step": 64, "minibatch": 64, "learning_rate": 3e-4}
    config = small(
        algorithm="grpo", rewards={"noise": noise}, train=train | {"eval_every": 0, "checkpoint_every": 0}
    )
    run(config, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert "hacking" in {warned["kind"] for warned in found}
