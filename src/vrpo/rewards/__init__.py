"""Stage 3: what a completion is worth, and what the learner gets to see of it.

functions.py        exact, math, choice; math_answers.py is what math means by the same answer
user.py             functions with TRL's signature: loading and calling
http.py             a judge behind HTTP
isolation.py        calls that may hang or crash; worker.py is the process they happen in
score.py            the pipeline: clean verdict, then noise
noise.py            noise on 0/1 verdicts
noise_additive.py   noise that adds to the reward, or removes it
noise_labels.py     wrong reference answers
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vrpo.config.rewards import (
    AdversarialNoise,
    CallConfig,
    FlipNoise,
    FunctionReward,
    GaussianNoise,
    HttpReward,
    KeywordBiasNoise,
    LengthBiasNoise,
    MajorityNoise,
    MathReward,
    MissingNoise,
    NoiseConfig,
    PersistentNoise,
    PromptFlipNoise,
    RewardFunctionConfig,
    RewardsConfig,
    SourceNoise,
    WrongLabelNoise,
)
from vrpo.errors import ConfigError
from vrpo.rewards.functions import Builtin, answer_extractor
from vrpo.rewards.isolation import fault_kind
from vrpo.rewards.noise import Flip, NoiseModel, Persistent, PromptFlip, Source
from vrpo.rewards.noise_additive import Gaussian, KeywordBias, LengthBias, Missing
from vrpo.rewards.noise_labels import Answers, Labels, Majority, WrongLabel, majority_label
from vrpo.rewards.score import RewardPipeline
from vrpo.rewards.user import NamedFunction, isolated, load_function, named, served

__all__ = [
    "NamedFunction",
    "NoiseModel",
    "RewardPipeline",
    "answer_extractor",
    "build_rewards",
    "fault_kind",
    "load_function",
    "majority_label",
    "named",
]


def build_rewards(
    config: RewardsConfig,
    *,
    seed: int,
    extra_functions: Sequence[NamedFunction | Callable[..., Any]] = (),
    extra_gold: Sequence[NamedFunction | Callable[..., Any]] = (),
    answers: Answers | None = None,
    labels: Labels | None = None,
) -> RewardPipeline:
    """The pipeline of a configuration.

    Args:
        config: the `rewards:` section.
        seed: the run's seed, for the noise.
        extra_functions: functions given in Python; plain ones count with weight 1.
        extra_gold: trusted functions given in Python.
        answers: `task.answers`, needed by `wrong_label` noise.
        labels: prompt id -> majority vote of the initial model, needed by `majority` noise. It is read when a
            step is scored, so it may be filled later.

    Raises:
        ConfigError: no function, a file without that function, or noise in an order that cannot work.
    """
    functions, gold = (
        _distinct(
            [_function(item) for item in configured]
            + [item if isinstance(item, NamedFunction) else named(item) for item in given]
        )
        for configured, given in ((config.functions, extra_functions), (config.gold, extra_gold))
    )
    for kind, some in (("function", functions), ("gold function", gold)):
        if some and not any(function.weight for function in some):
            raise ConfigError(
                f"every reward {kind} has weight 0, the reward would always be 0; give at least one another weight"
            )
    _check_labels(config, functions)
    noise = [_noise(item, answers, labels) for item in config.noise]
    return RewardPipeline(
        functions, noise, gold=gold, seed=seed, max_failed=config.max_failed, combine=config.combine
    )


def _function(config: RewardFunctionConfig) -> NamedFunction:
    if isinstance(config, HttpReward):
        return served(config)
    if isinstance(config, FunctionReward) and config.isolation == "process":
        return isolated(config)
    how: dict[str, Any] = {}
    if isinstance(config, CallConfig):
        how = config.model_dump(include=set(CallConfig.model_fields))
    if isinstance(config, FunctionReward):
        how["concurrency"] = config.concurrency
        return named(load_function(config.file, config.name), weight=config.weight, name=config.name, **how)
    function = named(Builtin(config), weight=config.weight, name=config.type, needs=(config.column,), **how)
    # what a response is, or the letter it names first, is not for the prompt to say; a boxed answer may have begun there
    return replace(function, reads_start=isinstance(config, MathReward))


def _distinct(functions: Sequence[NamedFunction]) -> list[NamedFunction]:
    # Two functions of one name get numbers, so that both are seen in the metrics.
    seen: dict[str, int] = {}
    result = []
    for item in functions:
        seen[item.name] = seen.get(item.name, 0) + 1
        result.append(item if seen[item.name] == 1 else item.renamed(f"{item.name}_{seen[item.name]}"))
    return result


def _check_labels(config: RewardsConfig, functions: Sequence[NamedFunction]) -> None:
    for index, noise in enumerate(config.noise):
        if not isinstance(noise, (WrongLabelNoise, MajorityNoise)):
            continue
        if index > 0:
            raise ConfigError(
                f"rewards.noise: {noise.type} is number {index + 1}, it replaces what the noise before it did; put it "
                "first, and use one of wrong_label and majority"
            )
        if not any(function.reads(noise.column) for function in functions):
            raise ConfigError(
                f"rewards.noise: {noise.type} changes column {noise.column!r}, which no reward function reads; set its "
                "column to the one they compare with"
            )


def _noise(config: NoiseConfig, answers: Answers | None, labels: Labels | None) -> NoiseModel:
    match config:
        case FlipNoise() | AdversarialNoise():
            return Flip(config)
        case PromptFlipNoise():
            return PromptFlip(config)
        case PersistentNoise():
            return Persistent(config)
        case SourceNoise():
            return Source(config)
        case GaussianNoise():
            return Gaussian(config)
        case LengthBiasNoise():
            return LengthBias(config)
        case KeywordBiasNoise():
            return KeywordBias(config)
        case MissingNoise():
            return Missing(config)
        case WrongLabelNoise():
            if answers is None:
                raise ConfigError(
                    "wrong_label noise needs the answers of the task; pass answers=task.answers"
                )
            return WrongLabel(config, answers)
        case MajorityNoise():
            if labels is None:
                raise ConfigError("majority noise needs pseudo-labels; pass labels={prompt id: answer}")
            return Majority(config, labels)
