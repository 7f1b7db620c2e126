"""Statistics of paired samples: pure functions of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

TimeVerdict = Literal["faster", "slower", "cannot tell"]
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
