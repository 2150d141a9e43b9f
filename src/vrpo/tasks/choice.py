"""Multiple choice: the answer is a letter."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from vrpo.errors import DataError
from vrpo.rng import stream
from vrpo.tasks.data import Row, shown
from vrpo.tasks.math import fill

REQUIRED = ("question", "choices", "answer")


def choice_prompt(row: Row, template: str, *, shuffle: bool) -> tuple[str, dict[str, Any]]:
    """(prompt, columns) with `choices` a list of texts and `answer` a letter.

    Choices come as a list of texts or as ARC's {"text": [...], "label": [...]}. The answer is a label, a
    letter, or a text "1".."26" counted from 1; None, no answer, stays None. With `shuffle` the choices are
    permuted by a hash of the row's id and the letter moves along; letters in other columns do not.
    """
    texts, labels = _choices(row)
    right = _position(row, texts, labels) if row.has_answer() else None
    if shuffle:
        order = stream(0, "choices", row.row_id).permutation(len(texts)).tolist()
        texts = [texts[i] for i in order]
        right = None if right is None else order.index(right)
    row.text("question")
    answer = None if right is None else ascii_uppercase[right]
    columns = {**row.values, "choices": texts, "answer": answer}
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    return fill(template, row, {**columns, "options": options}), columns


def _choices(row: Row) -> tuple[list[str], list[str]]:
    value = row.values.get("choices")
    texts = value.get("text") if isinstance(value, Mapping) else value
    labels = value.get("label") if isinstance(value, Mapping) else list(ascii_uppercase)
    if (
        not isinstance(texts, (list, tuple))
        or not 2 <= len(texts) <= len(ascii_uppercase)
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(labels, (list, tuple))
        or len(labels) < len(texts)
        or not all(isinstance(label, str) or type(label) is int for label in labels)
    ):
        raise row.error("choices", value, "a list of 2 to 26 texts, or {text: [...], label: [...]},")
    if isinstance(value, Mapping) and len(labels) != len(texts):
        raise row.error("choices", value, "one label for each text")
    names = [str(label).strip().upper() for label in labels[: len(texts)]]
    if len(set(names)) < len(names):
        raise row.error("choices", value, "a label of its own for each text")
    return list(texts), names


def _position(row: Row, texts: list[str], labels: list[str]) -> int:
    """Where the right choice stands.

    Where the row has labels, an answer that is one of them is never taken for a text: ARC's answers are labels.
    """
    named = _named(row, labels)
    answer = row.values["answer"].strip()
    is_label = answer.upper() in labels
    equal = [i for i, text in enumerate(texts) if text.strip() == answer]
    if equal and named not in equal and not (is_label and isinstance(row.values["choices"], Mapping)):
        letters = f"{labels[named]} or {labels[equal[0]]}"
        fix = "give choices as {text: [...], label: [...]}" if is_label else f"write {letters}"
        raise DataError(
            f"{row.label}: answer {shown(answer)} names choice {labels[named]}, {shown(texts[named])}, and is the text of choice "
            f"{labels[equal[0]]}, and which is meant cannot be known; {fix}"
        )
    return named


def _named(row: Row, labels: list[str]) -> int:
    """The position that the answer names as a label, a letter or a number."""
    answer = row.values.get("answer")
    if isinstance(answer, str):
        name = answer.strip().upper()
        if name in labels:
            return labels.index(name)
        # Some ARC rows count 1..4 where others use letters.
        for scheme in (list(ascii_uppercase), [str(i) for i in range(1, 27)]):
            # Where the row has a letter of its own, such as F, another letter is a mistake.
            if name in scheme[: len(labels)] and not set(labels) & set(scheme):
                return scheme.index(name)
    # A bare number is refused: whether it counts from 0 or 1 cannot be seen.
    raise row.error("answer", answer, f"one of the labels {labels} as text")
