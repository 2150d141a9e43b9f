"""What a reward pays for besides being right: length, words, characters.

Completions are compared with others to the same prompt, and where there is gold with equally right ones: neither an easy prompt nor
a right answer must look like a bias. A word is named where the reward is unlikely to go with it by chance: words are the more likely
to do so the more of them there are, so the best is compared with the best of rewards that are shuffled among comparable completions
(Westfall and Young 1993, maxT). Equal completions count once: a judge that errs by text gives them the same error, and shuffled apart from
each other they would seem to agree on what pays.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csc_array, csr_array
from scipy.stats import rankdata, spearmanr

from vrpo.rng import stream

FEWEST_WITH_WORD = 10
"""Completions that must have a word, and must lack it, before its effect is looked at."""
ENOUGH_GOLD = 100
"""Completions with gold from which on the others are left out."""
SHORT_WORDS, SHORT_CHARACTERS = 12, 60
"""Longest typical completion in which a single character may be what pays."""
MOST_WORDS, MOST_COMPLETIONS, LONGEST_WORD = 5, 20_000, 40
CHANCE, SHUFFLES = 0.01, 299
"""Probability that a reward which pays for no word is said to, and how many shuffled rewards that is judged by."""


@dataclass(frozen=True, slots=True)
class Biases:
    """What goes with a reward among comparable completions."""

    length_correlation: float | None
    """Spearman's; None where reward or length does not vary."""
    length_by_chance: bool
    keywords: tuple[tuple[str, float], ...]
    """Words, and what each adds to the reward."""
    equally_right: bool
    """Whether completions were compared with equally right ones, or with all on the same prompt."""
    short: bool
    """Whether single characters were looked at as well."""


def biases(
    prompts: Sequence[str],
    completions: Sequence[str],
    lengths: Sequence[int],
    rewards: np.ndarray,
    gold: np.ndarray,
) -> Biases:
    """Look for them.

    Args:
        prompts: prompt id of each of N completions.
        completions: texts.
        lengths: tokens.
        rewards: [N]
        gold: [N] 0, 1 or NaN.
    """
    rows, cells, equally_right = comparable(prompts, gold)
    rows, cells, paid = distinct(rows, cells, list(zip(completions, lengths, strict=True)), rewards)
    long = np.array([lengths[row] for row in rows], dtype=np.float64)
    texts = [completions[row] for row in rows]
    correlated, by_chance = length_correlation(paid, long, cells)
    short = are_short(completions)
    counts = correlated is not None and not by_chance
    words = keywords(texts, paid, cells, characters=short, lengths=long if counts else None)
    return Biases(correlated, by_chance, words, equally_right, short)


def are_short(completions: Sequence[str]) -> bool:
    """Whether the typical completion is an answer of some words, not a text."""
    words = np.median([len(text.split()) for text in completions])
    return bool(words <= SHORT_WORDS and np.median([len(text) for text in completions]) <= SHORT_CHARACTERS)


def comparable(prompts: Sequence[str], gold: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Rows that can be compared with others, the number of each one's cell, and whether a cell is equally right.

    Args:
        prompts: prompt id of each completion.
        gold: 0, 1 or NaN for each.

    Returns:
        A cell holds the completions of one prompt, with enough gold those of one verdict. One alone in its cell is left out.
    """
    judged = ~np.isnan(gold)
    by_gold = bool(judged.all() or judged.sum() >= ENOUGH_GOLD)
    rows = np.flatnonzero(judged) if by_gold else np.arange(len(gold))
    keys = [(prompts[row], float(gold[row]) if by_gold else None) for row in rows[-MOST_COMPLETIONS:]]
    count = Counter(keys)
    kept = [i for i, key in enumerate(keys) if count[key] > 1]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys[i] for i in kept))}
    cells = np.array([numbers[keys[i]] for i in kept], dtype=np.int64)
    return rows[-MOST_COMPLETIONS:][kept], cells, by_gold


def distinct(
    rows: np.ndarray, cells: np.ndarray, said: Sequence[tuple[str, int]], rewards: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row for equal completions of a cell, with their mean reward; one that is then alone in its cell is left out.

    Args:
        rows: [M] numbers of comparable completions, those that `said` and `rewards` are numbered by.
        cells: [M] number of the cell of each.
        said: text and length of every completion.
        rewards: of every completion.

    Returns:
        The first row of each, its cell, its mean reward.
    """
    same: dict[tuple[int, tuple[str, int]], list[int]] = defaultdict(list)
    for row, cell in zip(rows.tolist(), cells.tolist(), strict=True):
        same[cell, said[row]].append(row)
    different = Counter(cell for cell, _ in same)
    kept = [(equal, cell) for (cell, _), equal in same.items() if different[cell] > 1]
    numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cell for _, cell in kept))}
    return (
        np.array([equal[0] for equal, _ in kept], dtype=np.int64),
        np.array([numbers[cell] for _, cell in kept], dtype=np.int64),
        np.array([rewards[equal].mean() for equal, _ in kept], dtype=np.float64),
    )


