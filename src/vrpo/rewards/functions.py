"""The built-in reward functions, and how to read an answer out of a completion for majority votes.

Each has TRL's signature. For a row whose answer is null it returns None, no verdict; for a sample that cannot be judged
the exception, which the pipeline turns into a missing reward with an error line.
"""

import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from string import ascii_uppercase
from types import MappingProxyType, ModuleType
from typing import Any, final

from vrpo.config.rewards import (
    ChoiceReward,
    ExactReward,
    FunctionReward,
    HttpReward,
    MathReward,
    RewardFunctionConfig,
)

MATH_SECONDS = 5
"""Longest a parse or a comparison may take; `9^{9^{9}}` never ends by itself."""

DEFAULT_CHOICES = 8
"""Letters that count where a row has no column `choices`: A to H, so that the word I is no answer."""

Judged = float | Exception | None


def text_of(completion: Any) -> str:
    """The completion as text, also where it comes as one assistant message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@final
class Builtin:
    """The reward function of a configuration, with TRL's signature; it can be sent to another process.

    exact    1.0 when the stripped completion (with `prefix`, its first word) equals the column, else 0.0
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
                    return float(_is_exactly(extract_exact(text, prefix=prefix), reference, answer))
                case ChoiceReward():
                    letter = _letter(reference, config.column)
                    count = max(_number_of_choices(row), ascii_uppercase.index(letter) + 1)
                    return float(extract_choice(text, count=count) == letter)
                case MathReward():
                    return float(_verify(reference, text))
        # One sample that cannot be judged must not cost the others their verdict.
        except Exception as error:
            return error


def _is_exactly(found: str, reference: str, answer: Any) -> bool:
    # a column with a gap is read as floats: 29.0 is 29 and may be written either way
    return found == reference or (isinstance(answer, float) and found == str(answer))


def extract_exact(completion: str, *, prefix: bool) -> str:
    """The stripped completion, or its first word."""
    words = completion.split(maxsplit=1)
    return words[0] if prefix and words else completion.strip()


def _is_null(answer: Any) -> bool:
    """Null, also as a column of numbers with a gap has it."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def _reference(answer: Any, column: str) -> str:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
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


@lru_cache(maxsize=1)
def _math_verify() -> ModuleType:
    import math_verify

    # It warns on stderr about time limits; here a timeout becomes an error line of its sample.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


def _seconds() -> int | None:
    main = threading.current_thread() is threading.main_thread()
    return MATH_SECONDS if main and os.name == "posix" else None


@lru_cache(maxsize=8192)
def _parse_reference(answer: str) -> list[Any]:
    library = _math_verify()
    # An escaped \$ is an amount of dollars; a bare one already delimits LaTeX.
    has_delimiter = re.search(r"(?<!\\)\$|\\boxed", answer)
    delimited = answer if has_delimiter else f"\\boxed{{{answer}}}"
    for text in (delimited, answer):
        parsed = library.parse(text, parsing_timeout=_seconds(), raise_on_error=True)
        if parsed:
            return parsed
    raise ValueError(f"reference answer {answer!r:.60} is no mathematics")


def _parse(completion: str) -> list[Any]:
    return _math_verify().parse(completion, parsing_timeout=_seconds(), raise_on_error=True)


def _verify(answer: str, completion: str) -> bool:
    from math_verify.errors import TimeoutException

    library = _math_verify()
    try:
        gold, found = _parse_reference(answer), _parse(completion)
        return library.verify(gold, found, timeout_seconds=_seconds(), raise_on_error=True)
    # Not a subclass of Exception, so nothing further up would catch it.
    except TimeoutException as error:
        raise TimeoutError(f"gave up after {MATH_SECONDS} s on {completion[-40:]!r}") from error


def extract_math(completion: str) -> str | None:
    """The completion's final answer as it is written there; None when there is none."""
    from math_verify.errors import TimeoutException

    try:
        parsed = _parse(completion)
    # In a vote an answer that cannot be read is no answer, whatever the reason (TimeoutException is not an Exception).
    except (Exception, TimeoutException):
        return None
    texts = [item for item in parsed if isinstance(item, str) and item.strip()]
    return texts[-1].strip() if texts else None


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
