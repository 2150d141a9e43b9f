"""The collapse watch: what went wrong in runs of others, looked for in every step's metrics.

Reward and losses do not show a collapse. Entropy, perplexity, length, KL, explained variance, groups without a
difference, and the gap between seen and clean reward do. Each sign must hold over `WINDOW` steps, is reported at the step
where it begins to, and comes with what to do. The watch is a function of the recorded metrics and of nothing else, so a
resumed run warns where the uninterrupted one does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 10
"""Steps over which a sign must hold: one step is noise."""
BASELINE = 3
"""Steps of the policy at the start that later ones are compared with: a bad run collapses within a few steps."""
JUMP = 0.5
"""Nats a token of KL in one step, after which there is no need to wait for a window."""
CRITIC_PATIENCE = 40
"""Steps after the warm-up before explained variance counts: a cold critic is below 0 for a while in healthy runs."""

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Warned:
    """One warning."""

    kind: str
    step: int
    message: str
    """One line: the numbers, what they usually mean, what to do."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The windows a sign looks at."""

    recent: Sequence[Line]
    """The last WINDOW lines."""
    first: Sequence[Line]
    """The first BASELINE lines in which the policy learned."""
    warm_for: int
    """Steps since the critic's warm-up ended."""
    limit: int
    """Longest response allowed, tokens."""

    def now(self, name: str) -> float | None:
        """Mean over the window; None unless every line has it."""
        return _mean(self.recent, name)

    def then(self, name: str) -> float | None:
        """Mean over the baseline."""
        return _mean(self.first, name)

    def always(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether every line of the window has the metric and `holds` of it."""
        values = [line.get(name) for line in self.recent]
        return all(x is not None and math.isfinite(x) and holds(x) for x in values)


def warnings_at(history: Sequence[Line], *, warmup_steps: int, max_completion_length: int) -> list[Warned]:
    """What begins to look like a collapse at the last line of `history`.

    Args:
        history: the lines of metrics.jsonl so far; None or NaN stands for a metric without a value.
        warmup_steps: steps at the start in which the policy stood still.
        max_completion_length: tokens at which a response is cut.
    """
    step = len(history)
    found = [Warned("jump", step, message) for message in _jump(history)]
    if step < warmup_steps + BASELINE + WINDOW:
        return found
    first = history[warmup_steps : warmup_steps + BASELINE]
    for kind, sign in SIGNS.items():
        now, before = (
            sign(_Run(history[end - WINDOW : end], first, end - warmup_steps, max_completion_length))
            for end in (step, step - 1)
        )
        if now is not None and (before is None or step == warmup_steps + BASELINE + WINDOW):
            found.append(Warned(kind, step, now))
    return found


def _jump(history: Sequence[Line]) -> list[str]:
    sizes = [line.get("policy/approxkl_avg") or 0.0 for line in history[-2:]]
    if not sizes or sizes[-1] <= JUMP or (len(sizes) > 1 and sizes[0] > JUMP):
        return []
    return [
        f"policy/approxkl_avg is {sizes[-1]:.3g} nats a token in this step, under 0.02 is usual: the policy jumped; lower "
        "train.learning_rate, or raise train.lr_warmup_steps if it is one of the first steps"
    ]


def _entropy(run: _Run) -> str | None:
    start = run.then("policy/entropy_avg")
    if start is None or not run.always("policy/entropy_avg", lambda x: x < 0.1 * start):
        return None
    return (
        f"policy/entropy_avg is {run.now('policy/entropy_avg'):.3g}, it began at {start:.3g}: the policy gives one response "
        "to everything; lower train.learning_rate or raise algorithm.kl_coef, and go on from an earlier checkpoint"
    )


def _perplexity(run: _Run) -> str | None:
    start = run.then("policy/perplexity")
    if start is None or start < 1.2 or not run.always("policy/perplexity", lambda x: x < 1.02):
        return None
    return (
        f"policy/perplexity is {run.now('policy/perplexity'):.3g}, it began at {start:.3g}: responses are repeated word for "
        "word; raise algorithm.kl_coef or rollout.temperature, and look at rollouts.jsonl"
    )


def _kl(run: _Run) -> str | None:
    if run.always("policy/approxkl_avg", lambda x: x > 0.1):
        return (
            f"policy/approxkl_avg is {run.now('policy/approxkl_avg'):.3g} nats a token, under 0.02 is usual: the policy moves too "
            "far in a step; lower train.learning_rate or train.epochs"
        )
    start = run.then("objective/kl")
    if start is not None and run.always("objective/kl", lambda x: x > max(50.0, 10.0 * start)):
        return (
            f"objective/kl is {run.now('objective/kl'):.3g} nats a response: the policy has left the initial model; raise "
            "algorithm.kl_coef or set algorithm.kl_target"
        )
    return None


def _length(run: _Run) -> str | None:
    start, name = run.then("completions/mean_length"), "completions/mean_length"
    if start is None:
        return None
    if run.always(name, lambda x: x > 2.0 * start):
        return (
            f"{name} is {run.now(name):.3g} tokens, it began at {start:.3g}: is the reward paid by length? compare long and "
            "short responses in rollouts.jsonl, and the clean accuracy"
        )
    if start >= 3.0 and run.always(name, lambda x: x < 0.25 * start):
        return (
            f"{name} is {run.now(name):.3g} tokens, it began at {start:.3g}: the policy has learned to say nothing; look at "
            "what the reward gives an empty response"
        )
    cut, cut_start = "completions/truncated_frac", run.then("completions/truncated_frac")
    if cut_start is not None and cut_start < 0.25 and run.always(cut, lambda x: x > 0.5):
        return (
            f"{cut} is {run.now(cut):.2f}, it began at {cut_start:.2f}, with a limit of {run.limit} tokens: responses do not "
            "end any more; look at rollouts.jsonl, then at algorithm.truncation"
        )
    return None


def _explained_variance(run: _Run) -> str | None:
    name = "val/explained_var"
    if run.warm_for < CRITIC_PATIENCE or not run.always(name, lambda x: x < 0.0):
        return None
    return (
        f"{name} is {run.now(name):.3g}: the critic is worse than a constant, so its advantages are noise; raise "
        "critic.warmup_steps, critic.epochs or critic.learning_rate, or set algorithm.lam to 1"
    )


def _equal_rewards(run: _Run) -> str | None:
    name = "noise/frac_zero_std_seen"
    if not run.always(name, lambda x: x > 0.95):
        return None
    return (
        f"{name} is {run.now(name):.2f}: nearly all responses to a prompt get the same reward, so there is nothing to learn "
        "from; choose harder or easier prompts, or a finer reward"
    )


def _hacking(run: _Run) -> str | None:
    seen, clean = "objective/scores", "objective/scores_clean"
    moves = [_difference(run.now(name), run.then(name)) for name in (seen, clean)]
    if moves[0] is None or moves[1] is None or moves[0] < 0.05 or moves[1] > -0.05:
        return None
    return (
        f"{seen} rose by {moves[0]:.3g} while {clean} fell by {-moves[1]:.3g}: the policy learns the error of the reward; "
        "stop here, go on from the best checkpoint, and use algorithm.type vrpo or a larger algorithm.kl_coef"
    )


SIGNS: dict[str, Callable[[_Run], str | None]] = {
    "entropy": _entropy,
    "perplexity": _perplexity,
    "kl": _kl,
    "length": _length,
    "explained_variance": _explained_variance,
    "equal_rewards": _equal_rewards,
    "hacking": _hacking,
}
"""Kind -> message while the sign holds, else None."""


def _mean(lines: Sequence[Line], name: str) -> float | None:
    values = [line.get(name) for line in lines]
    known = [x for x in values if x is not None and math.isfinite(x)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
