"""A reward against gold verdicts: the two rates of a 0/1 reward, and how any other one ranks right against wrong completions.

rho+ = P(reward 1 | gold 0)     rho- = P(reward 0 | gold 1)     J = 1 - rho+ - rho-
AUC  = P(a right completion is paid more than a wrong one), ties count 1/2        (1 + J) / 2 for a 0/1 reward
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm, rankdata

from vrpo.rng import stream

CONFIDENCE = 0.95
RESAMPLES = 1000


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


def error_rates(
    rewards: np.ndarray, gold: np.ndarray, prompts: np.ndarray
) -> tuple[Rate | None, Rate | None, Rate | None]:
    """rho+, rho- and J of 0/1 rewards, as far as there are gold 0s and gold 1s; NaN: no gold.

    A judge may err on all completions of a prompt, so the intervals count prompts, not completions, as independent where the errors
    within prompts are the more alike: exact binomial ones of the effective number (Korn and Graubard 1998).

    Args:
        rewards: [N] 0 or 1.
        gold: [N] 0, 1 or NaN.
        prompts: [N] number of the prompt of each.
    """
    up, of_up = _rate(rewards == 1, gold == 0, prompts)
    down, of_down = _rate(rewards == 0, gold == 1, prompts)
    if up is None or down is None:
        return up, down, None
    value = 1.0 - up.value - down.value
    # the half-widths of independent estimates add in quadrature; a prompt whose verdicts are inverted adds to both rates
    above = float(np.hypot(up.value - up.low, down.value - down.low))
    below = float(np.hypot(up.high - up.value, down.high - down.value))
    apart, together = float((of_up**2).sum() + (of_down**2).sum()), float(((of_up + of_down) ** 2).sum())
    wider = max(together / apart, 1.0) ** 0.5 if apart > 0 else 1.0
    low, high = max(value - wider * below, -1.0), min(value + wider * above, 1.0)
    return up, down, Rate(value=value, low=low, high=high, of=up.of + down.of)


def _rate(errs: np.ndarray, counts: np.ndarray, prompts: np.ndarray) -> tuple[Rate | None, np.ndarray]:
    """The share of errors among what counts, and how much each prompt moves it: [prompts] sum of (error - share) / number."""
    of = int(counts.sum())
    if of == 0:
        return None, np.zeros(0)
    value = float(errs[counts].mean())
    size = int(prompts.max()) + 1
    moves = np.bincount(prompts[counts], (errs[counts] - value) / of, minlength=size)
    several = len(np.unique(prompts[counts]))
    effective = float(of)
    if 0.0 < value < 1.0 and several > 1:
        variance = float((moves**2).sum()) * several / (several - 1)
        effective = min(value * (1.0 - value) / variance, effective)
    errors, tail = value * effective, (1.0 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, errors, effective - errors + 1.0)) if value > 0.0 else 0.0
    high = float(beta.ppf(1.0 - tail, errors + 1.0, effective - errors)) if value < 1.0 else 1.0
    return Rate(value=value, low=low, high=high, of=of), moves


def ranking(
    rewards: np.ndarray, gold: np.ndarray, groups: Mapping[str, Sequence[int]]
) -> tuple[Rate | None, bool]:
    """AUC of the reward against gold, and whether only completions of the same prompt were compared.

    They alone are where some prompt has right and wrong ones, since a learner compares siblings and easy prompts may be paid more;
    where none has, all are compared. None: there is no right completion, or no wrong one.
    """
    siblings = [_wins(rewards[rows], gold[rows]) for rows in groups.values()]
    mixed = np.array([(wins, pairs) for wins, pairs, _ in siblings if pairs], dtype=np.float64)
    if len(mixed):
        value = float(mixed[:, 0].sum() / mixed[:, 1].sum())
        low, high = _over_prompts(mixed)
        compared = sum(of for _, pairs, of in siblings if pairs)
        return Rate(value=value, low=min(low, value), high=max(high, value), of=compared), True
    wins, pairs, of = _wins(rewards, gold)
    if not pairs:
        return None, False
    value = wins / pairs
    low, high = _over_completions(value, right=int((gold == 1).sum()), wrong=int((gold == 0).sum()))
    return Rate(value=value, low=low, high=high, of=of), False


def _wins(rewards: np.ndarray, gold: np.ndarray) -> tuple[float, int, int]:
    """Right-wrong pairs in which the right one is paid more (ties 1/2), all such pairs, completions with gold."""
    known = ~np.isnan(gold)
    right = gold[known] == 1
    positives, of = int(right.sum()), int(known.sum())
    ranks = rankdata(rewards[known])[right].sum()
    return float(ranks - positives * (positives + 1) / 2), positives * (of - positives), of


def _over_prompts(mixed: np.ndarray) -> tuple[float, float]:
    """Bootstrap over prompts. Two imagined ones are added, one ranked right and one wrong, so that a few that agree are no certainty;
    Agresti and Coull (1998) add as many to a share."""
    pairs = mixed[:, 1].mean()
    whole = np.vstack([mixed, [0.0, pairs], [pairs, pairs]])
    drawn = stream(0, "diagnosis", "ranking").integers(len(whole), size=(RESAMPLES, len(whole)))
    wins, of = whole[drawn].sum(axis=1).T
    low, high = np.quantile(wins / of, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _over_completions(value: float, *, right: int, wrong: int) -> tuple[float, float]:
    """All AUCs that this one is not improbable under: Newcombe 2006, method 5, with the variance of Hanley and McNeil 1982."""
    auc = np.linspace(0.0, 1.0, 4001)
    size = max((right + wrong) / 2 - 1, 0.0)
    spread = 1 + size * (1 - auc) / (2 - auc) + size * auc / (1 + auc)
    error = np.sqrt(auc * (1 - auc) * spread / (right * wrong))
    inside = auc[np.abs(auc - value) <= norm.ppf((1 + CONFIDENCE) / 2) * error + 1e-3]
    return float(inside[0]), float(inside[-1])
