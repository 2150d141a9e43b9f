"""The collapse watch: what went wrong in runs of others, looked for in every step's metrics.

Reward and losses do not show a collapse. Entropy, perplexity, length, KL, explained variance, groups without a
difference, and the gap between seen and clean reward do. Each sign must hold over `WINDOW` steps, is reported at the step
where it begins to, and comes with what to do. The watch is a function of the recorded metrics and of nothing else, so a
resumed run warns where the uninterrupted one does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

WINDOW = 10
"""Steps over which a sign must hold: one step is noise. A sign is quiet for as long before it is reported again."""
BASELINE = 3
"""Steps of the policy at the start that later ones are compared with: a bad run collapses within a few steps."""
LOOKBACK = 50
"""Steps back to the second window that rewards are compared with: a hacked reward often rises honestly at first."""
JUMP = 0.5
"""Nats a token of KL in one step, after which there is no need to wait for a window; healthy steps stay under 0.01."""
ENTROPY_SHARE, ENTROPY_LOW = 0.1, 0.1
"""Collapsed: below this share of the start *and* below this many nats. Healthy runs keep 45 % of a start at 0.63 nats;
a model that begins undecided may lose nine tenths of its entropy and still choose."""
PERPLEXITY_LOW, PERPLEXITY_START = 1.02, 1.2
"""One word in fifty is a choice, where at least one in five was: a model that began near 1 has nothing to lose."""
KL_STEP = 0.1
"""Nats a token of one step's KL: five times the most that is usual, fourteen times the most of a healthy run."""
KL_TOTAL, KL_GROWTH = 50.0, 10.0
"""Nats a response from the reference, and times the start: long responses of a healthy run may have either, not both."""
LONGER, SHORTER, SHORTEST_START = 2.0, 0.25, 3.0
"""Times the length at the start; healthy runs stay within 15 %. A start under three tokens cannot shrink by four."""
CUT, CUT_START = 0.5, 0.25
"""Share of responses that are cut now, and the share from which on they always were."""
CRITIC_PATIENCE, CRITIC_LOW = 40, -0.05
"""Steps after the warm-up before explained variance counts (a cold critic falls to -0.4 in its first steps), and its mean
over a window in which every step is below 0. A critic that knows nothing hovers about 0: with 64 responses a step, 30 %
flips and no warm-up nine steps in a row were below it, at -0.02 on average."""
EQUAL = 0.95
"""Share of groups without a difference; healthy runs on clean rewards reach 0.6."""
SURE, MOVED = 3.0, 0.1
"""Rewards have moved when two windows differ by this many standard errors and by this share of the spread between
responses: with 16 responses a step, means of a run that stands still differ by 0.05 in one run of four."""

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
    """The windows a sign looks at, as of the step `end`."""

    history: Sequence[Line]
    end: int
    warmup: int
    limit: int
    """Longest response allowed, tokens."""

    @property
    def recent(self) -> Sequence[Line]:
        """The last WINDOW lines."""
        return self.history[self.end - WINDOW : self.end]

    def now(self, name: str) -> float | None:
        """Mean over the window; None unless every line has it."""
        return _mean(self.recent, name)

    def then(self, name: str) -> float | None:
        """Mean over the first BASELINE lines with it since the policy learns; a step in which all rewards are missing has none."""
        earlier = islice(self.history, self.warmup, self.end - WINDOW)
        having = list(islice((line for line in earlier if _mean([line], name) is not None), BASELINE))
        return _mean(having, name) if len(having) == BASELINE else None

    def before(self) -> list[Sequence[Line]]:
        """Windows to compare the recent one with: the policy's first, and the one LOOKBACK steps ago, if they are apart."""
        starts = (self.warmup, self.end - LOOKBACK - WINDOW)
        apart = {start for start in starts if self.warmup <= start <= self.end - 2 * WINDOW}
        return [self.history[start : start + WINDOW] for start in sorted(apart)]

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
    for kind, sign in SIGNS.items():
        now = sign(_Run(history, step, warmup_steps, max_completion_length))
        past = range(max(warmup_steps + BASELINE + WINDOW, step - WINDOW), step)
        if now is not None and all(
            sign(_Run(history, end, warmup_steps, max_completion_length)) is None for end in past
        ):
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
    if start is None:
        return None
    low = min(ENTROPY_SHARE * start, ENTROPY_LOW)
    if not run.always("policy/entropy_avg", lambda x: x < low):
        return None
    return (
        f"policy/entropy_avg is {run.now('policy/entropy_avg'):.3g}, it began at {start:.3g}: the policy gives one response "
        "to everything; lower train.learning_rate or raise algorithm.kl_coef, and go on from an earlier checkpoint"
    )


def _perplexity(run: _Run) -> str | None:
    start = run.then("policy/perplexity")
    if start is None or start < PERPLEXITY_START:
        return None
    if not run.always("policy/perplexity", lambda x: x < PERPLEXITY_LOW):
        return None
    return (
        f"policy/perplexity is {run.now('policy/perplexity'):.3g}, it began at {start:.3g}: responses are repeated word for "
        "word; raise algorithm.kl_coef or rollout.temperature, and look at rollouts.jsonl"
    )


