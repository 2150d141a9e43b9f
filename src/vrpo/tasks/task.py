"""What every task gives: an endless training stream and a fixed evaluation set."""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, final, runtime_checkable

import numpy as np

from vrpo.errors import DataError
from vrpo.rng import stream
from vrpo.types import Prompt

MAX_ANSWERS = 1000
"""Prompts that `Task.answers` looks at."""


@runtime_checkable
class Prompts(Protocol):
    """A sequence of prompts: a list, or one that makes each prompt when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Prompt: ...


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Cached because a step reads a few positions of it; an evaluation or a second seed needs its own.
    return stream(seed, "epoch", epoch).permutation(size)


@final
class Task:
    """Stage 1: prompts to train on and held-out prompts, without any state.

    Position i of the training stream is row `permutation(i // train_size)[i % train_size]`: every epoch
    visits each row once, in an order of its own. `draw` is a pure function of (seed, step, count), so a
    resumed run needs nothing but its step number.

    Example: task.draw(seed=0, step=3, count=32) are positions 96..127.
    """

    def __init__(
        self,
        name: str,
        train: Prompts,
        evaluation: Prompts,
        *,
        note: str = "",
        check_first: int | None = None,
        length_fix: str = "set max_prompt_tokens (task.max_prompt_tokens in a file) to {limit}",
    ) -> None:
        """Wrap two prompt sequences.

        Args:
            name: the task's type, for `describe`.
            train: training prompts.
            evaluation: held-out prompts.
            note: appended to `describe`, such as how many rows were dropped.
            check_first: how many prompts of each set are looked at before a run, where all are alike; None is all of them.
            length_fix: what to do about a prompt that is too long; {limit} is replaced.
        """
        if not len(train):
            raise DataError(
                f"{name}: 0 train rows, at least 1 is needed; give more rows or lower holdout (task.holdout in a file)"
            )
        if not len(evaluation):
            raise DataError(
                f"{name}: 0 held-out rows, at least 1 is needed; raise holdout or give held-out rows (eval_dataset; task.holdout, task.eval_data in a file)"
            )
        self._name = name
        self._train = train
        self._evaluation = evaluation
        self._note = note
        self._check_first = check_first
        self._length_fix = length_fix

    @property
    def train_size(self) -> int:
        """Rows of one epoch."""
        return len(self._train)

    @property
    def eval_size(self) -> int:
        """Held-out rows."""
        return len(self._evaluation)

    @property
    def columns(self) -> frozenset[str]:
        """Columns that every checked prompt has; a reward function may ask for these."""
        names: frozenset[str] | None = None
        for prompt in self._checked():
            names = frozenset(prompt.columns) if names is None else names.intersection(prompt.columns)
        return names or frozenset()

    def without(self, column: str) -> tuple[str, int, int, list[str]]:
        """The first checked prompt that lacks a column, how many do, of how many, and the columns it has."""
        checked = list(self._checked())
        lacking = [prompt for prompt in checked if column not in prompt.columns]
        return lacking[0].prompt_id, len(lacking), len(checked), sorted(lacking[0].columns)

    def first_with(self, columns: Collection[str]) -> tuple[str, str] | None:
        """The first checked prompt that has one of these columns, and that column; None where no prompt has one."""
        return next(
            (
                (prompt.prompt_id, name)
                for prompt in self._checked()
                for name in columns
                if name in prompt.columns
            ),
            None,
        )

    def draw(self, *, seed: int, step: int, count: int) -> list[Prompt]:
        """Positions step * count .. step * count + count - 1 of the training stream of `seed`."""
        prompts = []
        for position in range(step * count, (step + 1) * count):
            epoch, offset = divmod(position, self.train_size)
            prompts.append(self._train[int(_permutation(seed, epoch, self.train_size)[offset])])
        return prompts

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts of a fixed order; fewer when there are fewer."""
        order = stream(0, "evaluation order").permutation(self.eval_size)
        return [self._evaluation[int(row)] for row in order[:count]]

    def train_prompts(self) -> Iterator[Prompt]:
        """Every training prompt once, in row order."""
        return self._first(self._train, None)

    def checked_train_prompts(self) -> Iterator[Prompt]:
        """The training prompts that are looked at before a run: all of a data set, a sample where they are generated alike."""
        return self._first(self._train, self._check_first)

    def answers(self, column: str) -> tuple[Any, ...]:
        """Distinct values of `column` among the first training prompts, without null: where wrong labels come from."""
        values: dict[str, Any] = {}
        for prompt in islice(self.train_prompts(), MAX_ANSWERS):
            if column not in prompt.columns:
                raise DataError(
                    f"prompt {prompt.prompt_id} has no column {column!r}; it has {sorted(prompt.columns)}, "
                    "name one of these"
                )
            value = prompt.columns[column]
            # null, also as a column of numbers with a gap has it, is no answer and so no wrong one
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                values.setdefault(repr(value), value)
        if not values:
            raise DataError(
                f"column {column!r} is null in all of the first {min(self.train_size, MAX_ANSWERS):,} training rows, there is no answer to "
                "take; name another column"
            )
        return tuple(values.values())

    def check_context(
        self, max_positions: int, max_completion_length: int, *, whose: str = "the model's"
    ) -> None:
        """Raise DataError unless every prompt and its longest completion fit the context.

        Args:
            max_positions: tokens the model can read.
            max_completion_length: most tokens of a response.
            whose: context it is, for the message.
        """
        limit = max_positions - max_completion_length
        for prompt in self._checked():
            length = len(prompt.token_ids)
            if length > limit:
                drop = self._length_fix.format(limit=limit) if limit > 0 else ""
                lower = "lower rollout.max_completion_length" if length < max_positions else ""
                raise DataError(
                    f"prompt {prompt.prompt_id} has {length} tokens, and with max_completion_length="
                    f"{max_completion_length} that is more than {whose} context of {max_positions}; "
                    f"{' or '.join(filter(None, (drop, lower))) or 'drop or shorten it'}"
                )

    def fingerprint(self) -> str:
        """SHA-256 over sizes, ids, tokens and columns of every checked prompt: does a resumed run read the same data?"""
        digest = hashlib.sha256(f"{self._name} {self.train_size} {self.eval_size}".encode())
        for prompt in self._checked():
            digest.update(prompt.prompt_id.encode("utf-8", "backslashreplace"))
            digest.update(np.ascontiguousarray(prompt.token_ids).tobytes())
            digest.update(_stable(prompt.columns).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: the task, its sizes, and what was left out."""
        return f"{self._name}: {self.train_size:,} train rows, {self.eval_size:,} held out{self._note}"

    def _checked(self) -> Iterator[Prompt]:
        yield from self.checked_train_prompts()
        yield from self._first(self._evaluation, self._check_first)

    @staticmethod
    def _first(prompts: Prompts, count: int | None) -> Iterator[Prompt]:
        size = len(prompts) if count is None else min(count, len(prompts))
        return (prompts[row] for row in range(size))


def _stable(columns: Mapping[str, Any]) -> str:
    """Text of the columns that is the same in every process: an object's repr may hold its address."""
    try:
        return json.dumps(list(columns.items()), default=_told, skipkeys=True)
    except (ValueError, RecursionError):  # a number of 4,300 digits, a list in itself or nested 1,000 deep
        return json.dumps([(name, type(value).__name__) for name, value in columns.items()])


def _told(value: Any) -> Any:
    """What JSON can hold of an object: its numbers, its text where that has no address in it, or its type."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return (
        repr(value)
        if isinstance(value, (Decimal, date, time, set, frozenset, bytes))
        else type(value).__name__
    )
