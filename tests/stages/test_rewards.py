"""The pipeline and the contract of user functions."""

import asyncio
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stages.data.samples import make_rollout, step_of
from vrpo.config.rewards import (
    ChoiceReward,
    ExactReward,
    FlipNoise,
    FunctionReward,
    MajorityNoise,
    MathReward,
    MissingNoise,
    RewardsConfig,
    SourceNoise,
)
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards import RewardPipeline, build_rewards, load_function, named
from vrpo.train.metrics import rollout_metrics

ROLLOUTS = [make_rollout(text, prompt_index=i, answer="1") for i, text in enumerate(["1", "0", "1", "x"])]


def judge(function, rollouts=ROLLOUTS, **options):
    return RewardPipeline([named(function, **options)], seed=0).score_clean(rollouts)


def values(scored):
    return [item.clean_reward for item in scored]


def right(completions, answer, **_):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


# --- the sum --------------------------------------------------------------------------------------


def test_weighted_sum_by_hand():
    def length(completions):
        return [float(len(c)) for c in completions]

    scored = RewardPipeline([named(right, weight=2.0), named(length, weight=-0.5)], seed=0).score_clean(
        [make_rollout("1", answer="1"), make_rollout("abcd", answer="1")]
    )
    # 2 * 1 - 0.5 * 1 = 1.5    2 * 0 - 0.5 * 4 = -2
    assert values(scored) == [1.5, -2.0]
    assert dict(scored[0].parts) == {"right": 1.0, "length": 1.0}
    assert [item.reward for item in scored] == [1.5, -2.0]


def test_what_gold_fails_at_is_kept_apart_from_what_the_reward_fails_at():
    def moody(completions):
        return [1.0 if c == "1" else float("nan") for c in completions]

    scored = RewardPipeline([named(right)], gold=[named(moody)], seed=0).score(ROLLOUTS, step=1)
    assert [s.reward for s in scored] == [1.0, 0.0, 1.0, 0.0] and values(scored) == [1.0, None, 1.0, None]
    assert not any(s.errors for s in scored)
    assert [len(s.gold_errors) for s in scored] == [0, 1, 0, 1] and "bad_value" in scored[1].gold_errors[0]
    metrics = rollout_metrics(scored)
    assert (metrics["rewards/errors"], metrics["rewards/gold_errors"]) == (0.0, 2.0)
    assert "rewards/gold_errors" not in rollout_metrics([s for s in scored if not s.gold_errors])


def test_withheld_rewards_alone_are_no_errors_of_a_judge():
    flips, missing = FlipNoise(false_negative=0.1), MissingNoise(rate=0.1)
    for noise, knows in (((), False), ((missing,), False), ((flips,), True), ((flips, missing), True)):
        config = RewardsConfig(functions=(ExactReward(),), noise=noise)
        assert (config.knows_clean, build_rewards(config, seed=0).knows_clean) == (knows, knows)


def test_missing_as_soon_as_one_function_is_missing_and_never_zero():
    def unsure(completions):
        return [None if c == "x" else 1.0 for c in completions]

    scored = RewardPipeline([named(right), named(unsure)], seed=0).score_clean(ROLLOUTS)
    assert values(scored) == [2.0, 1.0, 2.0, None]
    assert dict(scored[3].parts) == {"right": 0.0, "unsure": None}
    assert scored[3].errors == ()  # None is an answer, not an error


def test_answered_is_the_sum_of_those_that_have_a_part_in_a_row():
    def sums(prompts):
        return [3.0, None, None, None]

    def stories(prompts):
        return [1.0, 1.0, None, math.nan]

    def shown(prompts):
        return [5.0] * 4

    functions = [named(sums), named(stories, weight=0.5), named(shown, weight=0.0)]
    scored = RewardPipeline(functions, gold=functions, seed=0, combine="answered").score(ROLLOUTS, step=1)
    # by hand: 3 + .5, .5, and none: nobody with a weight answered; stories failed
    assert [item.reward for item in scored] == values(scored) == [3.5, 0.5, None, None]
    assert "stories: bad_value" in scored[3].errors[0]
    assert values(RewardPipeline(functions, seed=0).score_clean(ROLLOUTS)) == [3.5, None, None, None]


def test_combine_comes_from_the_configuration():
    def silent(prompts):
        return [None] * len(prompts)

    for combine, rewards in (("answered", [1.0, 0.0, 1.0, 0.0]), ("all", [None] * 4)):
        config = RewardsConfig(functions=(ExactReward(),), combine=combine)
        pipeline = build_rewards(config, seed=0, extra_functions=[silent])
        assert values(pipeline.score_clean(ROLLOUTS)) == rewards


def test_none_for_a_whole_step_is_allowed():
    assert values(judge(lambda completions: [None] * len(completions), name="never")) == [None] * 4


def test_order_and_length_are_kept():
    scored = judge(right)
    assert [item.rollout for item in scored] == ROLLOUTS
    assert judge(right, []) == []


