"""Answers to maths problems: what a reference means, and whether a completion says the same.

`math-verify` reads LaTeX and takes letters for variables: \\boxed{18 eggs} is 18 E g g s, and "no" equals "on". References of data sets are
often not LaTeX. So what a reference is decides how it is read:

    18 eggs, 1e-05  a number, \\boxed{18}, 1 \\times 10^{-5}; the unit is dropped, also in a completion
    Monday, True    words, compared as text
    all else        LaTeX
"""

import logging
import os
import re
import threading
from functools import lru_cache
from types import ModuleType
from typing import Any

MATH_SECONDS = 5
"""Longest a parse or a comparison may take; `9^{9^{9}}` never ends by itself."""

_NUMBER = (
    r"(?P<number>[-+−]?(?:\d{1,3}(?: \d{3})+(?!\d)|\d[\d,]*|(?=\.\d))(?:\.\d+)?)"
    r"(?:[eE](?P<exponent>[-+]?\d+)|(?P<fraction>(?: \d+)? ?/ ?\d+))?"
)
_UNIT = (
    r"[°€£¥$]| (?:[^\W\d_]{3,}|cm|mm|km|kg|mg|ml|in|ft|mi|lb|oz|hr|m/s)(?![^\W\d_])[^\d\\{}=()<>]*(?:\^\d)?"
)
"""What may follow a number; words after a space, since 2xy is a product."""
_QUANTITY = re.compile(rf"[$€£¥]? ?{_NUMBER}(?P<percent> ?\\?%)?(?P<unit>{_UNIT})?\.?")
_WORDS = re.compile(r"(?:[^\W\d_]+|\d+(?![^\W\d_])|[ ,.:;'’-])+")
_MATHEMATICAL = re.compile(r"and|or|infinity|infty|inf|pi|sqrt|frac|sin|cos|tan|cot|csc|log|ln|exp")
"""Words of two and more letters that are no unit and no answer in words."""


@lru_cache(maxsize=1)
def _math_verify() -> ModuleType:
    import math_verify

    # It warns on stderr about time limits; here a timeout becomes an error line of its sample.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


def _seconds() -> int | None:
    main = threading.current_thread() is threading.main_thread()
    return MATH_SECONDS if main and os.name == "posix" else None


def is_same_answer(reference: str, completion: str) -> bool:
    """Whether the completion's final answer is the reference.

    Raises:
        ValueError: the reference is neither mathematics nor words.
        TimeoutError: the comparison took longer than MATH_SECONDS.
    """
    from math_verify.errors import TimeoutException

    try:
        found = _parse(completion)
        written = [_plain(text) for text in found if isinstance(text, str)]
        words = _plain(reference).casefold()
        if _is_words(words):
            return words in {text.casefold() for text in (*written, _plain(_last_box(completion)))}
        if _plain(reference) in written:
            return True
        gold = _parse_reference(reference)
        without_unit = [number for text in written if (number := _quantity(text))]
        for answer in (found, *map(_parse_boxed, without_unit)):
            if _math_verify().verify(gold, answer, timeout_seconds=_seconds(), raise_on_error=True):
                return True
        return False
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


@lru_cache(maxsize=8192)
def _parse_reference(answer: str) -> list[Any]:
    # An escaped \$ is an amount of dollars; a bare one already delimits LaTeX.
    if re.search(r"(?<!\\)\$|\\boxed", answer):
        candidates = [answer]
    elif number := _quantity(answer):
        candidates = [f"\\boxed{{{number}}}", answer]
    else:
        candidates = [f"\\boxed{{{answer}}}", answer]
    for text in candidates:
        parsed = _parse(text)
        if parsed:
            return parsed
    raise ValueError(f"reference answer {answer!r:.60} is no mathematics")


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = _math_verify().parse(text, parsing_timeout=_seconds(), raise_on_error=True)
    return parsed


def _parse_boxed(text: str) -> list[Any]:
    return _parse(f"\\boxed{{{text}}}")


def _last_box(completion: str) -> str:
    """What the last \\boxed{} holds, as it is written; `math-verify` gives less of some words. No box holds nothing."""
    _, box, rest = completion.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
    return ""


def _plain(text: str) -> str:
    """Text without its \\text{}, spaces single."""
    inside = re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r" \1 ", text)
    return " ".join(inside.split()).rstrip(".")


def _is_words(plain: str) -> bool:
    """Whether an answer is words (or a date, or a duration in words), which as mathematics would be products."""
    if _quantity(plain) or not _WORDS.fullmatch(plain):
        return False
    words = [w for w in re.findall(r"[^\W\d_]{3,}", plain) if not _MATHEMATICAL.fullmatch(w)]
    return bool(words) or plain == "no" or re.fullmatch(r"\d{4}-\d{1,2}-\d{1,2}", plain) is not None


def _quantity(text: str) -> str | None:
    """The number of `18 eggs`, `1 1/2 cups`, `€5`, `12 000`, `90°` or `3e8 m/s` as LaTeX; None where the text is something else."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        return None
    words = re.findall(r"[^\W\d_]+", (found["unit"] or "").casefold())
    if any(map(_MATHEMATICAL.fullmatch, words)):
        return None
    number, fraction = found["number"].replace(" ", ""), found["fraction"] or ""
    if found["exponent"] is not None:
        number += f" \\times 10^{{{int(found['exponent'])}}}"
    mixed = "+" if fraction.strip()[0:1].isdigit() else ""
    return number + mixed + fraction.replace(" ", "") + (found["percent"] or "")
