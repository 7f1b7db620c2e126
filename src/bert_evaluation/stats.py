"""Statistics of paired samples: pure functions of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

TimeVerdict = Literal["faster", "slower", "cannot tell"]
QualityVerdict = Literal["not worse", "worse", "cannot tell"]
RESAMPLES = 2000
# The percentile bootstrap of a median of some forty samples covers it less often than its quantiles say; these cover it
# in at least 95 % of simulated runs.
QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio(Interval):
    """How many times faster: above 1 is faster."""

    verdict: TimeVerdict


@dataclass(frozen=True)
class Difference(Interval):
    """A difference of quality, variant - base: below 0 is a loss. The verdict is about a margin, not about 0."""

    verdict: QualityVerdict


def median(samples: Sequence[float], seed: int = 0) -> Interval:
    """The median and its percentile bootstrap interval (Efron 1979)."""
    values = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), QUANTILES)
    return Interval(float(np.median(values)), float(low), float(high))


def speedup(base: Sequence[float], variant: Sequence[float], seed: int = 0) -> Ratio:
    """The median ratio base / variant over rounds in which both ran, with its interval and what it says.

    Pairing takes out what slows a whole round. Raises ValueError if the lengths differ or nothing was timed.
    """
    if len(base) != len(variant) or len(base) == 0:
        raise ValueError(f"{len(base)} and {len(variant)} samples are no pairs")
    ratios = np.asarray(base, dtype=np.float64) / np.asarray(variant, dtype=np.float64)
    interval = median([float(ratio) for ratio in ratios], seed)
    enough = len(ratios) >= 6  # below that, even samples that all agree happen by chance in more than 5 % of runs
    verdict: TimeVerdict = "cannot tell"
    if enough and interval.low > 1:
        verdict = "faster"
    elif enough and interval.high < 1:
        verdict = "slower"
    return Ratio(interval.estimate, interval.low, interval.high, verdict)


def paired_difference(
    base: ArrayLike, variant: ArrayLike, one_more_loss: float | None = None, seed: int = 0
) -> Interval:
    """The mean of variant - base over the same questions, with its percentile bootstrap interval (Efron 1979).

    With `one_more_loss`, resamples are drawn from the questions and one more on which so much was lost: without it a
    few questions on which nothing was lost would prove that nothing can be. This is the rule of three (Hanley 1983) in
    the form of a bootstrap.
    """
    differences = np.asarray(variant, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    drawn_from = differences if one_more_loss is None else np.append(differences, -one_more_loss)
    # A resample is as many draws of each distinct value as a multinomial distribution says.
    values, counts = np.unique(drawn_from, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(drawn_from), counts / len(drawn_from), size=RESAMPLES)
    low, high = np.quantile(draws @ values / len(drawn_from), (0.025, 0.975))
    return Interval(float(differences.mean()), float(low), float(high))


def against_margin(difference: Interval, allowed_loss: float) -> Difference:
    """Whether a difference is surely no worse than the loss that is allowed, surely worse, or neither."""
    verdict: QualityVerdict = "cannot tell"
    if difference.low >= -allowed_loss:
        verdict = "not worse"
    elif difference.high < -allowed_loss:
        verdict = "worse"
    return Difference(difference.estimate, difference.low, difference.high, verdict)


def mcnemar(base: ArrayLike, variant: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test (1947) on right and wrong answers to the same questions.

    How likely gains and losses would be so uneven if both were equally likely.
    """
    right, right_too = np.asarray(base, dtype=bool), np.asarray(variant, dtype=bool)
    lost, won = int((right & ~right_too).sum()), int((~right & right_too).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
