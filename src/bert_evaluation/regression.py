"""Is an experiment as good as a baseline? Every row held to its promise, its speed and its F1."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bert_evaluation.comparison import Absent, Comparison, Pair, PairedQuality, Speed, compare
from bert_evaluation.rows import Row
from bert_evaluation.stats import ENOUGH, Interval
from bert_evaluation.stored import Stored

Verdict = Literal["pass", "fail", "cannot tell"]
Measure = Literal["row", "promise", "inference", "throughput", "F1"]


@dataclass(frozen=True)
class Limits:
    """What is asked for: how much slower a row may be, and the share of the baseline's F1 to be kept."""

    max_slowdown: float = 0.03
    min_f1_ratio: float = 0.99

    @property
    def least_speed(self) -> float:
        """The ratio of speeds that a row has to reach."""
        return 1 - self.max_slowdown


@dataclass(frozen=True)
class Check:
    """One thing that was held against the baseline: `found` has to be at least `least`, if it is a number at all."""

    row: str
    measure: Measure
    verdict: Verdict
    reason: str
    found: Interval | None = None
    least: float | None = None


@dataclass(frozen=True)
class Regression:
    """All checks of an experiment against a baseline."""

    comparison: Comparison
    limits: Limits
    checks: tuple[Check, ...]

    def count(self, verdict: Verdict) -> int:
        """How many checks came out so."""
        return sum(each.verdict == verdict for each in self.checks)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all: one that fails, else one that cannot be told. No checks tell nothing."""
        if self.count("fail"):
            return "fail"
        return "pass" if self.checks and not self.count("cannot tell") else "cannot tell"


def check(baseline: Stored, current: Stored, limits: Limits = Limits()) -> Regression:
    """Hold every row of the baseline, and all that was measured of it, against the current experiment."""
    comparison = compare(baseline, current, limits.min_f1_ratio)
    pairs = {pair.before: pair for pair in comparison.pairs}
    checks = [
        each
        for name in baseline.rows
        for each in (
            _row(pairs[name], current.rows[name], limits)
            if name in pairs
            else [Check(name, "row", "fail", f"there is no such row in {current.name}")]
        )
    ]
    return Regression(comparison, limits, tuple(checks))


def _row(pair: Pair, row: Row, limits: Limits) -> Iterator[Check]:
    if (found := row.verification) is not None:
        text = f"{found.promise} promise {found.verdict}"
        text += "" if found.kept else f" on {found.failing_probe}"
        yield Check(row.name, "promise", "pass" if found.kept else "fail", text)
    measured: tuple[tuple[Measure, Speed | Absent], ...] = (
        ("inference", pair.inference),
        ("throughput", pair.throughput),
    )
    for measure, speed in measured:
        yield from (
            _absent(row.name, measure, speed)
            if isinstance(speed, Absent)
            else [_speed(row.name, measure, speed, limits.least_speed)]
        )
    quality = pair.quality
    yield from _absent(row.name, "F1", quality) if isinstance(quality, Absent) else [_f1(row.name, quality)]


def _absent(row: str, measure: Measure, absent: Absent) -> Iterator[Check]:
    """What the baseline does not have is not checked; what is the same by identity passes."""
    if absent.why != "before":
        yield Check(row, measure, "pass" if absent.why == "same" else "cannot tell", absent.reason)


def _speed(row: str, measure: Measure, speed: Speed, least: float) -> Check:
    """Surely as fast as asked for, surely not, or neither; what a slower machine may have done is no failure."""
    found = speed.judged
    verdict: Verdict = "cannot tell"
    reason = "in units of Base's time in each" if speed.relative else "by the clock"
    if speed.samples < ENOUGH:
        reason += f", from {speed.samples} {'sample' if speed.samples == 1 else 'samples'} only"
    elif found.low >= least:
        verdict = "pass"
    elif found.high < least and speed.is_controlled:
        verdict = "fail"
    elif found.high < least:
        reason += ", which a slower machine would explain: there is no Base to take it out"
    return Check(row, measure, verdict, reason, found, least)


def _f1(row: str, quality: PairedQuality) -> Check:
    verdicts: dict[str, Verdict] = {"not worse": "pass", "worse": "fail"}
    difference = quality.f1_difference
    changed = f"{quality.changed_answers} of {quality.samples} answers changed"
    least = (quality.margin - 1) * quality.f1_before
    return Check(row, "F1", verdicts.get(difference.verdict, "cannot tell"), changed, difference, least)
