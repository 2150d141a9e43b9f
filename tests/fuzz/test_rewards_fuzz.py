"""Whatever a reward function returns: each sample has a finite reward or none, and nothing wrong becomes 0."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.cases import FLOATS, INTEGERS, VALUES, fuzz
from tests.stages.data.samples import step_of
from vrpo.errors import RewardError
from vrpo.rewards import RewardPipeline
from vrpo.rewards.user import named
from vrpo.types import ScoredRollout

STEP = step_of(prompts=2, samples=4)
LARGEST = float(np.finfo(np.float32).max)
ERRORS = st.sampled_from(
    [
        ValueError("two\nlines"),
        SystemExit(0),
        RecursionError(),
        KeyError("\ud800"),
        StopIteration(),
        Exception(),
    ]
)
NUMBERS = st.one_of(
    FLOATS,
    INTEGERS,
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.builds(np.float32, st.floats(-2, 2, width=32)),
    st.builds(np.float64, FLOATS),
    st.sampled_from(
        [np.int8(3), np.bool_(True), np.float16("inf"), np.array(1.0), np.array([0.5]), np.array([1, 2])]
    ),
    st.sampled_from(
        [torch.tensor(0.5), torch.tensor([1.0]), torch.ones(2), torch.tensor(float("nan")), torch.ones(0)]
    ),
    st.sampled_from([Decimal("0.5"), Decimal("NaN"), Fraction(1, 3), Fraction(10**400), 1j, np.complex64(1)]),
)
OUTPUTS = st.one_of(NUMBERS, NUMBERS, st.none(), VALUES, ERRORS, st.builds(object), st.binary(max_size=2))
WRONG_CONTAINERS = st.one_of(
    VALUES,
    st.lists(OUTPUTS, max_size=9),
    st.lists(OUTPUTS, max_size=9).map(tuple),
    st.dictionaries(st.integers(0, 8), OUTPUTS, max_size=8),
    st.builds(np.ones, st.integers(0, 9)),
    st.builds(torch.ones, st.integers(0, 9)),
    st.builds(lambda size: (1.0 for _ in range(size)), st.integers(7, 9)),
    st.builds(object),
)


def as_number(value: Any) -> float | None:
    """The finite number of a returned value, None where it is none: what the rewards are compared with."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return None
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        if isinstance(value, np.ndarray) and value.size != 1:
            return None
        value = value.item()
    if not isinstance(value, (int, float, Fraction, Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def judged(functions: list, *, step: int, clean: bool) -> list[ScoredRollout] | None:
    """Scores of the step in its order; None where the step is refused."""
    pipeline = RewardPipeline(functions, seed=0)
    try:
        scored = pipeline.score_clean(STEP) if clean else pipeline.score(STEP, step=step)
    except RewardError as error:
        assert str(error).strip()
        return None
    assert [item.rollout.sample_id for item in scored] == [rollout.sample_id for rollout in STEP]
    for item in scored:
        for reward in (item.reward, item.clean_reward, *item.parts.values()):
            assert reward is None or (isinstance(reward, (int, float)) and math.isfinite(np.float32(reward)))
        assert all(isinstance(line, str) and line.strip() for line in item.errors)
    return scored


@fuzz(6)
@given(
    st.lists(OUTPUTS, min_size=len(STEP), max_size=len(STEP)),
    st.booleans(),
    st.sampled_from([1.0, -0.5]),
)
def test_a_value_for_each_response(outputs, clean, weight):
    returned = iter(outputs)
    answers = {rollout.sample_id: next(returned) for rollout in STEP}

    def function(completions, **_):
        return list(answers.values())

    scored = judged([named(function, weight=weight, name="f")], step=0, clean=clean)
    if scored is None:  # a whole step is refused only when no sample has a verdict
        assert all(as_number(value) is None for value in outputs)
        return
    for item, value in zip(scored, outputs, strict=True):
        number = as_number(value)
        if item.parts["f"] is None:
            assert number is None or isinstance(value, Decimal)
            assert item.reward is None
        else:
            assert number is not None and item.parts["f"] == number


@fuzz(3)
@given(st.lists(st.one_of(NUMBERS, ERRORS, st.none()), min_size=len(STEP), max_size=len(STEP)), st.booleans())
def test_a_function_that_raises_costs_the_samples_it_raised_for(outputs, clean):
    ids = {id(rollout.token_ids): value for rollout, value in zip(STEP, outputs, strict=True)}
    assert len(ids) == len(STEP)
    order = {len(rollout.token_ids): [] for rollout in STEP}
    for rollout, value in zip(STEP, outputs, strict=True):
        order[len(rollout.token_ids)].append(value)
    first = {length: values[0] for length, values in order.items()}

    def function(completion_ids, **_):
        values = [first[len(tokens) + 2] for tokens in completion_ids]
        for value in values:
            if isinstance(value, BaseException):
                raise value
        return values

    scored = judged([named(function, name="f")], step=1, clean=clean)
    expected = [first[len(rollout.token_ids)] for rollout in STEP]
    if scored is None:
        assert all(as_number(value) is None for value in expected)
        return
    for item, value in zip(scored, expected, strict=True):
        if isinstance(value, BaseException):
            assert item.reward is None and item.errors
        elif item.reward is not None:
            assert item.reward == as_number(value)


@fuzz(2)
@given(WRONG_CONTAINERS)
def test_any_container(returned):
    def function(completions, **_):
        return returned

    scored = judged([named(function, name="f")], step=2, clean=True)
    if scored is not None:
        values = list(returned)
        assert len(values) == len(STEP)
        for item, value in zip(scored, values, strict=True):
            assert item.reward is None or item.reward == as_number(value)


@fuzz(2)
@given(st.lists(st.tuples(NUMBERS | st.none(), NUMBERS | st.none()), min_size=len(STEP), max_size=len(STEP)))
def test_a_sum_is_missing_as_soon_as_one_part_is(pairs):
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    functions = [
        named(lambda completions, **_: list(left), name="left"),
        named(lambda completions, **_: list(right), weight=0.5, name="right"),
    ]
    for item in judged(functions, step=3, clean=True) or []:
        if None in item.parts.values():
            assert item.reward is None
        elif item.reward is not None:
            assert item.reward == item.parts["left"] + 0.5 * item.parts["right"]
