"""Numbers over seeds: interquartile mean, bootstrap intervals, paired differences, probability of improvement.

As Agarwal et al. 2021 recommend for few runs (arXiv:2108.13264). Intervals are 95 % percentile bootstraps over seeds; with
a handful of seeds they are rough, and too narrow rather than too wide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, trim_mean

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST_FOR_TRIMMING = 4
"""Below this many seeds a quarter of them is less than one, and the interquartile mean is the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number over seeds with its interval.

    Example: Estimate(value=0.512, low=0.497, high=0.526)
    """

    value: float
    low: float | None
    """Lower end of the 95 % interval; None with a single seed."""
    high: float | None

    def apart_from(self, other: "Estimate") -> bool:
        """Whether both have intervals and these do not touch."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low > other.high or self.high < other.low


def interquartile_mean(values: Sequence[float]) -> Estimate:
    """Mean of the middle half: of n sorted values, int(n / 4) are dropped at each end.

    Args:
        values: one per seed.
    """
    return _estimate((np.asarray(values, dtype=np.float64),), _iqm, paired=False)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Interquartile mean of ours - theirs, seed by seed.

    Args:
        ours: one per seed.
        theirs: of the same seeds in the same order.
    """
    return interquartile_mean(
        np.subtract(np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)).tolist()
    )


def probability_of_improvement(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """P(a run of ours > a run of theirs) + 1/2 P(equal), over all pairs of seeds; 0.5 is no difference.

    Args:
        ours: one per seed.
        theirs: one per seed; the number of seeds may differ.
    """
    return _estimate((np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)), _wins)


def share_kept(noisy: Sequence[float], clean: Sequence[float], *, before: float, paired: bool) -> Estimate:
    """Of the accuracy gained with clean rewards, the share gained with noisy ones.

        (iqm(noisy) - before) / (iqm(clean) - before)

    Args:
        noisy: final accuracies, one per seed.
        clean: the same with clean rewards.
        before: accuracy of the model that all of them started from.
        paired: both are of the same seeds in the same order, and are drawn again together.

    Returns:
        The share; without an interval where that of the accuracy with clean rewards reaches down to `before`.

    Raises:
        ValueError: nothing was gained with clean rewards.
    """
    if float(_iqm(np.asarray(clean))) <= before:
        raise ValueError(
            f"nothing was gained with clean rewards: {float(_iqm(np.asarray(clean))):.3f}, {before:.3f} before"
        )

    def share(noisy: Any, clean: Any, axis: int = -1) -> Any:
        return (_iqm(noisy, axis) - before) / (_iqm(clean, axis) - before)

    samples = (np.asarray(noisy, dtype=np.float64), np.asarray(clean, dtype=np.float64))
    gained = interquartile_mean(clean)
    if gained.low is not None and gained.low <= before:  # drawn again, what is divided by passes through 0
        return Estimate(value=float(share(*samples)), low=None, high=None)
    return _estimate(samples, share, paired=paired)


def _iqm(values: Any, axis: int = -1) -> Any:
    share = 0.25 if np.shape(values)[axis] >= FEWEST_FOR_TRIMMING else 0.0
    return trim_mean(values, share, axis=axis)


def _wins(ours: Any, theirs: Any, axis: int = -1) -> Any:
    a, b = np.moveaxis(ours, axis, -1)[..., :, None], np.moveaxis(theirs, axis, -1)[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1))


def _estimate(samples: tuple[Any, ...], statistic: Callable[..., Any], *, paired: bool = False) -> Estimate:
    value = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value=value, low=None, high=None)
    if all(
        (sample == sample[0]).all() for sample in samples
    ):  # nothing varies: the bootstrap divides by nothing
        return Estimate(value=value, low=value, high=value)
    found = bootstrap(
        samples,
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        paired=paired,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value=value, low=float(found.low), high=float(found.high))
