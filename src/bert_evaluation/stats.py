"""Statistics of paired samples: pure functions of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, kendalltau

TimeVerdict = Literal["faster", "slower", "cannot tell"]
QualityVerdict = Literal["not worse", "worse", "cannot tell"]
RESAMPLES = 2000
# The percentile bootstrap of a median of some forty samples covers it less often than its quantiles say; these cover it
# in at least 95 % of simulated runs.
QUANTILES = (0.01, 0.99)
ENOUGH = 6  # below that, even samples that all agree happen by chance in more than 5 % of runs


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
    return _against_1(median([float(ratio) for ratio in ratios], seed), len(ratios))


def unpaired_speedup(base: Sequence[float], variant: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio of medians base / variant of two independent samples, with its bootstrap interval and what it says.

    The interval covers what varies within the samples. What changed for all of one sample, such as a slower machine, is
    in the ratio. Raises ValueError if one of them is empty.
    """
    if not base or not variant:
        raise ValueError(f"{len(base)} and {len(variant)} samples have no ratio")
    random = np.random.default_rng(seed)
    samples = [np.asarray(each, dtype=np.float64) for each in (base, variant)]
    drawn = [np.median(each[random.integers(len(each), size=(RESAMPLES, len(each)))], axis=1) for each in samples]
    low, high = np.quantile(drawn[0] / drawn[1], QUANTILES)
    estimate = float(np.median(samples[0]) / np.median(samples[1]))
    return _against_1(Interval(estimate, float(low), float(high)), min(map(len, samples)))


def _against_1(interval: Interval, samples: int) -> Ratio:
    verdict: TimeVerdict = "cannot tell"
    if samples >= ENOUGH and interval.low > 1:
        verdict = "faster"
    elif samples >= ENOUGH and interval.high < 1:
        verdict = "slower"
    return Ratio(interval.estimate, interval.low, interval.high, verdict)


def beyond_noise(ratio: Ratio, noise: Ratio | None) -> Ratio:
    """The ratio, without a verdict where `noise`, the base against itself, is as far from 1 as its near end."""
    if noise is None:
        return ratio
    floor = max(noise.estimate, 1 / noise.estimate)
    clear = ratio.low > floor if ratio.verdict == "faster" else ratio.high < 1 / floor
    return ratio if clear else replace(ratio, verdict="cannot tell")


def drift(samples: Sequence[float]) -> float | None:
    """The relative change from the first third's median to the last's; None below 2 % or if there is no trend.

    A trend is a rank correlation with time (Kendall 1938) that chance brings about once in a thousand runs.
    """
    third = len(samples) // 3
    if third < 3:
        return None
    change = float(np.median(samples[-third:]) / np.median(samples[:third])) - 1
    trend = kendalltau(range(len(samples)), samples).pvalue < 0.001
    return change if trend and abs(change) >= 0.02 else None


def outliers(samples: Sequence[float]) -> int:
    """How many samples lie more than five (scaled) median absolute deviations from the median."""
    distances = np.abs(np.asarray(samples) - np.median(samples))
    return int((distances > 5 * 1.4826 * np.median(distances)).sum()) if len(samples) else 0


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
