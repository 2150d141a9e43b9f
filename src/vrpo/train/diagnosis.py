"""`vrpo diagnose`: is this reward noisy, and can anything be learned from it?

    sample completions -> score them, several times -> numbers with intervals -> advice (`train.advice`)
    or read them from a file (`train.diagnosis_files`)

Everything is estimated from completions of the model that would be trained. Where gold verdicts are known, the noise is measured
against them (`train.diagnosis_channel`); without gold only what a reward shows of itself is, such as what it pays for
(`train.diagnosis_biases`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vrpo.errors import DataError
from vrpo.train.diagnosis_biases import biases, correlation
from vrpo.train.diagnosis_channel import Rate, error_rates, ranking

VERDICT = "a gold verdict is 0 (wrong) or 1 (right), or null where there is none; write marks on a scale as 1 from the mark on that passes"
"""What a message about another gold value says."""


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
    """The trusted verdict, 0 or 1; None: not known."""
    clean_reward: float | None = None
    """The reward before simulated noise. Gold where nothing else is, unless it is the reward itself on all completions."""
    parts: Mapping[str, float | None] | None = None
    """Each reward function's value the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a sample of judged completions says about a reward. None: not known from this sample."""

    completions: int
    prompts: int
    missing: float
    """Share of a completion's scorings without a reward, mean over completions; a lone null counts as all of them."""
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
    """Spearman correlation of reward and length among comparable completions."""
    length_by_chance: bool
    """Whether rewards shuffled among comparable completions go with length as well in more than one case of a hundred."""
    keywords: tuple[tuple[str, float], ...]
    """Words, and where completions are short characters, that go with more or less reward among comparable completions, the surest first;
    what each adds to it."""
    equally_right: bool
    """Whether completions were comparable if they answer the same prompt and are equally right; else the same prompt was enough."""
    short: bool
    """Whether completions are short answers."""
    ties: float | None
    """Share of the prompts with several rewards whose completions all get the same one; None without such prompts."""
    several: int
    """Prompts with several rewards."""
    false_positive: Rate | None
    """rho+ = P(reward 1 | gold 0)."""
    false_negative: Rate | None
    """rho- = P(reward 0 | gold 1)."""
    informativeness: Rate | None
    """J = 1 - rho+ - rho-."""
    auc: Rate | None
    """P(a right completion is paid more than a wrong one), of rewards that are not all 0 or 1."""
    auc_of_siblings: bool
    """Whether that is over pairs of one prompt."""
    mean_if: tuple[float, float] | None
    """Mean reward of wrong and of right completions, of rewards that are not all 0 or 1."""
    gold_mean: float | None
    """Mean gold verdict."""
    no_gold: str | None
    """Why clean rewards do not count as gold, where they do not."""
    mixed: float | None
    """Share of prompts with both right and wrong completions by gold, of those with a gold verdict on each."""
    different: float | None
    """Share of the same prompts whose completions do not all get the same reward."""
    group: int
    """Completions a prompt, the most common number among prompts with several."""

    @property
    def compared(self) -> str:
        """Which completions are compared in the search for biases."""
        return "among equally right ones of a prompt" if self.equally_right else "within prompts"

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
            *share(
                "rank correlation with length",
                self.length_correlation,
                self.compared + ", may be chance" * self.length_by_chance,
            ),
            *((f"paid for {word!r}", f"{x:+.3f}", self.compared) for word, x in self.keywords),
            *((f"rank correlation of {names}", f"{x:+.3f}", "") for names, x in self.disagreement.items()),
            *rate("rho+ = P(1 | gold 0)", self.false_positive),
            *rate("rho- = P(0 | gold 1)", self.false_negative),
            *rate("J = 1 - rho+ - rho-", self.informativeness),
            *(
                []
                if self.mean_if is None
                else [("mean if wrong, if right", "{:.3f}, {:.3f}".format(*self.mean_if), "by gold")]
            ),
            *rate(
                "AUC, right above wrong" + (" of a prompt" if self.auc_of_siblings else ", any prompts"),
                self.auc,
            ),
            *share("mean gold verdict", self.gold_mean),
            *share("prompts with mixed gold verdicts", self.mixed),
        ]


