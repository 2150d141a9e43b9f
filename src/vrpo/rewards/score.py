"""Stage 3: rollouts -> verdicts. The clean reward first, then the noise on a copy of it."""

from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, final

import numpy as np
from torch import Tensor

from vrpo.config.rewards import Combine
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards.isolation import Fault, fault_kind
from vrpo.rewards.noise import Draws, NoiseModel, Verdict
from vrpo.rewards.noise_additive import Missing
from vrpo.rewards.user import NamedFunction, call, one_line
from vrpo.types import Rollout, ScoredRollout


@final
class RewardPipeline:
    """Judges completions with every function, and for training puts the noise on the sum.

        verdict      = sum_f weight_f * value_f        missing as soon as one value is; with combine "answered"
                                                       over the functions that returned a number
        reward       = noise_n(... noise_1(verdict))   of the functions
        clean_reward = verdict                         of gold, or without it of the functions

    Order and length are kept. A function that raises is asked again one sample at a time, so that one bad
    sample costs only itself; a sample that raises, or gets something that is no finite number, is missing and
    has an error line. When every sample failed that way, the step is a RewardError.
    """

    def __init__(
        self,
        functions: Sequence[NamedFunction],
        noise: Sequence[NoiseModel] = (),
        *,
        gold: Sequence[NamedFunction] = (),
        seed: int,
        max_failed: float = 1.0,
        combine: Combine = "all",
    ) -> None:
        """Fix what judges.

        Args:
            functions: at least one, with distinct names.
            noise: applied in order, each to the output of the one before.
            gold: functions that are trusted; they judge evaluations, and in training metrics alone.
            seed: the run's seed; noise draws come from streams named by kind, position in `noise` and sample.
            max_failed: share of a step's responses that a function may fail on.
            combine: what a None makes of the sum (`RewardsConfig.combine`).
        """
        if not functions:
            raise ConfigError(
                "no reward function, at least 1 is needed; add one to rewards.functions, such as {type: exact}"
            )
        for names in ([function.name for function in some] for some in (functions, gold)):
            if len(set(names)) < len(names):
                raise ConfigError(f"reward functions are named {names}, names must differ; rename one")
        self._functions = tuple(functions)
        self._gold = tuple(gold)
        self._max_failed = max_failed
        self._combine: Combine = combine
        self._noise = tuple((model, Draws(seed, model.kind, index)) for index, model in enumerate(noise))

    def close(self) -> None:
        """End the processes of isolated functions; they are started again when they are needed."""
        for function in (*self._functions, *self._gold):
            function.close()

    @property
    def has_gold(self) -> bool:
        """Whether functions that are trusted judge beside those that are learned from, perhaps in other units."""
        return bool(self._gold)

    @property
    def knows_clean(self) -> bool:
        """Whether the clean reward may be another than the seen one: with gold, or noise of our own that does more than withhold it."""
        return bool(self._gold) or any(model.kind != Missing.kind for model, _ in self._noise)

    @property
    def judged_by(self) -> str:
        """The setting whose functions judge evaluations."""
        return "rewards.gold" if self._gold else "rewards.functions"

    @property
    def columns(self) -> dict[str, str]:
        """Columns that the functions and the noise cannot do without -> the first that needs it."""
        needs = [(f"reward function {f.name}", f.needs) for f in (*self._functions, *self._gold)]
        needs += [(f"{model.kind} noise", frozenset(model.needs)) for model, _ in self._noise]
        return {column: who for who, some in reversed(needs) for column in some}

    def score(self, rollouts: Sequence[Rollout], *, step: int) -> list[ScoredRollout]:
        """Verdicts for training: `reward` with noise, `clean_reward` by gold or without noise.

        Args:
            rollouts: the samples of one step; noise that is defined over a step needs all of them.
            step: number of the training step; names the draws of noise that is per prompt and step.
        """
        scored = self._scored(rollouts, self._functions)
        for model, draws in self._noise:
            scored = model.apply(scored, step=step, draws=draws, judge=self.judge)
        if not self._gold:
            return scored
        # gold that fails costs metrics, not the run, unless it says on_error: raise
        trusted = self._judge(self._gold, rollouts, {}, 1.0)
        return [
            replace(item, clean_reward=verdict.reward, gold_errors=verdict.errors)
            for item, verdict in zip(scored, trusted, strict=True)
        ]

    def score_clean(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Verdicts for evaluation, by gold where there is some: no noise, `reward` is `clean_reward`."""
        return self._scored(rollouts, self._gold or self._functions)

    def judge(self, rollouts: Sequence[Rollout], replaced: Mapping[str, Sequence[Any]]) -> list[Verdict]:
        """Verdicts with some columns replaced, one list entry per rollout: how label noise asks again."""
        # 1: a few of a step's responses make no share of it
        return self._judge(self._functions, rollouts, replaced, 1.0)

    def _scored(self, rollouts: Sequence[Rollout], functions: Sequence[NamedFunction]) -> list[ScoredRollout]:
        scored = [
            ScoredRollout(
                rollout=rollout,
                parts=verdict.parts,
                clean_reward=verdict.reward,
                reward=verdict.reward,
                errors=verdict.errors,
            )
            for rollout, verdict in zip(
                rollouts, self._judge(functions, rollouts, {}, self._max_failed), strict=True
            )
        ]
        if scored and all(item.clean_reward is None and item.errors for item in scored):
            raise RewardError(
                f"none of {len(scored)} completions could be judged; first cause: {scored[0].errors[0]}; fix that, or "
                "return None where there is no verdict"
            )
        return scored

    def _judge(
        self,
        functions: Sequence[NamedFunction],
        rollouts: Sequence[Rollout],
        replaced: Mapping[str, Sequence[Any]],
        max_failed: float,
    ) -> list[Verdict]:
        """Weighted sums of what the functions say, some columns replaced."""
        columns = [_evaluate(function, rollouts, replaced, max_failed=max_failed) for function in functions]
        verdicts = []
        for row in zip(*columns, strict=True):
            parts = {f.name: value for f, (value, _) in zip(functions, row, strict=True)}
            errors = tuple(error for _, error in row if error is not None)
            total = None if errors else _weighted_sum(functions, list(parts.values()), self._combine)
            if total is not None and _number(total) is None:
                total, errors = None, (f"sum: bad_value: the weighted sum {total:g} is beyond fp32",)
            verdicts.append(Verdict(parts=parts, reward=total, errors=errors))
        return verdicts


def _weighted_sum(
    functions: Sequence[NamedFunction], values: Sequence[float | None], combine: Combine
) -> float | None:
    """None where a value is missing; with `answered` where every value that counts is."""
    said = [(f.weight, value) for f, value in zip(functions, values, strict=True) if value is not None]
    # a function of weight 0 is there to be looked at: alone it makes no reward of 0
    missing = len(said) < len(values) if combine == "all" else not any(weight for weight, _ in said)
    return None if missing else sum(weight * value for weight, value in said)


HANGS_IN_A_ROW = 10
"""Responses, one by one, that a function may spend its whole time limit on before the rest are not asked again: more than the
usual eight answers to one prompt, which may all be hard to judge."""

LARGEST = float(np.finfo(np.float32).max)
"""What the learner's fp32 can hold; a larger reward would be infinite there."""

Outcome = tuple[float | None, str | None]
"""(value, error line); a value is missing without an error where the function returned None."""


def _evaluate(
    function: NamedFunction,
    rollouts: Sequence[Rollout],
    replaced: Mapping[str, Sequence[Any]],
    *,
    max_failed: float,
) -> list[Outcome]:
    """All at once; then, one by one, those that a failure may have cost their verdict.

    Raises:
        RewardError: a broken contract; more failures than `max_failed` of them, counted as they come, so that a
            function that always hangs is not waited for once a response; a failure the function may not have.
    """
    if not rollouts:
        return []
    try:
        outcomes = [_read(function.name, value) for value in call(function, rollouts, replaced)]
        again = [row for row, (_, error) in enumerate(outcomes) if error is not None]
        tries = function.retries
    except RewardError:
        raise
    # It is the user's code: whatever it raises, sys.exit() too, is charged to the sample that caused it.
    except (Exception, SystemExit, CancelledError) as error:
        outcomes = [_fault(function.name, error)] * len(rollouts)
        again = list(range(len(rollouts)))
        tries = function.retries + (len(rollouts) > 1 and function.asks_again)
    failed = hangs = 0
    for row in again:
        for _ in range(tries if hangs < HANGS_IN_A_ROW else 0):
            if outcomes[row][1] is None:
                break
            columns = {name: [column[row]] for name, column in replaced.items()}
            outcomes[row] = _ask_again(function, rollouts[row], columns)
        line = outcomes[row][1]
        hangs = hangs + 1 if line is not None and fault_kind(line) == "timeout" else 0
        failed += line is not None
        if failed > max_failed * len(rollouts) or (failed and function.on_error == "raise"):
            rule = (
                "on_error: raise" if function.on_error == "raise" else f"rewards.max_failed is {max_failed:g}"
            )
            raise RewardError(
                f"at least {failed} of {len(rollouts)} verdicts failed, and {rule}; {outcomes[row][1]}; mend what judges, or raise what "
                "it may fail on"
            )
    return outcomes


def _ask_again(function: NamedFunction, rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> Outcome:
    try:
        return _read(function.name, call(function, [rollout], columns)[0])
    except RewardError:
        raise
    except (Exception, SystemExit, CancelledError) as error:
        return _fault(function.name, error)


def _fault(name: str, error: BaseException) -> Outcome:
    """No value, and the line "function: kind: detail"."""
    if isinstance(error, Fault):
        return None, f"{name}: {error.kind}: {error}"
    return None, f"{name}: raised: {one_line(error)}"


def _read(name: str, value: Any) -> Outcome:
    if value is None:
        return None, None
    if isinstance(value, Exception):
        return _fault(name, value)
    number = _number(value)
    if number is None:
        return _fault(name, Fault("bad_value", f"returned {value!r:.60}, a finite number or None is needed"))
    return number, None


def _number(value: Any) -> float | None:
    # Scalars of torch and numpy first become Python's own; np.bool_ is no numbers.Real.
    if (isinstance(value, Tensor) and value.numel() == 1) or (
        isinstance(value, (np.ndarray, np.generic)) and value.size == 1
    ):
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None  # NaN is not