def _kl(run: _Run) -> str | None:
    if run.always("policy/approxkl_avg", lambda x: x > KL_STEP):
        return (
            f"policy/approxkl_avg is {run.now('policy/approxkl_avg'):.3g} nats a token, under 0.02 is usual: the policy moves too "
            "far in a step; lower train.learning_rate or train.epochs"
        )
    start = run.then("objective/kl")
    if start is not None and run.always("objective/kl", lambda x: x > max(KL_TOTAL, KL_GROWTH * start)):
        return (
            f"objective/kl is {run.now('objective/kl'):.3g} nats a response: the policy has left the initial model; raise "
            "algorithm.kl_coef or set algorithm.kl_target"
        )
    return None


def _length(run: _Run) -> str | None:
    start, name = run.then("completions/mean_length"), "completions/mean_length"
    if start is None:
        return None
    if run.always(name, lambda x: x >= LONGER * start):
        return (
            f"{name} is {run.now(name):.3g} tokens, it began at {start:.3g}: is the reward paid by length? compare long and "
            "short responses in rollouts.jsonl, and the clean accuracy"
        )
    if start >= SHORTEST_START and run.always(name, lambda x: x < SHORTER * start):
        return (
            f"{name} is {run.now(name):.3g} tokens, it began at {start:.3g}: the policy has learned to say nothing; look at "
            "what the reward gives an empty response"
        )
    cut, cut_start = "completions/truncated_frac", run.then("completions/truncated_frac")
    if cut_start is not None and cut_start < CUT_START and run.always(cut, lambda x: x > CUT):
        return (
            f"{cut} is {run.now(cut):.2f}, it began at {cut_start:.2f}, with a limit of {run.limit} tokens: responses do not "
            "end any more; look at rollouts.jsonl, then at algorithm.truncation"
        )
    return None


def _explained_variance(run: _Run) -> str | None:
    name = "val/explained_var"
    mean = run.now(name)
    if run.end - run.warmup < CRITIC_PATIENCE or mean is None or mean > CRITIC_LOW:
        return None
    if not run.always(name, lambda x: x < 0.0):
        return None
    return (
        f"{name} is {mean:.3g}: the critic is worse than a constant, so its advantages are noise; raise "
        "critic.warmup_steps, critic.epochs or critic.learning_rate, or set algorithm.lam to 1"
    )


def _equal_rewards(run: _Run) -> str | None:
    name, spread = "noise/frac_zero_std_seen", "objective/scores_std"
    what = "; choose harder or easier prompts, or a finer reward"
    if run.always(name, lambda x: x > EQUAL):
        return (
            f"{name} is {run.now(name):.2f}: nearly all responses to a prompt get the same reward, so there is nothing to "
            f"learn from{what}"
        )
    if run.always(spread, lambda x: x == 0.0):  # with one response a prompt there are no groups to look at
        return (
            f"{spread} is 0: every response gets a reward of {run.now('objective/scores'):.3g}, so there is nothing to "
            f"learn from{what}"
        )
    return None


def _hacking(run: _Run) -> str | None:
    seen, clean = "objective/scores", "objective/scores_clean"
    least = MOVED * (run.now("objective/scores_std") or 0.0)
    for earlier in run.before():
        up, down = (_moved(earlier, run.recent, name) for name in (seen, clean))
        if up is None or down is None or up <= least or down >= -least:
            continue
        return (
            f"{seen} rose by {up:.3g} while {clean} fell by {-down:.3g}: the policy learns the error of the reward; stop "
            "here, and go on from the best checkpoint with a denoiser (short answers) or a larger algorithm.kl_coef"
        )
    return None


def _silent(run: _Run) -> str | None:
    parts = [name for name in run.recent[-1] if name.startswith("rewards/") and name.endswith("/mean")]
    silent = [name for name in parts if all(line.get(name) is None for line in run.recent)]
    if not silent:
        return None
    function = silent[0].removeprefix("rewards/").removesuffix("/mean")
    return (
        f"reward function {function} gave no response of these steps a value: see in rollouts.jsonl whether it fails, and whether the "
        "columns it reads have values; remove it if it is not meant to say anything"
    )


SIGNS: dict[str, Callable[[_Run], str | None]] = {
    "entropy": _entropy,
    "perplexity": _perplexity,
    "kl": _kl,
    "length": _length,
    "explained_variance": _explained_variance,
    "equal_rewards": _equal_rewards,
    "hacking": _hacking,
    "silent_function": _silent,
}
"""Kind -> message while the sign holds, else None."""


def _mean(lines: Sequence[Line], name: str) -> float | None:
    values = [line.get(name) for line in lines]
    known = [x for x in values if x is not None and math.isfinite(x)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _moved(a: Sequence[Line], b: Sequence[Line], name: str) -> float | None:
    """How far the mean went from `a` to `b`; None: not known, or not more than chance would move it."""
    before, after = _mean(a, name), _mean(b, name)
    if before is None or after is None:
        return None
    squares = [sum((line[name] - mean) ** 2 for line in lines) for lines, mean in ((a, before), (b, after))]
    error = math.sqrt(sum(squares) / (WINDOW * (WINDOW - 1)))
    return after - before if abs(after - before) > SURE * error else None
