"""The final numbers of a run, for people and programs: summary.json."""

import math
from collections.abc import Sequence
from typing import Any

from vrpo.config import Config
from vrpo.config.run import TrainConfig
from vrpo.rewards.isolation import FAULT_KINDS
from vrpo.train import checkpoint
from vrpo.train.folder import RunFolder

KIND = "rewards/errors/"
"""Start of the metrics that count reward errors of one kind."""

FINAL_STEPS = 10
"""Steps at the end that the averages are taken over."""


def summarise(folder: RunFolder, config: Config, *, seconds: float) -> dict[str, Any]:
    """Clean accuracy first, last and best; averages of the last steps; totals.

    Args:
        folder: the run's folder, complete.
        config: the run's configuration.
        seconds: wall time of this process's part of the run.
    """
    lines, evaluations = folder.read_metrics(), folder.read_evaluations()
    last = lines[-FINAL_STEPS:]
    best = max(evaluations, key=lambda e: e["clean_greedy"], default=None)
    return {
        "algorithm": config.algorithm.type,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "clean_accuracy": {
            "first": _pick(evaluations[:1]),
            "final": _pick(evaluations[-1:]),
            "best": _pick([best] if best else []),
        },
        "averages_over_last_steps": len(last),
        "seen_reward": _mean(last, "objective/scores"),
        "clean_reward": _mean(last, "objective/scores_clean"),
        "explained_var": _mean(last, "val/explained_var"),
        "explained_var_clean": _mean(last, "val/explained_var_clean"),
        "calibration": _mean(last, "val/calibration"),
        "auc_end": _mean(last, "val/auc_end"),
        "critic_accuracy": _mean(last, "val/verdict_accuracy"),
        "denoised_accuracy": _mean(last, "denoiser/accuracy"),
        "kl": _mean(last, "objective/kl"),
        "mean_length": _mean(last, "completions/mean_length"),
        "entropy": _mean(last, "policy/entropy_avg"),
        "tokens_per_second": _mean(lines, "tokens_per_second/step"),
        "seconds_per_step": _mean(lines, "time/step"),
        "sampler_trainer_kl_max": max(
            (x for line in lines if (x := line.get("sampling/trainer_kl")) is not None), default=None
        ),
        "reward_errors": sum(line["rewards/errors"] for line in lines),
        "reward_errors_by_kind": {
            name.removeprefix(KIND): sum(line.get(name) or 0.0 for line in lines)
            # a function called "errors" has metrics that begin alike
            for name in (KIND + kind for kind in sorted(FAULT_KINDS))
            if any(name in line for line in lines)
        },
        "rewards_missing": sum(line["rewards/missing"] for line in lines),
        "skipped_updates": sum(
            line.get(name) or 0.0
            for line in lines
            for name in ("policy/skipped_updates", "val/skipped_updates", "denoiser/skipped_updates")
        ),
        "warnings": [f"step {w['step']}: {w['message']}" for w in folder.read_warnings()],
        "best_checkpoint": checkpoint.best_of(
            checkpoint.steps_in(folder.checkpoints), accuracy_on_schedule(folder, config.train)
        ),
        "seconds": seconds,
    }


def accuracy_on_schedule(folder: RunFolder, config: TrainConfig) -> dict[int, float]:
    """Step -> clean accuracy, for steps at which the configuration asks for a checkpoint.

    A signal leaves a checkpoint of its own; were it ever the best, a run would depend on when it was stopped.
    """
    every = config.checkpoint_every
    return {
        e["step"]: e["clean_greedy"]
        for e in folder.read_evaluations()
        if e["step"] == config.steps or (every > 0 and e["step"] > 0 and e["step"] % every == 0)
    }


def _pick(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    e = evaluations[0]
    return {
        "step": e["step"],
        "greedy": e["clean_greedy"],
        "sampled": e["clean_sampled"],
        "prompts": e["prompts"],
        "judged": e.get("judged"),  # an earlier version did not count them
        "missing": e["missing"],
        "denoiser_greedy": e.get("denoiser_greedy"),
    }


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean over the lines that have a number; None when none has."""
    values = [x for line in lines if (x := line.get(name)) is not None and math.isfinite(x)]
    return sum(values) / len(values) if values else None