# --- what a function may return -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (2, 2.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (np.array([0.25]), 0.25),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([1], dtype=torch.int64), 1.0),
        (torch.tensor(1.0, requires_grad=True), 1.0),
    ],
)
def test_numbers_of_any_kind(value, expected):
    scored = judge(lambda completions: [value] * len(completions), name="f")
    assert values(scored) == [expected] * 4
    assert all(type(item.clean_reward) is float for item in scored)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "abc", [1.0], 1j, torch.ones(2), np.nan, np.str_("1"), 10**400, object],
)
def test_unusable_values_mask_their_sample_alone(value):
    scored = judge(lambda completions: [1.0, value, 0.0, 1.0], name="mine")
    assert values(scored) == [1.0, None, 0.0, 1.0]
    assert scored[1].errors[0].startswith("mine: bad_value: returned ")
    assert "a finite number or None is needed" in scored[1].errors[0]
    assert not scored[0].errors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "f: returned 1 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4"),
        (1.0, "returned a float, a list of 4"),
        (torch.ones(3), "returned 3 values for 4"),
        (np.array(1.0), "returned a float, a list of 4"),
        (None, "returned a NoneType"),
    ],
)
def test_a_broken_contract_stops_the_step(value, message):
    with pytest.raises(RewardError, match=message) as caught:
        judge(lambda completions: value, name="f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_an_array_or_a_tensor_is_a_list_of_values(make):
    assert values(judge(lambda completions: make([1.0, 0.5, 0.0, 1.0]))) == [1.0, 0.5, 0.0, 1.0]


def test_one_raising_sample_costs_only_itself():
    calls = []

    def fragile(completions, answer):
        calls.append(len(completions))
        if "x" in completions:
            raise ValueError("no number\nsecond line")
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    scored = judge(fragile)
    assert values(scored) == [1.0, 0.0, 1.0, None]
    assert scored[3].errors == ("fragile: raised: ValueError: no number",)
    assert calls == [4, 1, 1, 1, 1]


def test_every_sample_failing_is_an_error_with_the_cause():
    def broken(completions):
        raise KeyError("solution")

    with pytest.raises(RewardError, match=r"none of 4 completions.*broken: raised: KeyError: 'solution'"):
        judge(broken)
    with pytest.raises(RewardError, match="returned 'abc'"):
        judge(lambda completions: ["abc"] * len(completions), name="f")


def test_keyboard_interrupt_is_not_swallowed():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(interrupted)


@settings(deadline=None, max_examples=25)
@given(broken=st.sets(st.integers(0, 7), max_size=7))
def test_whatever_fails_the_rest_keeps_its_value(broken):
    rollouts = [make_rollout(str(i), prompt_index=i) for i in range(8)]

    def f(completions):
        return [float(c) if int(c) not in broken else 1 / 0 for c in completions]

    assert values(judge(f, rollouts)) == [None if i in broken else float(i) for i in range(8)]


# --- what a function is given -----------------------------------------------------------------------


def test_arguments_of_text_prompts():
    seen = {}

    def spy(prompts, completions, completion_ids, stops, **columns):
        seen.update(
            prompts=prompts, completions=completions, ids=completion_ids, stops=stops, columns=columns
        )
        return [0.0] * len(prompts)

    judge(
        spy,
        [
            make_rollout("a", answer="1", level=3),
            make_rollout("b", prompt_index=1, answer="2", num_tokens=3, stop="length"),
        ],
    )
    assert seen["prompts"] == ["question 0", "question 1"]
    assert seen["completions"] == ["a", "b"]
    assert seen["ids"] == [[7, 8], [7, 8, 9]]  # response tokens alone, as plain lists
    assert seen["stops"] == ["eos", "length"]
    assert seen["columns"] == {"answer": ["1", "2"], "level": [3, None]}


def test_arguments_of_chat_prompts_are_copies():
    messages = ({"role": "user", "content": "hi"},)
    rollout = make_rollout("hello", prompt=messages)

    def spy(prompts, completions):
        assert completions == [[{"role": "assistant", "content": "hello"}]]
        prompts[0][0]["content"] = "changed"
        return [1.0]

    assert values(judge(spy, [rollout])) == [1.0]
    assert messages[0]["content"] == "hi"


def test_only_accepted_arguments_are_passed():
    assert values(judge(lambda completions: [1.0] * len(completions), name="f")) == [1.0] * 4
    assert values(judge(lambda *, completions, nope=2.0: [nope] * len(completions), name="f")) == [2.0] * 4


def test_a_missing_column_is_named_with_what_there_is():
    def needs(completions, gold):
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"needs: needs column 'gold', the data has \['answer'\]"):
        judge(needs)
    with pytest.raises(RewardError, match="a column 'prompts'"):
        judge(right, [make_rollout("1", prompts="x")])


def test_async_functions_with_and_without_a_running_loop():
    async def patient(completions, **_):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    class Callable:
        async def __call__(self, completions):
            return [2.0] * len(completions)

    async def notebook():
        return judge(patient)

    assert values(judge(patient)) == [1.0] * 4
    assert values(asyncio.run(notebook())) == [1.0] * 4
    assert values(judge(Callable())) == [2.0] * 4


