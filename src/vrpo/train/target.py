"""`vrpo eval`: a run's checkpoint or any model, on a task's held-out prompts with the clean reward."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from vrpo.config import Config, apply_overrides, build, load, read_yaml
from vrpo.errors import CheckpointError, ConfigError
from vrpo.models import Policy, load_policy, load_tokenizer
from vrpo.rewards import RewardPipeline, build_rewards
from vrpo.rollout import TorchEngine, collate
from vrpo.tasks import Task, build_task
from vrpo.train import checkpoint
from vrpo.train.denoising import MODEL
from vrpo.train.evaluate import evaluate
from vrpo.train.files import finite, replace_file
from vrpo.train.fit import check_fit
from vrpo.train.folder import RunFolder
from vrpo.train.metrics import mean_kl
from vrpo.train.summary import accuracy_on_schedule
from vrpo.train.transcript import line_of
from vrpo.types import EvalResult, to_device


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model and what it is judged by: its task's held-out prompts and the reward functions without noise."""

    policy: Policy
    tokenizer: Any
    task: Task
    rewards: RewardPipeline
    config: Config
    step: int | None
    """Of the checkpoint; None for a model that is no run's."""

    def evaluate(self, *, temperature: float | None = None, samples: int | None = None) -> EvalResult:
        """Clean accuracy.

        Args:
            temperature: of the sampled completions; None: `rollout.temperature`.
            samples: sampled completions a prompt; None: `train.eval_samples`.
        """
        train, rollout = self.config.train, self.config.rollout
        if temperature is not None:
            rollout = rollout.model_copy(update={"temperature": temperature})
        return evaluate(
            TorchEngine(self.policy, self.tokenizer, rollout, seed=train.seed),
            self.rewards,
            self.task.eval_prompts(train.eval_prompts),
            samples=train.eval_samples if samples is None else samples,
            step=self.step or 0,
            policy_version=0,
        )

    def kl_to(self, other: Policy, result: EvalResult) -> float:
        """KL of the policy to another model, nats a response: mean of log pi - log other over `result.sampled_completions` that have a
        reward, both at `rollout.temperature`, which these must have been sampled at."""
        scored, size = result.sampled_completions, self.config.train.microbatch
        pad_id, total, count = self.tokenizer.pad_token_id, 0.0, 0
        for first in range(0, len(scored), size):
            batch = collate(scored[first : first + size], pad_id=pad_id, truncation="terminal")
            batch = to_device(batch, other.device)
            with torch.no_grad():
                logp, _ = other.logprobs_and_entropy(
                    batch.input_ids,
                    batch.attention_mask,
                    batch.mask,
                    temperature=self.config.rollout.temperature,
                )
            if responses := int(batch.mask.any(dim=1).sum()):
                total, count = total + mean_kl(batch, logp) * responses, count + responses
        return total / count if count else math.nan


def open_target(
    target: str,
    *,
    config_path: Path | None = None,
    overrides: Sequence[str] = (),
    step: int | str | None = None,
    denoiser: bool = False,
) -> Target:
    """A run folder's checkpoint, or a model folder or hub name, ready to be evaluated.

    Args:
        target: a run folder (has config.yaml and checkpoints/), or a model.
        config_path: task, rewards and rollout settings; needed for a model, replaces a run's own.
        overrides: `"a.b=value"` settings on top.
        step: checkpoint of a run, or "best", the one of highest clean accuracy in the run's own evaluations; None is the newest.
        denoiser: the model of a run's denoiser instead of its policy.

    Raises:
        ConfigError: a model without a configuration, or a configuration without a task or reward; a denoiser is asked of a model.
        CheckpointError: the run has no such checkpoint, it is damaged, or it has no denoiser.
    """
    folder = Path(target)
    is_run = (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
    if not is_run and step is not None:
        raise ConfigError(
            f"--checkpoint {step} needs a run folder, {target!r} is none; leave it out for a model"
        )
    if not is_run and denoiser:
        raise ConfigError(f"--denoiser needs a run folder, {target!r} is none; leave it out for a model")
    if config_path is None and not is_run:
        raise ConfigError(
            f"{target!r} is no run folder; add --config CONFIG to say which task to evaluate the model on"
        )
    data = read_yaml(config_path or folder)
    named = _model_of(data)
    data = apply_overrides(data, list(overrides))
    if _model_of(data) != named:
        raise ConfigError(
            f"--set model.path={_model_of(data)} would not be evaluated, {target} is; give it as RUN|MODEL, with --config"
        )
    config = build(Config, data)
    if config.model is None or config.task is None or not config.rewards.functions:
        raise ConfigError(
            "the configuration names no model, task or reward function (a run started from Python?); give --config CONFIG"
        )
    found = _step_of(folder, step) if is_run else None
    path = target if found is None else str(_model_in(_checkpoint_of(folder, found), denoiser=denoiser))
    settings = config.model.model_copy(update={"path": path})
    tokenizer, policy = load_tokenizer(settings), load_policy(settings)
    task = build_task(config.task, tokenizer)
    rewards = build_rewards(config.rewards.model_copy(update={"noise": ()}), seed=config.train.seed)
    check_fit(task, policy, rewards, max_completion_length=config.rollout.max_completion_length)
    return Target(policy=policy, tokenizer=tokenizer, task=task, rewards=rewards, config=config, step=found)


def _model_of(data: dict[Any, Any]) -> object:
    model = data.get("model")
    return model.get("path") if isinstance(model, dict) else model


def _step_of(folder: Path, step: int | str | None) -> int:
    """The step of the checkpoint that is asked for; the best is so by the run's own schedule, whatever it is evaluated on now."""
    available = checkpoint.steps_in(folder / "checkpoints")
    if not available:
        raise CheckpointError(f"{folder} has no complete checkpoint yet; train further first")
    if step is None:
        return available[-1]
    if step == "best":
        schedule = load(Config, folder).train
        best = checkpoint.best_of(available, accuracy_on_schedule(RunFolder(folder), schedule))
        if best is None:
            raise CheckpointError(
                f"{folder} has evaluated none of its checkpoints ({_listed(available)}); name one, or train with train.eval_every"
            )
        return best
    if not str(step).isdecimal() or int(step) not in available:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; there are {_listed(available)}, and 'best'"
        )
    return int(step)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _checkpoint_of(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / f"step-{step}"
    checkpoint.verify(path)
    return path


def _model_in(path: Path, *, denoiser: bool) -> Path:
    """The policy in a checkpoint, or the denoiser's model."""
    model = path / checkpoint.DENOISER / MODEL if denoiser else path / "policy"
    if not model.is_dir():
        raise CheckpointError(f"{path} has no denoiser, the run trained without one; leave out --denoiser")
    return model


def write_completions(path: Path, result: EvalResult) -> None:
    """Every completion with its verdict, greedy ones first, as lines of JSON: `prompt_id`, `prompt`, `completion`, `greedy`, `stop`,
    `tokens`, `parts`, `clean_reward`, `errors`.

    Raises:
        StorageError: it cannot be written.
    """
    lines = [
        json.dumps(finite({"greedy": greedy, **line_of(scored)}), ensure_ascii=False) + "\n"
        for greedy, some in ((True, result.completions), (False, result.sampled_completions))
        for scored in some
    ]
    replace_file(path, "".join(lines))
