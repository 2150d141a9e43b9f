"""Clean accuracy on held-out prompts: the number every claim is made on."""

from collections.abc import Sequence

import numpy as np

from vrpo.errors import RewardError
from vrpo.rewards import RewardPipeline
from vrpo.rollout import Engine
from vrpo.types import EvalResult, Prompt, ScoredRollout


def evaluate(
    engine: Engine,
    rewards: RewardPipeline,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    step: int,
    policy_version: int,
    believer: Engine | None = None,
) -> EvalResult:
    """One greedy and `samples` sampled completions per prompt, judged without noise; greedy ones of the denoiser's model, if `believer` samples it.

    Sampling uses its own random streams, named after the evaluation prompt and not the step, so that two
    evaluations differ by the weights alone.

    Raises:
        RewardError: no greedy or no sampled completion of the policy got a clean reward.
    """

    def greedy_by(engine: Engine) -> list[ScoredRollout]:
        return rewards.score_clean(
            engine.generate(
                prompts,
                num_generations=1,
                step=0,
                policy_version=policy_version,
                greedy=True,
                stream="eval-greedy",
            )
        )

    greedy = greedy_by(engine)
    sampled = rewards.score_clean(
        engine.generate(
            prompts,
            num_generations=samples,
            step=0,
            policy_version=policy_version,
            greedy=False,
            stream="eval-sample",
        )
    )
    believed = [] if believer is None else greedy_by(believer)
    return EvalResult(
        greedy=_accuracy(greedy, rewards.judged_by),
        sampled=_accuracy(sampled, rewards.judged_by),
        entropy=_entropy(sampled),
        prompts=len(prompts),
        judged=sum(s.clean_reward is not None for s in greedy),
        samples=samples,
        missing=sum(s.clean_reward is None for s in (*greedy, *sampled, *believed)),
        denoiser_greedy=_mean_reward(believed),  # only looked at: where it has none, the run goes on
        best_sampled=_best_of(sampled),
        completions=tuple(greedy),
        sampled_completions=tuple(sampled),
    )


def _best_of(scored: Sequence[ScoredRollout]) -> float:
    """Mean over prompts of the highest clean reward; some are known."""
    best: dict[str, float] = {}
    for s in scored:
        if s.clean_reward is not None:
            name = s.rollout.prompt.prompt_id
            best[name] = max(best.get(name, s.clean_reward), s.clean_reward)
    return sum(best.values()) / len(best)


def _entropy(scored: Sequence[ScoredRollout]) -> float:
    """Without bias: a token's -log pi is expected to be the entropy of the distribution it was drawn from."""
    rollouts = [s.rollout for s in scored]
    nats = -sum(float(r.logprobs.sum(dtype=np.float64)) for r in rollouts)
    return nats / sum(r.num_actions for r in rollouts)


def _accuracy(scored: Sequence[ScoredRollout], judged_by: str) -> float:
    mean = _mean_reward(scored)
    if mean is None:
        silent = {name: sum(s.parts.get(name) is None for s in scored) for name in scored[0].parts}
        counts = ", ".join(f"{name} has none for {count}" for name, count in silent.items() if count)
        apart = min(silent.values()) < len(scored)
        by_row = (
            "; set rewards.combine to answered if each function has a part in some rows only" if apart else ""
        )
        raise RewardError(
            f"no completion has a clean reward by {judged_by}: of {len(scored)}, {counts}; hold out "
            f"rows that have a verdict{by_row}"
        )
    return mean


def _mean_reward(scored: Sequence[ScoredRollout]) -> float | None:
    """Over the completions whose clean reward is not missing; None without any."""
    known = [s.clean_reward for s in scored if s.clean_reward is not None]
    return sum(known) / len(known) if known else None
