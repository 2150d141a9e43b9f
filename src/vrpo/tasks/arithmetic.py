"""Generated arithmetic: `12+34=` -> `46`. Needs no data, and is clean by construction.

A problem is a pure function of its row number, and the problem set does not depend on the training
seed. A hash of the problem decides on which side it is, with operands that commute sorted first, so that
`3+4` is never trained on when `4+3` is held out.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, final

import numpy as np

from vrpo.config.tasks import ArithmeticTask
from vrpo.errors import DataError
from vrpo.rng import stream, stream_seed
from vrpo.tasks.encode import encode
from vrpo.tasks.task import Task
from vrpo.types import Prompt

APPLY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mod": operator.mod,
    "gcd": math.gcd,
    "max": max,
}
INFIX = {"add": "+", "sub": "-", "mul": "*"}
COMMUTES = frozenset({"add", "mul", "gcd", "max"})
MAX_HELD_OUT = 1024
"""Most evaluation problems; a small space has fewer."""
CONTEXT_SAMPLE = 1000
"""Prompts per set whose length is checked: all have the same few lengths."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Example: Problem("add", (12, 34)): text "12+34", answer "46"; Problem("gcd", (12, 18)): "gcd(12,18)", "6".
    """

    operation: str
    operands: tuple[int, ...]

    @property
    def text(self) -> str:
        """The problem as it is written."""
        if self.operation in INFIX:
            return INFIX[self.operation].join(map(str, self.operands))
        return f"{self.operation}({','.join(map(str, self.operands))})"

    def written(self, *, spaces: bool) -> str:
        """`text`, with spaces around infix signs and after commas if wanted."""
        if not spaces:
            return self.text
        if self.operation in INFIX:
            return f" {INFIX[self.operation]} ".join(map(str, self.operands))
        return self.text.replace(",", ", ")

    @property
    def results(self) -> list[int]:
        """The result after each operand from the second on; all operations go from left to right."""
        return list(accumulate(self.operands, APPLY[self.operation]))[1:]

    @property
    def answer(self) -> str:
        """The result in decimal."""
        return str(self.results[-1])

    @property
    def work(self) -> str:
        """Every result on the way, the answer last: `46,51` for 12+34+5."""
        return ",".join(map(str, self.results))

    @property
    def key(self) -> str:
        """The same for problems that differ only in the order of operands that commute."""
        operands = sorted(self.operands) if self.operation in COMMUTES else self.operands
        return f"{self.operation}:{','.join(map(str, operands))}"

    def held_out(self, share: float) -> bool:
        """True for `share` of all problems, by hash."""
        return stream_seed(0, "arithmetic", "holdout", self.key) < share * 2.0**63


def draw_problem(config: ArithmeticTask, generator: np.random.Generator) -> Problem:
    """One problem: a uniform operation; per operand a uniform length, then a uniform number of that length."""
    draws = generator.random(1 + 2 * config.terms)
    operation = config.operations[int(draws[0] * len(config.operations))]
    operands = []
    for term in range(config.terms):
        digits = config.min_digits + int(draws[1 + 2 * term] * (config.max_digits - config.min_digits + 1))
        low = 10 ** (digits - 1) if digits > 1 else 0
        if operation == "mod" and term > 0:
            low = max(low, 1)  # nothing is divided by zero
        operands.append(low + int(draws[2 + 2 * term] * (10**digits - low)))
    return Problem(operation, tuple(operands))


@final
class ArithmeticPrompts:
    """Training rows, made when asked for. Row i is the first problem of stream i that is not held out, so
    rows are independent draws and a problem that two rows share has one prompt id."""

    def __init__(self, config: ArithmeticTask, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        # A step draws each row once, but epochs over a small set come back to it.
        self._row = lru_cache(maxsize=65536)(self._make)

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, row: int) -> Prompt:
        return self._row(row)

    def _make(self, row: int) -> Prompt:
        generator = stream(0, "arithmetic", "train", row)
        for _ in range(_patience(1.0 - self._config.holdout)):
            problem = draw_problem(self._config, generator)
            if not problem.held_out(self._config.holdout):
                return make_prompt(problem, "train", self._config, self._tokenizer)
        raise DataError(
            f"arithmetic: holdout={self._config.holdout} leaves no problem to train on; lower task.holdout or raise "
            "task.max_digits"
        )


def _patience(share: float) -> int:
    # What has this share of the draws is missed in all of them with probability exp(-100), exp(-20) at 0.001.
    return min(math.ceil(100.0 / share), 20_000)


def held_out_problems(config: ArithmeticTask) -> Sequence[Problem]:
    """Up to MAX_HELD_OUT distinct held-out problems; 3+4 and 4+3 count as one."""
    generator = stream(0, "arithmetic", "evaluation")
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < MAX_HELD_OUT and misses < _patience(config.holdout):
        problem = draw_problem(config, generator)
        if problem.held_out(config.holdout) and problem.key not in found:
            found[problem.key] = problem
            misses = 0
        else:
            misses += 1
    if not found:
        raise DataError(
            f"arithmetic: holdout={config.holdout} holds out none of these problems; raise task.holdout or "
            "task.max_digits"
        )
    return tuple(found.values())


def make_prompt(problem: Problem, split: str, config: ArithmeticTask, tokenizer: Any) -> Prompt:
    """The problem as the model reads it, with columns answer, work, problem, operation and source."""
    # replace, not format: examples in front of the problem may contain braces.
    text = config.template.replace("{problem}", problem.written(spaces=config.spaces))
    return Prompt(
        prompt_id=f"{split}/{problem.text}",
        prompt=text,
        token_ids=encode(text, tokenizer, chat=config.chat, chat_template_kwargs=config.chat_template_kwargs),
        columns={
            "answer": problem.answer,
            "work": problem.work,
            "problem": problem.text,
            "operation": problem.operation,
            "source": "arithmetic",
        },
    )


def arithmetic_task(config: ArithmeticTask, tokenizer: Any) -> Task:
    """The task of `config`; raises DataError when one side of the split would be empty."""
    train = ArithmeticPrompts(config, tokenizer)
    train[0]  # fails here, not in the first step
    evaluation = [make_prompt(p, "eval", config, tokenizer) for p in held_out_problems(config)]
    return Task(
        "arithmetic", train, evaluation, check_first=CONTEXT_SAMPLE, length_fix="shorten task.template"
    )