def diagnose(judged: Sequence[Judged]) -> Diagnosis:
    """The numbers.

    Raises:
        DataError: there is no completion, or none with a reward, or a gold verdict is neither 0 nor 1.
    """
    known = [j for j in judged if j.rewards[0] is not None]
    if not judged:
        raise DataError("0 completions, at least 1 is needed; give a file with a line for each")
    if not known:
        raise DataError(
            f"{len(judged)} completions and no reward among them, at least 1 is needed; look at the reward's errors"
        )
    rewards = np.array([j.rewards[0] for j in known], dtype=np.float64)
    binary = bool(np.isin(rewards, (0.0, 1.0)).all())
    repeat_share, repeat_variance = _repeats(judged)
    groups: dict[str, list[int]] = defaultdict(list)
    for row, j in enumerate(known):
        groups[j.prompt_id].append(row)
    gold, no_gold = _gold(known)
    prompts = np.unique([j.prompt_id for j in known], return_inverse=True)[1]
    up, down, informativeness = error_rates(rewards, gold, prompts) if binary else (None, None, None)
    auc, of_siblings = (None, False) if binary else ranking(rewards, gold, groups)
    several = [rows for rows in groups.values() if len(rows) > 1]
    with_gold = [rows for rows in several if not np.isnan(gold[rows]).any()]
    columns = [j.prompt_id for j in known], [j.completion for j in known], [j.length for j in known]
    found = biases(*columns, rewards, gold)
    return Diagnosis(
        completions=len(judged),
        prompts=len({j.prompt_id for j in judged}),
        missing=float(np.mean([np.mean([r is None for r in j.rewards]) for j in judged])),
        binary=binary,
        mean=float(rewards.mean()),
        spread=float(rewards.std())
        if np.ptp(rewards) > 0
        else 0.0,  # of equal numbers the mean may be rounded
        repeat_share=repeat_share,
        repeat_variance=repeat_variance,
        disagreement=_disagreement(known),
        length_correlation=found.length_correlation,
        length_by_chance=found.length_by_chance,
        keywords=found.keywords,
        equally_right=found.equally_right,
        short=found.short,
        ties=1.0 - _differing(rewards, several) if several else None,
        several=len(several),
        false_positive=up,
        false_negative=down,
        informativeness=informativeness,
        auc=auc,
        auc_of_siblings=of_siblings,
        mean_if=None if auc is None else (float(rewards[gold == 0].mean()), float(rewards[gold == 1].mean())),
        gold_mean=None if np.isnan(gold).all() else float(np.nanmean(gold)),
        no_gold=no_gold,
        mixed=_differing(gold, with_gold) if with_gold else None,
        different=_differing(rewards, with_gold) if with_gold else None,
        group=Counter(map(len, several)).most_common(1)[0][0] if several else 1,
    )


def _differing(values: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Share of the groups whose values are not all equal."""
    return float(np.mean([np.ptp(values[rows]) > 0 for rows in groups]))


def _gold(known: Sequence[Judged]) -> tuple[np.ndarray, str | None]:
    """[N] Gold verdicts, NaN where there is none, and why clean rewards are no gold."""
    gold = np.array([j.gold for j in known], dtype=np.float64)
    wrong = next((j for j in known if j.gold not in (None, 0.0, 1.0)), None)
    if wrong is not None:
        raise DataError(f"gold is {wrong.gold:g} for completion {wrong.completion[:40]!r}, {VERDICT}")
    clean = np.array([j.clean_reward for j in known], dtype=np.float64)
    present = clean[~np.isnan(clean)]
    if not np.isnan(gold).all() or not len(present):
        return gold, None
    # without simulated noise a run's clean reward is its reward: a judge compared with itself never errs
    if all(j.clean_reward in (None, j.rewards[0]) for j in known):
        return gold, "clean_reward equals reward in every row: no gold; give --gold or a gold key"
    if not np.isin(present, (0.0, 1.0)).all():
        other = present[~np.isin(present, (0.0, 1.0))][0]
        return gold, f"clean_reward {other:g} is no verdict of 0 or 1: no gold; give --gold or a gold key"
    return clean, None


def _repeats(judged: Sequence[Judged]) -> tuple[float | None, float | None]:
    repeated = [x for j in judged if len(x := [r for r in j.rewards if r is not None]) > 1]
    if not repeated:
        return None, None
    whole = float(np.var(np.concatenate(repeated), ddof=1))
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
        if (both := correlation(*columns)) is not None:
            found[f"{a}, {b}"] = both
    return found
