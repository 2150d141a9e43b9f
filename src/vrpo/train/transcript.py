"""Responses as lines of JSON for people: rollouts.jsonl of a run, and `vrpo eval --completions`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vrpo.types import Batch, ScoredRollout

KEPT = 8
"""Responses of each step written to rollouts.jsonl."""
ERRORS = "errors"
"""`kept_for` of a line that is there because something failed, not as one of the first: shares are not to be taken of such lines."""
DIGITS = 4
"""Decimals of a number per token."""


def transcript(scored: Sequence[ScoredRollout], batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    """The first few responses of a step, and every one whose reward or gold failed.

    Args:
        scored: the responses of the step.
        batch: the same ones, annotated, in the same order.
        tokenizer: turns a token into text.
    """
    return [
        {
            "sample_id": s.rollout.sample_id,
            **line_of(s),
            "reward": s.reward,
            **({"gold_errors": list(s.gold_errors)} if s.gold_errors else {}),
            **({"by_token": _by_token(s, batch, row, tokenizer)} if row < KEPT else {"kept_for": ERRORS}),
        }
        for row, s in enumerate(scored)
        if row < KEPT or s.errors or s.gold_errors
    ]


def line_of(scored: ScoredRollout) -> dict[str, Any]:
    """A response and its clean verdict."""
    rollout = scored.rollout
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": _written(rollout.prompt.prompt),
        "completion": rollout.completion,
        "stop": rollout.stop,
        "tokens": rollout.num_actions,
        "parts": dict(scored.parts),
        "clean_reward": scored.clean_reward,
        "errors": list(scored.errors),
    }


def _by_token(scored: ScoredRollout, batch: Batch, row: int, tokenizer: Any) -> dict[str, Any]:
    """What is known of each token that the policy chose: its text, -log pi, the critic's value before it and its advantage, as far as
    they exist; and the reward that was learned from, where a denoiser replaced the seen one."""
    chosen, token_ids = scored.rollout.action_mask, scored.rollout.token_ids

    def numbers(column: Tensor | None) -> list[float] | None:
        if column is None:
            return None
        return [round(x, DIGITS) for x in column[row, : len(chosen) - 1].cpu()[chosen[1:]].tolist()]

    # a response without a reward left every loss: nothing was learned from it
    denoised = batch.denoised if bool(batch.mask[row].any()) else None
    known = {
        "text": [tokenizer.decode([token]) for token in token_ids[chosen].tolist()],
        "surprisal": [round(-float(x), DIGITS) for x in scored.rollout.policy_logprobs[chosen]],
        "value": numbers(batch.values),
        "advantage": numbers(batch.advantages),
        "denoised": None if denoised is None else round(float(denoised[row]), DIGITS),
    }
    return {name: value for name, value in known.items() if value is not None}


def _written(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
