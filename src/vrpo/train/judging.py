"""Completions of the model that would be trained, judged by the reward that would train it: the sample of `vrpo diagnose`."""

from dataclasses import replace

import torch

from vrpo.config import Config
from vrpo.config.rewards import FunctionReward, MajorityNoise, RewardsConfig
from vrpo.errors import ConfigError
from vrpo.rewards import build_rewards
from vrpo.rollout import TorchEngine
from vrpo.train.diagnosis import Judged
from vrpo.train.fit import check_fit
from vrpo.train.preflight import check_files
from vrpo.train.run import load_ingredients
from vrpo.types import Rollout


def judge_sample(config: Config, *, prompts: int, repeats: int, gold: str | None) -> list[Judged]:
    """Sample `rollout.num_generations` completions for each of some training prompts and score them.

    Args:
        config: model, task, rewards with their noise, rollout.
        prompts: how many.
        repeats: how often each completion is scored; simulated noise is drawn anew where it depends on the sample.
        gold: "file.py:function", a trusted reward function. None: `rewards.gold` is gold, or without it the reward without its
            simulated noise, and nothing is where there is neither.

    Raises:
        ConfigError: the configuration is incomplete, or `gold` names no function.
    """
    check_files(config)
    if any(isinstance(noise, MajorityNoise) for noise in config.rewards.noise):
        raise ConfigError(
            "majority noise asks the initial model for votes, which only a run does; diagnose that run's rollouts.jsonl"
        )
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    ingredients = load_ingredients(config)
    policy, task, seed = ingredients.policy, ingredients.task, config.train.seed
    pipeline = build_rewards(config.rewards, seed=seed, answers=task.answers)
    trusted = None if gold is None else build_rewards(_gold_rewards(gold), seed=seed)
    try:
        for rewards in (pipeline, trusted):
            if rewards is not None:
                check_fit(task, policy, rewards, max_completion_length=config.rollout.max_completion_length)
        rollouts = TorchEngine(policy, policy.tokenizer, config.rollout, seed=seed).generate(
            task.draw(seed=seed, step=0, count=prompts),
            num_generations=config.rollout.num_generations,
            step=1,
            policy_version=0,
        )
        scored = [pipeline.score(_again(rollouts, number), step=number + 1) for number in range(repeats)]
        known = scored[0] if trusted is None else trusted.score_clean(rollouts)
    finally:
        pipeline.close()
        if trusted is not None:
            trusted.close()
    by_gold = trusted is not None or bool(config.rewards.gold)
    by_noise = not by_gold and config.rewards.knows_clean
    return [
        Judged(
            prompt_id=rollout.prompt.prompt_id,
            completion=rollout.completion,
            length=rollout.num_actions,
            rewards=tuple(one[row].reward for one in scored),
            gold=known[row].clean_reward if by_gold else None,
            clean_reward=known[row].clean_reward if by_noise else None,
            parts=scored[0][row].parts,
        )
        for row, rollout in enumerate(rollouts)
    ]


def _again(rollouts: list[Rollout], number: int) -> list[Rollout]:
    """The same completions under other names: noise that is drawn per sample is named by them."""
    if number == 0:
        return rollouts
    return [replace(r, sample_id=f"{r.sample_id}/again{number}") for r in rollouts]


def _gold_rewards(gold: str) -> RewardsConfig:
    file, separator, name = gold.rpartition(":")
    if not separator or not file or not name:
        raise ConfigError(f"--gold {gold!r} names no function; write it as FILE.py:FUNCTION")
    return RewardsConfig(functions=(FunctionReward(file=file, name=name),))
