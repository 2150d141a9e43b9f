"""`vrpo diagnose`: is this reward noisy, and can anything be learned from it?

    sample completions -> score them, several times -> numbers with intervals -> advice (`train.advice`)

Everything is estimated from completions of the model that would be trained. Where gold verdicts are known, the noise channel
is estimated with exact binomial intervals (Clopper and Pearson 1934); without gold only what a reward shows of itself is.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, spearmanr

from vrpo.errors import DataError

WORD = re.compile(r"[^\W\d_]{3,}")
"""What counts as a keyword: three letters or more."""
FEWEST_WITH_WORD = 10
"""Completions that must have a word, and must lack it, before its effect is looked at."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion with what was said about it.

    Example: Judged(prompt_id="train/3", completion="46", length=3, rewards=(1.0, 0.0), gold=1.0, parts={"exact": 1.0})
    """

    prompt_id: str
    completion: str
    length: int
    """Tokens, or characters where tokens are not known."""
    rewards: tuple[float | None, ...]
    """The reward, once per time it was scored; None: missing."""
    gold: float | None = None
    """The trusted verdict; None: not known."""
    parts: Mapping[str, float | None] | None = None
    """Each reward function's value the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share with its interval.

    Example: Rate(value=0.31, low=0.24, high=0.39, of=160)
    """

    value: float
    low: float
    high: float
    of: int
    """Completions it was counted over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a sample of judged completions says about a reward. None: not known from this sample."""

    completions: int
    prompts: int
    missing: float
    """Share of scorings without a reward."""
    binary: bool
    """Whether every reward is 0 or 1."""
    mean: float
    spread: float
    """Standard deviation of the reward over completions."""
    repeat_share: float | None
    """Share of completions whose reward differs between scorings; None when scored once."""
    repeat_variance: float | None
    """Variance between scorings of a completion, as a share of the reward's whole variance."""
    disagreement: Mapping[str, float]
    """"a, b" -> Spearman correlation of two reward functions over completions."""
    length_correlation: float | None
    """Spearman correlation of reward and length within prompts."""
    keywords: tuple[tuple[str, float], ...]
    """Words with the largest difference in mean reward within prompts, where it is beyond 3 standard errors."""
    ties: float
    """Share of prompts whose completions all get the same reward."""
    false_positive: Rate | None
    """rho+ = P(reward 1 | gold 0)."""
    false_negative: Rate | None
    """rho- = P(reward 0 | gold 1)."""
    informativeness: Rate | None
    """J; its interval is that of the sum of two independent rates."""
    gold_mean: float | None
    """Mean gold verdict."""
    mixed: float | None
    """Share of prompts with both right and wrong completions by gold."""
    group: int
    """Completions a prompt, the most common number."""

    def lines(self) -> list[tuple[str, str, str]]:
        """Name, value, interval or count of everything that is known, for people."""

        def share(name: str, x: float | None, note: str = "") -> list[tuple[str, str, str]]:
            return [] if x is None else [(name, f"{x:.3f}", note)]

        def rate(name: str, x: Rate | None) -> list[tuple[str, str, str]]:
            return [] if x is None else [(name, f"{x.value:.3f}", f"{x.low:.3f} .. {x.high:.3f}, of {x.of}")]

        return [
            ("completions", str(self.completions), f"{self.prompts} prompts, {self.group} each"),
            (
                "mean, standard deviation",
                f"{self.mean:.3f}, {self.spread:.3f}",
                "0/1" if self.binary else "any number",
            ),
            *share("missing", self.missing),
            *share("different when scored again", self.repeat_share),
            *share("variance between scorings", self.repeat_variance, "share of the whole variance"),
            *share("prompts with equal rewards only", self.ties),
            *share("rank correlation with length", self.length_correlation, "within prompts"),
            *((f"paid for {word!r}", f"{x:+.3f}", "within prompts") for word, x in self.keywords),
            *((f"rank correlation of {names}", f"{x:+.3f}", "") for names, x in self.disagreement.items()),
            *rate("rho+ = P(1 | gold 0)", self.false_positive),
            *rate("rho- = P(0 | gold 1)", self.false_negative),
            *rate("J = 1 - rho+ - rho-", self.informativeness),
            *share("mean gold verdict", self.gold_mean),
            *share("prompts with mixed gold verdicts", self.mixed),
        ]


def diagnose(judged: Sequence[Judged]) -> Diagnosis:
    """The numbers.

    Raises:
        DataError: there is no completion, or none with a reward.
    """
    first = [j.rewards[0] for j in judged]
    known = [j for j, r in zip(judged, first, strict=True) if r is not None]
    if not known:
        raise DataError(
            f"{len(judged)} completions and no reward among them, at least 1 is needed; look at the reward's errors"
        )
    rewards = np.array([j.rewards[0] for j in known], dtype=np.float64)
    scorings = [r for j in judged for r in j.rewards]
    binary = bool(np.isin(rewards, (0.0, 1.0)).all())
    repeat_share, repeat_variance = _repeats(judged)
    groups: dict[str, list[int]] = defaultdict(list)
    for row, j in enumerate(known):
        groups[j.prompt_id].append(row)
    centred = _within(rewards, groups)
    gold = np.array([np.nan if j.gold is None else j.gold for j in known], dtype=np.float64)
    channel = _channel(rewards, gold) if binary else (None, None, None)
    with_gold = {k: gold[rows] for k, rows in groups.items() if not np.isnan(gold[rows]).any()}
    several = [rows for rows in groups.values() if len(rows) > 1]
    return Diagnosis(
        completions=len(judged),
        prompts=len(groups),
        missing=sum(r is None for r in scorings) / len(scorings),
        binary=binary,
        mean=float(rewards.mean()),
        spread=float(rewards.std()),
        repeat_share=repeat_share,
        repeat_variance=repeat_variance,
        disagreement=_disagreement(known),
        length_correlation=_correlation(centred, _within(np.array([float(j.length) for j in known]), groups)),
        keywords=_keywords(known, centred),
        ties=float(np.mean([np.ptp(rewards[rows]) == 0 for rows in several])) if several else 0.0,
        false_positive=channel[0],
        false_negative=channel[1],
        informativeness=channel[2],
        gold_mean=None if np.isnan(gold).all() else float(np.nanmean(gold)),
        mixed=float(np.mean([np.ptp(values) > 0 for values in with_gold.values()])) if with_gold else None,
        group=Counter(map(len, groups.values())).most_common(1)[0][0],
    )