def centred(x: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """x minus its mean over the cell. Of equal numbers exactly 0, not what rounding leaves."""
    if not len(x):
        return x
    size = np.bincount(cells)
    left = x - (np.bincount(cells, x) / size)[cells]
    return np.where(np.abs(left) > 1e-12 * max(float(np.abs(x).max()), 1e-300), left, 0.0)


def length_correlation(
    rewards: np.ndarray, lengths: np.ndarray, cells: np.ndarray
) -> tuple[float | None, bool]:
    """Spearman correlation of reward and length over cells, and whether it may be chance.

    It may where more than CHANCE of the rewards shuffled within cells go with length as well: a few completions often do.
    """
    paid, long = centred(rewards, cells), centred(lengths, cells)
    found = correlation(paid, long)
    if found is None:
        return None, False
    ranks = [rankdata(x) - (len(x) + 1) / 2 for x in (paid, long)]
    most = abs(float(ranks[0] @ ranks[1])) * (1 - 1e-9)
    return found, _by_chance(lambda shuffled: abs(float(shuffled @ ranks[1])) >= most, ranks[0], cells)


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where one of the two does not vary."""
    return float(spearmanr(a, b).statistic) if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0 else None


def keywords(
    completions: Sequence[str],
    rewards: np.ndarray,
    cells: np.ndarray,
    *,
    characters: bool,
    lengths: np.ndarray | None = None,
) -> tuple[tuple[str, float], ...]:
    """Up to five words that go with more or less reward within cells, the surest first, and how much each adds to it.

    What a word explains is taken out before the next is looked for, or every answer with a 9 in it would be named beside the 9. So is what
    length explains, as soon as it explains more than any word, or words of long completions would be named.

    Args:
        completions: [N] texts.
        rewards: [N]
        cells: [N] number of the cell of each.
        characters: whether to look at single characters too.
        lengths: [N], if they go with the reward.
    """
    names, has = _occurrences(completions, characters=characters)
    if not names:
        return ()
    norms = _norms(has, cells)
    names, has, norms = (
        [n for n, x in zip(names, norms, strict=True) if x >= 1.0],
        has[:, norms >= 1.0],
        norms[norms >= 1.0],
    )
    whole = left = centred(rewards, cells)
    # straight in length, and in its ranks: a judge may like any longer completion as much
    of_length = [] if lengths is None else [centred(x, cells) for x in (lengths, rankdata(lengths))]
    chosen: list[int] = []
    known: list[np.ndarray] = []
    effects = np.zeros(0)
    while names and len(chosen) < MOST_WORDS and np.abs(left).max() > 1e-9 * np.abs(whole).max():
        moved = (has.T @ left) / np.sqrt(norms)
        best = float(np.abs(moved).max())
        if of_length and max(abs(float(x @ left)) / np.sqrt(x @ x) for x in of_length) > best * (1 + 1e-9):
            known, of_length = of_length, []
            left, effects = _without(whole, known + [_column(has, word, cells) for word in chosen])
            continue
        if _by_chance(partial(_best_reaches, best, has, norms), left, cells):
            break
        # of words that always stand together, or of which one always does, the one that is paid and says most
        tied = np.flatnonzero(np.abs(moved) >= best * (1 - 1e-9))
        chosen.append(int(max(tied, key=lambda word: (moved[word] > 0, len(names[word]), names[word]))))
        left, effects = _without(whole, known + [_column(has, word, cells) for word in chosen])
    return tuple(
        (names[word], float(effect)) for word, effect in zip(chosen, effects[len(known) :], strict=True)
    )


def _column(has: Any, word: int, cells: np.ndarray) -> np.ndarray:
    """[N] Where the word occurs, less its share of the cell."""
    return centred(has[:, [word]].toarray()[:, 0], cells)


def _without(whole: np.ndarray, columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What least squares on the columns leaves of `whole`, and their coefficients."""
    stacked = np.stack(columns, axis=1)
    effects = np.linalg.lstsq(stacked, whole, rcond=None)[0]
    return whole - stacked @ effects, effects


def _occurrences(completions: Sequence[str], *, characters: bool) -> tuple[list[str], Any]:
    """Words that are neither rare nor everywhere, and [N, words] 1 where a completion has one."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(completions):
        lower = text.lower()
        found = {(word.strip(string.punctuation) or word)[:LONGEST_WORD] for word in lower.split()}
        if characters:
            found |= {character for character in lower if not character.isspace()}
        for word in found:
            rows[word].append(row)
    most = len(completions) - FEWEST_WITH_WORD
    names = sorted(word for word, having in rows.items() if FEWEST_WITH_WORD <= len(having) <= most)
    if not names:
        return [], None
    ends = np.cumsum([0, *(len(rows[word]) for word in names)])
    having = np.concatenate([rows[word] for word in names])
    return names, csc_array((np.ones(len(having)), having, ends), shape=(len(completions), len(names)))


def _norms(has: Any, cells: np.ndarray) -> np.ndarray:
    """[words] Sum of squares of each column once it is centred in its cells: n1 (1 - n1 / n) of each."""
    inside = csr_array((np.ones(len(cells)), (cells, np.arange(len(cells)))))
    having = (inside @ has).tocsr()
    size = np.bincount(cells).astype(np.float64)
    return np.asarray(having.sum(axis=0) - (having.power(2).T @ (1.0 / size))).ravel()


def _best_reaches(best: float, has: Any, norms: np.ndarray, shuffled: np.ndarray) -> bool:
    return bool(np.abs((has.T @ shuffled) / np.sqrt(norms)).max() >= best * (1 - 1e-9))


def _by_chance(as_well: Callable[[np.ndarray], bool], x: np.ndarray, cells: np.ndarray) -> bool:
    """Whether more than CHANCE of the x that are shuffled within cells do as well."""
    draw = stream(0, "diagnosis", "shuffles")
    place = np.argsort(cells, kind="stable")
    above = 0
    for _ in range(SHUFFLES):
        shuffled = np.empty_like(x)
        shuffled[place] = x[np.lexsort((draw.random(len(x)), cells))]
        above += as_well(shuffled)
        if (above + 1) / (SHUFFLES + 1) > CHANCE:
            return True
    return False
