"""Majority-vote pseudo-labels of the initial model: the reference answers of noise type `majority`."""

import json
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from vrpo.config.rewards import MajorityNoise, RewardsConfig
from vrpo.errors import ConfigError
from vrpo.rewards import answer_extractor, majority_label
from vrpo.rollout import Engine
from vrpo.tasks import Task
from vrpo.train.folder import LABELS_FILE, RunFolder

MAX_PROMPTS = 100_000
"""A generated task has no end; voting on more prompts than this is a mistake."""
PROMPTS_AT_ONCE = 256


def majority_labels(
    config: RewardsConfig, engine: Engine, task: Task, folder: RunFolder
) -> dict[str, str | None]:
    """Prompt id -> the most frequent answer of `votes` completions of the model as it is now.

    A prompt none of whose completions has an answer gets None: its reward is missing. The labels are written
    to the run folder, and read from there when the run is resumed, because by then the model has changed.

    Returns:
        {} when no noise of the configuration asks for labels.
    """
    wanted = [noise for noise in config.noise if isinstance(noise, MajorityNoise)]
    if not wanted:
        return {}
    path = folder.path / LABELS_FILE
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    labels: dict[str, str | None] = {}
    # a task may have a prompt several times: one vote is enough
    prompts = iter({prompt.prompt_id: prompt for prompt in task.train_prompts()}.values())
    while block := list(islice(prompts, PROMPTS_AT_ONCE)):
        votes = wanted[0].votes
        rollouts = engine.generate(
            block, num_generations=votes, step=len(labels), policy_version=0, stream="majority"
        )
        for index, prompt in enumerate(block):
            completions = [r.completion for r in rollouts[index * votes : (index + 1) * votes]]
            extract = _reader(config, wanted[0].column, prompt.columns)
            labels[prompt.prompt_id] = majority_label(completions, extract)
    folder.write_json(LABELS_FILE, labels)
    return labels


def _reader(config: RewardsConfig, column: str, columns: Mapping[str, Any]) -> Callable[[str], str | None]:
    """How the function that judges `column` reads an answer to a row; the whole text where none of the built-in ones does."""
    judges = [f for f in config.functions if getattr(f, "column", None) == column]
    return answer_extractor(judges[0], columns) if judges else lambda text: text.strip() or None


def check_votes(config: RewardsConfig, task: Task) -> None:
    """Raise ConfigError when the task has too many prompts to vote on."""
    if any(isinstance(noise, MajorityNoise) for noise in config.noise) and task.train_size > MAX_PROMPTS:
        raise ConfigError(
            f"noise type majority votes on every training prompt, and there are {task.train_size:,}; "
            f"set task.size to at most {MAX_PROMPTS:,}"
        )
