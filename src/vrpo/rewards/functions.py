"""The built-in reward functions, and how to read an answer out of a completion for majority votes.

Each has TRL's signature. For a row whose answer is null it returns None, no verdict; for a sample that cannot be judged
the exception, which the pipeline turns into a missing reward with an error line.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, final

import numpy as np

from vrpo.config.rewards import (
    ChoiceReward,
    ExactReward,
    FunctionReward,
    HttpReward,
    MathReward,
    RewardFunctionConfig,
)
from vrpo.rewards.math_answers import extract_math, is_same_answer

DEFAULT_CHOICES = 8
"""Letters that count where a row has no column `choices`: A to H, so that the word I is no answer."""

Judged = float | Exception | None


def text_of(completion: Any) -> str:
    """The completion as text, also where it comes as one assistant message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@final
class Builtin:
    """The reward function of a configuration, with TRL's signature; it can be sent to another process.

    exact    1.0 when the stripped completion (with `prefix`, its first words, as many as the column has) equals the column, else 0.0
    choice   1.0 when the first choice letter of the completion is the column's letter, else 0.0
    math     1.0 when `math-verify` finds the completion's answer equal to the column, else 0.0

    Of math: a completion without an answer is wrong. In the main thread a comparison is given up after MATH_SECONDS and
    the reward is missing; in other threads there is no time limit, because the library's limit is a signal, so
    call the pipeline from the main thread.
    """

    def __init__(self, config: ExactReward | MathReward | ChoiceReward) -> None:
        self._config = config

    def __call__(self, /, prompts: Any, completions: Sequence[Any], **columns: Any) -> list[Judged]:
        """A verdict for each completion: None where its row's answer is null, the exception where it cannot be judged."""
        return [
            self._judge(completion, {name: values[row] for name, values in columns.items()})
            for row, completion in enumerate(completions)
        ]

    def _judge(self, completion: Any, row: Mapping[str, Any]) -> Judged:
        config = self._config
        answer = row[config.column]
        if _is_null(answer):
            return None
        try:
            text, reference = text_of(completion), _reference(answer, config.column)
            match config:
                case ExactReward(prefix=prefix):
                    return float(
                        _is_exactly(
                            extract_exact(text, prefix=prefix, words=len(reference.split())),
                            reference,
                            answer,
                        )
                    )
                case ChoiceReward():
                    letter = _letter(reference, config.column)
                    count = max(_number_of_choices(row), ascii_uppercase.index(letter) + 1)
                    return float(extract_choice(text, count=count) == letter)
                case MathReward():
                    return float(is_same_answer(reference, text))
        # One sample that cannot be judged must not cost the others their verdict.
        except Exception as error:
            return error


def _is_exactly(found: str, reference: str, answer: Any) -> bool:
    # a column with a gap is read as floats: 29.0 is 29 and may be written either way
    return found == reference or (isinstance(answer, float) and found == str(answer))


def extract_exact(completion: str, *, prefix: bool, words: int = 1) -> str:
    """The stripped completion, or its first `words` words."""
    return " ".join(completion.split()[:words]) if prefix else completion.strip()


def _is_null(answer: Any) -> bool:
    """Null, also as a column of numbers with a gap has it."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def _reference(answer: Any, column: str) -> str:
    if isinstance(answer, float) and math.isfinite(answer):
        answer = np.format_float_positional(answer, trim="-")  # 29, not 29.0, and 0.00001, not 1e-05
    if not str(answer).strip():
        raise ValueError(f"column {column!r} is empty")
    return str(answer).strip()


def _letter(reference: str, column: str) -> str:
    letter = reference.strip("(). ").upper()
    if len(letter) != 1 or letter not in ascii_uppercase:
        raise ValueError(f"column {column!r} holds {reference!r}, a letter is needed")
    return letter


def _number_of_choices(columns: Mapping[str, Any]) -> int:
    choices = columns.get("choices")
    return len(choices) if isinstance(choices, (list, tuple)) else DEFAULT_CHOICES


def extract_choice(completion: str, *, count: int = DEFAULT_CHOICES) -> str | None:
    """The first of the first `count` capital letters that stands alone, as in `B`, `(B)`, `B.`, `\\boxed{B}`.

    A lower-case letter counts when it is the whole completion; otherwise `a` would be found in most sentences.
    """
    letters = ascii_uppercase[:count]
    alone = completion.strip().strip("().*:").upper()
    if len(alone) == 1 and alone in letters:
        return alone
    found = re.search(rf"(?<![A-Za-z0-9_])[{letters}](?![A-Za-z0-9_'’])", completion)
    return found.group() if found else None


def answer_extractor(
    config: RewardFunctionConfig, columns: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[str], str | None]:
    """Completion -> the answer that `config` would judge, as text: what a majority vote counts.

    For a user's function it is the stripped completion.

    Args:
        config: the function.
        columns: the row's: `choices` says how many letters there are.
    """
    match config:
        case ExactReward(prefix=prefix):
            return lambda completion: extract_exact(completion, prefix=prefix) or None
        case MathReward():
            return extract_math
        case ChoiceReward():
            return partial(extract_choice, count=_number_of_choices(columns))
        case FunctionReward() | HttpReward():
            return lambda completion: completion.strip() or None