def test_what_an_async_function_keeps_serves_every_call():
    """A lock, like a client's connections, belongs to the event loop it was first waited for in."""
    room, calls = asyncio.Semaphore(1), []

    async def remote(completions):
        calls.append(len(completions))
        return await asyncio.gather(*map(one, completions))

    async def one(completion):
        async with room:
            await asyncio.sleep(0)
            return 1.0

    async def notebook():
        return judge(remote, [make_rollout("x", sample=i) for i in range(4)])

    for _ in range(2):
        assert values(judge(remote, [make_rollout("x", sample=i) for i in range(4)])) == [1.0] * 4
    assert values(asyncio.run(notebook())) == [1.0] * 4
    assert calls == [4, 4, 4]  # nothing was asked again


def test_an_async_function_that_exits_does_not_take_the_loop_with_it():
    async def leaves(completions):
        if "leave" in completions:
            raise SystemExit(3)
        return [1.0] * len(completions)

    assert values(judge(leaves, [make_rollout("leave"), make_rollout("stay", sample=1)])) == [None, 1.0]
    assert values(judge(leaves, [make_rollout("stay")])) == [1.0]


def test_async_errors_are_charged_to_their_sample():
    async def fragile(completions):
        results = await asyncio.gather(*map(one, completions), return_exceptions=True)
        return results

    async def one(completion):
        if completion == "x":
            raise TimeoutError("too slow")
        return 1.0

    scored = judge(fragile)
    assert values(scored) == [1.0, 1.0, 1.0, None]
    assert scored[3].errors == ("fragile: raised: TimeoutError: too slow",)


@pytest.mark.parametrize("bad", [3, None, "f"])
def test_functions_must_be_callable(bad):
    with pytest.raises(ConfigError, match="not callable"):
        named(bad)


def test_positional_only_is_refused():
    def f(completions, /):
        return []

    with pytest.raises(ConfigError, match="positional-only"):
        named(f)


# --- files ------------------------------------------------------------------------------------------

SOURCE = """
import dataclasses

@dataclasses.dataclass
class Hidden:
    x: int = 1

not_a_function = 3

def short(completions, answer, **columns):
    return [float(len(c) < 3) for c in completions]
"""


def test_functions_are_loaded_from_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    config = RewardsConfig(functions=(FunctionReward(file=str(path), name="short", weight=2.0),))
    pipeline = build_rewards(config, seed=0)
    assert pipeline.columns == {"answer": "reward function short"}
    assert values(
        pipeline.score_clean([make_rollout("ab", answer="1"), make_rollout("abc", answer="1")])
    ) == [2.0, 0.0]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "f", "no such file"),
        (SOURCE, "nope", r"no function 'nope'; it defines \['Hidden', 'short'\]"),
        (SOURCE, "not_a_function", "not_a_function is 3, not a function"),
        ("def f(:", "f", "raised SyntaxError"),
        ("import not_a_module_at_all", "f", "raised ModuleNotFoundError"),
        ("1 / 0", "f", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, name, message):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_function(str(path), name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_python(tmp_path):
    (tmp_path / "mine.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"ends in \.py"):
        load_function(str(tmp_path / "mine.txt"), "f")


# --- building ---------------------------------------------------------------------------------------


def test_no_function_is_an_error_with_a_fix():
    with pytest.raises(ConfigError, match=r"no reward function.*rewards.functions"):
        build_rewards(RewardsConfig(), seed=0)


def test_functions_of_one_name_stay_apart():
    config = RewardsConfig(functions=(ExactReward(), ExactReward(weight=0.5, column="other")))
    pipeline = build_rewards(config, seed=0, extra_functions=[right, named(right, weight=3.0)])
    scored = pipeline.score_clean([make_rollout("1", answer="1", other="0")])
    assert dict(scored[0].parts) == {"exact": 1.0, "exact_2": 0.0, "right": 1.0, "right_2": 1.0}
    assert scored[0].clean_reward == 5.0
    with pytest.raises(ConfigError, match="names must differ"):
        RewardPipeline([named(right), named(right)], seed=0)


def test_needed_columns():
    config = RewardsConfig(
        functions=(ExactReward(column="a"), MathReward(column="b"), ChoiceReward(column="c")),
        noise=(MajorityNoise(column="a"), SourceNoise(column="d", rates={"a": FlipNoise()})),
    )
    assert build_rewards(config, seed=0, labels={}).columns.keys() == {"a", "b", "c", "d"}


def test_evaluation_has_no_noise():
    config = RewardsConfig(functions=(ExactReward(),), noise={"type": "missing", "rate": 0.9})
    pipeline = build_rewards(config, seed=0)
    rollouts = step_of(prompts=10, samples=4)
    assert [item.reward for item in pipeline.score_clean(rollouts)] == [1.0, 1.0, 0.0, 0.0] * 10
    assert sum(item.reward is None for item in pipeline.score(rollouts, step=0)) > 20
