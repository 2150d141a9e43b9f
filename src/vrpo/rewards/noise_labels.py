"""Label noise: the completion is judged again against another reference answer.

These kinds replace the verdict, so they come first in a list of noises and there is one at most.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from vrpo.config.rewards import MajorityNoise, WrongLabelNoise
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards.noise import Draws, Judge
from vrpo.types import ScoredRollout

Answers = Callable[[str], Sequence[Any]]
"""Column -> values it takes in the training set, such as `Task.answers`."""

Labels = Mapping[str, str | None]
"""Prompt id -> pseudo-label; None where the votes held no answer."""


def _rejudged(
    scored: Sequence[ScoredRollout], labels: Mapping[int, Any], column: str, judge: Judge
) -> list[ScoredRollout]:
    """The rows named in `labels` judged against that label; rows whose clean reward is missing stay missing."""
    rows = [row for row in labels if scored[row].reward is not None]
    verdicts = judge([scored[row].rollout for row in rows], {column: [labels[row] for row in rows]})
    result = list(scored)
    for row, verdict in zip(rows, verdicts, strict=True):
        errors = scored[row].errors + verdict.errors
        result[row] = replace(scored[row], reward=verdict.reward, errors=errors)
    return result


@final
class WrongLabel:
    """`wrong_label`: a fixed share of prompts has the answer of another training prompt as its reference.

    Which prompts, and which wrong answer, are draws named by the prompt id: the same in every step.
    """

    kind = "wrong_label"

    def __init__(self, config: WrongLabelNoise, answers: Answers) -> None:
        self._rate = config.rate
        self._column = config.column
        self._answers = [(str(answer).strip(), answer) for answer in answers(config.column)]
        self.needs = frozenset({config.column})
        if len({text for text, _ in self._answers}) < 2:
            raise ConfigError(
                f"wrong_label noise: every training prompt has {config.column}={self._answers[0][0]!r}, there is no wrong "
                "answer to take; use data with more than one answer"
            )

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Judges the samples of the chosen prompts again."""
        wrong = {}
        for prompt in {item.rollout.prompt.prompt_id: item.rollout.prompt for item in scored}.values():
            if draws.uniform("chosen", prompt.prompt_id) < self._rate:
                own = str(prompt.columns.get(self._column)).strip()
                others = [answer for text, answer in self._answers if text != own]
                wrong[prompt.prompt_id] = others[int(draws.uniform("answer", prompt.prompt_id) * len(others))]
        names = [item.rollout.prompt.prompt_id for item in scored]
        labels = {row: wrong[name] for row, name in enumerate(names) if name in wrong}
        return _rejudged(scored, labels, self._column, judge)


@final
class Majority:
    """`majority`: every reference is the initial model's majority vote, and wrong where the model is wrong."""

    kind = "majority"

    def __init__(self, config: MajorityNoise, labels: Labels) -> None:
        self._column = config.column
        self._labels = labels
        self.needs = frozenset({config.column})

    def apply(
        self, scored: Sequence[ScoredRollout], *, step: int, draws: Draws, judge: Judge
    ) -> list[ScoredRollout]:
        """Judges every sample again; without a label (None) its reward is missing."""
        names = [item.rollout.prompt.prompt_id for item in scored]
        unknown = [name for name in names if name not in self._labels]
        if unknown:
            raise RewardError(
                f"majority noise: prompt {unknown[0]} has no pseudo-label, {len(self._labels)} prompts have one; label "
                "every training prompt before the first step"
            )
        labels = {row: self._labels[name] for row, name in enumerate(names)}
        voted = {row: label for row, label in labels.items() if label is not None}
        result = _rejudged(scored, voted, self._column, judge)
        return [item if row in voted else replace(item, reward=None) for row, item in enumerate(result)]


def majority_label(completions: Sequence[str], extract: Callable[[str], str | None]) -> str | None:
    """The answer most completions give; of answers with equally many votes the one given first.

    Args:
        completions: responses of the initial model to one prompt.
        extract: completion -> answer, or None where there is none, such as `answer_extractor(config)`.

    Returns:
        None when no completion holds an answer.
    """
    votes = Counter(answer for answer in map(extract, completions) if answer is not None)
    return votes.most_common(1)[0][0] if votes else None