def _within(x: np.ndarray, groups: Mapping[str, list[int]]) -> np.ndarray:
    """x minus its mean over the completions of the same prompt: easy prompts must not look like biases."""
    centred = x.copy()
    for rows in groups.values():
        centred[rows] -= x[rows].mean()
    return centred


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(spearmanr(a, b).statistic) if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _repeats(judged: Sequence[Judged]) -> tuple[float | None, float | None]:
    repeated = [x for j in judged if len(x := [r for r in j.rewards if r is not None]) > 1]
    if not repeated:
        return None, None
    whole = float(np.var(np.concatenate(repeated)))
    own = float(np.mean([np.var(x, ddof=1) for x in repeated]))
    return float(np.mean([np.ptp(x) > 0 for x in repeated])), own / whole if whole else 0.0


def _disagreement(known: Sequence[Judged]) -> dict[str, float]:
    names = list(dict.fromkeys(name for j in known for name in j.parts or {}))
    found: dict[str, float] = {}
    for a, b in combinations(names, 2):
        pairs = [
            (x, y)
            for j in known
            if (x := (j.parts or {}).get(a)) is not None and (y := (j.parts or {}).get(b)) is not None
        ]
        columns = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        if (correlation := _correlation(*columns)) is not None:
            found[f"{a}, {b}"] = correlation
    return found


def _keywords(known: Sequence[Judged], centred: np.ndarray) -> tuple[tuple[str, float], ...]:
    """Up to five words that go with more or less reward than a prompt's other completions get."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, j in enumerate(known):
        for word in set(WORD.findall(j.completion.lower())):
            rows[word].append(row)
    found: list[tuple[str, float]] = []
    for word, having in rows.items():
        lacking = np.setdiff1d(np.arange(len(known)), having)
        if min(len(having), len(lacking)) < FEWEST_WITH_WORD:
            continue
        difference = float(centred[having].mean() - centred[lacking].mean())
        error = np.sqrt(centred[having].var() / len(having) + centred[lacking].var() / len(lacking))
        if abs(difference) > 3.0 * error:
            found.append((word, difference))
    return tuple(sorted(found, key=lambda pair: -abs(pair[1]))[:5])


def _channel(rewards: np.ndarray, gold: np.ndarray) -> tuple[Rate | None, Rate | None, Rate | None]:
    """rho+, rho- and J, as far as there are gold 0s and gold 1s."""
    wrong, right = rewards[gold == 0], rewards[gold == 1]
    up = _rate(int(wrong.sum()), len(wrong)) if len(wrong) else None
    down = _rate(int((1 - right).sum()), len(right)) if len(right) else None
    if up is None or down is None:
        return up, down, None
    value = 1.0 - up.value - down.value
    # each end of J is reached by the two rates together; the half-widths of independent estimates add in quadrature
    above = float(np.hypot(up.high - up.value, down.high - down.value))
    below = float(np.hypot(up.value - up.low, down.value - down.low))
    return up, down, Rate(value=value, low=value - above, high=value + below, of=len(wrong) + len(right))


def _rate(count: int, of: int) -> Rate:
    ends = binomtest(count, of).proportion_ci(CONFIDENCE, method="exact")
    return Rate(value=count / of, low=float(ends.low), high=float(ends.high), of=of)


def read_judged(path: Path) -> list[Judged]:
    """Judged completions from a JSONL file: a run's rollouts.jsonl, or rows of your own.

    Columns: completion (text) and reward (a number, a list of numbers for repeated scorings, or null); prompt_id or prompt;
    optional gold or clean_reward, tokens, parts.

    Raises:
        DataError: a line is no object of that kind.
    """
    return [
        _judged(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]


def _judged(line: str, where: str) -> Judged:
    def fail(problem: str) -> DataError:
        return DataError(
            f"{where}: {problem}; each line is an object with completion, reward and prompt_id or prompt"
        )

    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise fail("it is no JSON") from error
    if not isinstance(row, dict) or not isinstance(row.get("completion"), str) or "reward" not in row:
        raise fail("it has no text in completion, or no reward")
    prompt = row.get("prompt_id", row.get("prompt"))
    if prompt is None:
        raise fail("it names no prompt")
    rewards = row["reward"] if isinstance(row["reward"], list) else [row["reward"]]
    gold = row.get("gold", row.get("clean_reward"))
    numbers = [*rewards, gold]
    if not rewards or not all(x is None or (isinstance(x, int | float) and np.isfinite(x)) for x in numbers):
        raise fail(f"reward {row['reward']!r} and gold {gold!r} must be numbers or null")
    return Judged(
        prompt_id=prompt if isinstance(prompt, str) else json.dumps(prompt),
        completion=row["completion"],
        length=int(row.get("tokens") or len(row["completion"])),
        rewards=tuple(None if x is None else float(x) for x in rewards),
        gold=None if gold is None else float(gold),
        parts=row.get("parts"),
    )
