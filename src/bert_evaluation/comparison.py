"""Two stored experiments, or two rows of one, compared: speed, and the answers question by question.

Within an experiment, rows ran in turns and their times pair. Across experiments they do not: the machine may have been
slower in one of them, which no interval of times within a session covers. So two figures are given. The raw ratio of
the times says what a clock would; it gets no verdict, since it may be the machine's doing. The other is the ratio of
ratios: each row's times in units of Base's in the same rounds, or on the same batches, compared across experiments.
Base is the same graph in both and takes out what slowed everything. The verdict is about this one. What differs between
processes for one graph and not for another, such as the layout of memory, stays in it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bert_evaluation.comparability import Obstacle, notes, obstacles, same_batches
from bert_evaluation.promise import Approximates
from bert_evaluation.quality import difference
from bert_evaluation.rows import BASE, Row
from bert_evaluation.squad.scores import Column, Judged
from bert_evaluation.stats import (
    Difference,
    Ratio,
    beyond_noise,
    mcnemar,
    speedup,
    unpaired_speedup,
)
from bert_evaluation.store import AnswerRecord
from bert_evaluation.stored import Stored, StoredEvaluation


@dataclass(frozen=True)
class Absent:
    """Why something was not compared: not measured before, not after, the same by identity, or for another reason."""

    why: Literal["before", "after", "same", "other"]
    reason: str


@dataclass(frozen=True)
class Speed:
    """How many times faster the second row is: by the clock, and in units of Base's time in each experiment.

    `together` where the two ran in turns, so that the raw ratio is one of pairs; `samples` are those of the smaller
    side.
    """

    raw: Ratio | None
    relative: Ratio | None
    together: bool
    samples: int

    @property
    def judged(self) -> Ratio:
        """The ratio that the verdict is about."""
        found = self.relative or self.raw
        assert found is not None  # or it would be Absent
        return found

    @property
    def is_controlled(self) -> bool:
        """Whether a slower machine is taken out of what is judged."""
        return self.together or self.relative is not None


@dataclass(frozen=True)
class PairedQuality:
    """Scores in percent before and after, on the questions that both answered, and their paired differences."""

    samples: int
    f1_before: float
    f1_after: float
    exact_before: float
    exact_after: float
    margin: float
    f1_difference: Difference
    exact_difference: Difference
    mcnemar_p: float
    changed_answers: int


@dataclass(frozen=True)
class Pair:
    """Two rows compared; `note` is what else differs between them."""

    before: str
    after: str
    inference: Speed | Absent
    throughput: Speed | Absent
    quality: PairedQuality | Absent
    note: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two experiments compared. `base` is what Base itself did between them; None within one experiment."""

    before: str
    after: str
    obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...]
    base: Pair | None
    pairs: tuple[Pair, ...]
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()


def compare(one: Stored, other: Stored, margin: float, rows: tuple[str, str] | None = None) -> Comparison:
    """Compare rows of the same name, or the two named. `margin` is the share of the first one's F1 to be kept."""
    before, after = one.rows, other.rows
    shared = [(name, name) for name in before if name in after] if rows is None else [rows]
    found = _Experiments(one, other, margin)
    has_base = not found.is_one and BASE in before and BASE in after
    return Comparison(
        one.name,
        other.name,
        found.obstacles,
        notes(one, other),
        found.pair(before[BASE], after[BASE]) if has_base else None,
        tuple(found.pair(before[first], after[second]) for first, second in shared),
        () if rows else tuple(name for name in before if name not in after),
        () if rows else tuple(name for name in after if name not in before),
    )


class _Experiments:
    """The two experiments that rows are compared of."""

    def __init__(self, one: Stored, other: Stored, margin: float) -> None:
        self.one, self.other, self.margin = one, other, margin
        self.is_one = one.is_as(other)
        self.obstacles = obstacles(one, other)

    def pair(self, before: Row, after: Row) -> Pair:
        differ = before.name == after.name and before.recipe != after.recipe
        note = f"other arguments: {before.recipe} in {self.one.name}, {after.recipe} in {self.other.name}"
        return Pair(
            before.name,
            after.name,
            self._inference(before, after),
            self._throughput(before, after),
            self._quality(before, after),
            note if differ else None,
        )

    def _inference(self, before: Row, after: Row) -> Speed | Absent:
        times, new_times = self.one.times_of(before), self.other.times_of(after)
        if times is None:
            return Absent("before", f"not timed in {self.one.name}")
        if new_times is None:
            return Absent("after", f"not timed in {self.other.name}")
        if self._are_one_graph(before, after):
            return Absent("same", "the graph is Base's in both")
        samples = min(len(times), len(new_times))
        noises = [each.outcome.noise for each in (self.one, self.other) if each.outcome.noise is not None]
        noise = max(noises, key=lambda each: max(each.estimate, 1 / each.estimate), default=None)
        if self.is_one:
            return Speed(beyond_noise(speedup(times, new_times), noise), None, True, samples)
        relative = None
        if self._has_control(before, after):
            units, new_units = _in_units(times, self.one), _in_units(new_times, self.other)
            if units and new_units:
                relative = beyond_noise(unpaired_speedup(units, new_units), noise)
        return Speed(_unjudged(unpaired_speedup(times, new_times)), relative, False, samples)

    def _throughput(self, before: Row, after: Row) -> Speed | Absent:
        found, new = self.one.evaluation_of(before), self.other.evaluation_of(after)
        if (missing := self._not_evaluated(before, after)) is not None:
            return missing
        if self._are_one_graph(before, after):
            return Absent("same", "the graph is Base's in both")
        if self.one.file == self.other.file and before.evaluation == after.evaluation:
            return Absent("same", "one stored evaluation stands for both: graph, questions, settings and machine agree")
        if found is None or new is None or not found.batches or not new.batches:
            return Absent("other", "the times of its batches are not in the store any more")
        if self.is_one:
            pairs = _side_by_side(found, new).values()
            if not pairs:
                return Absent("other", "not run side by side")
            return Speed(speedup([one for one, _ in pairs], [other for _, other in pairs]), None, True, len(pairs))
        seconds, new_seconds = _seconds(found), _seconds(new)
        units, new_units = dict[int, float](), dict[int, float]()
        if self._has_control(before, after):
            units, new_units = _in_units_of_base(self.one, found), _in_units_of_base(self.other, new)
        if same_batches(found, new) and (shared := seconds.keys() & new_seconds.keys()):
            raw = _unjudged(_by_number(seconds, new_seconds, shared))
            if both := units.keys() & new_units.keys():
                return Speed(raw, _by_number(units, new_units, both), False, len(both))
            return Speed(raw, None, False, len(shared))
        if units and new_units:
            relative = unpaired_speedup(list(units.values()), list(new_units.values()))
            return Speed(None, relative, False, min(len(units), len(new_units)))
        return Absent("other", "other batches, and no Base that ran side by side with it")

    def _quality(self, before: Row, after: Row) -> PairedQuality | Absent:
        found, new = self.one.evaluation_of(before), self.other.evaluation_of(after)
        if (missing := self._not_evaluated(before, after)) is not None:
            return missing
        if found is None or new is None or not found.answers or not new.answers:
            return Absent("other", "its answers are not in the store any more")
        shared = sorted(found.answers.keys() & new.answers.keys())
        if not shared:
            return Absent("other", "no question in common")
        answers = [[each.answers[question] for question in shared] for each in (found, new)]
        thresholds = [each.outcome.experiment.rule.null_threshold for each in (self.one, self.other)]
        # Beside these questions, a promise of the same function that was kept speaks for the quality, if there is one.
        wary = bool(self.obstacles) or any(
            row.verification is not None and row.verification.promise == Approximates.kind for row in (before, after)
        )
        return paired_quality(answers[0], answers[1], (thresholds[0], thresholds[1]), self.margin, wary)

    def _not_evaluated(self, before: Row, after: Row) -> Absent | None:
        if before.evaluation is None:
            return Absent("before", f"not evaluated in {self.one.name}")
        return Absent("after", f"not evaluated in {self.other.name}") if after.evaluation is None else None

    def _are_one_graph(self, before: Row, after: Row) -> bool:
        """Whether both graphs are Base's without being Base, so that there is nothing to time."""
        base_like = all(row.unchanged or row.name == BASE for row in (before, after))
        return base_like and (self.is_one or (before.unchanged and after.unchanged))

    def _has_control(self, before: Row, after: Row) -> bool:
        """Whether Base can be a unit of time: it is the same graph in both, and not what is timed."""
        bases = [each.evaluation_of(each.rows.get(BASE)) for each in (self.one, self.other)]
        hashes = {each.key.graph_hash for each in bases if each is not None}
        return len(hashes) < 2 and not before.name == after.name == BASE


def paired_quality(
    before: Sequence[AnswerRecord],
    after: Sequence[AnswerRecord],
    null_thresholds: tuple[float, float],
    margin: float,
    wary: bool = False,
) -> PairedQuality:
    """Answers to the same questions, in the same order, each under the null threshold of its experiment.

    `wary` where nothing but these questions speaks for the quality. See `stats.paired_difference`.
    """
    exact, f1 = _scores(before, null_thresholds[0])
    new_exact, new_f1 = _scores(after, null_thresholds[1])
    texts = [[each.text(limit) for each in side] for side, limit in zip((before, after), null_thresholds, strict=True)]
    return PairedQuality(
        samples=len(before),
        f1_before=100 * float(f1.mean()),
        f1_after=100 * float(new_f1.mean()),
        exact_before=100 * float(exact.mean()),
        exact_after=100 * float(new_exact.mean()),
        margin=margin,
        f1_difference=difference(f1, new_f1, margin, wary),
        exact_difference=difference(exact, new_exact, margin, wary),
        mcnemar_p=mcnemar(exact, new_exact),
        changed_answers=sum(old != new for old, new in zip(*texts, strict=True)),
    )


def _scores(answers: Iterable[AnswerRecord], null_threshold: float) -> tuple[Column, Column]:
    """Exact match and F1 (0 to 1) of what is left of stored spans under a threshold."""
    rows = ((each.exact, each.f1, each.answerable, bool(each.span), each.null_odds) for each in answers)
    return Judged.of(rows).final(null_threshold)


def _unjudged(ratio: Ratio) -> Ratio:
    """A ratio of times of two sessions: what slowed one of them is in it, and not in its interval."""
    return replace(ratio, verdict="cannot tell")


def _in_units(times: Sequence[float], stored: Stored) -> list[float]:
    """Times in units of Base's in the same rounds, if Base was timed."""
    base = stored.times.get(BASE)
    return [own / unit for own, unit in zip(times, base, strict=True)] if base else []


def _in_units_of_base(stored: Stored, found: StoredEvaluation) -> dict[int, float]:
    """Times of batches in units of Base's, as far as both ran in the same session, by number."""
    base = stored.evaluation_of(stored.rows.get(BASE))
    return {} if base is None else {number: own / unit for number, (unit, own) in _side_by_side(base, found).items()}


def _seconds(found: StoredEvaluation) -> dict[int, float]:
    return {number: seconds for number, (_, seconds) in found.batches.items()}


def _by_number(before: Mapping[int, float], after: Mapping[int, float], numbers: Collection[int]) -> Ratio:
    """How many times faster, by batches of the same number."""
    return speedup([before[each] for each in numbers], [after[each] for each in numbers])


def _side_by_side(one: StoredEvaluation, other: StoredEvaluation) -> dict[int, tuple[float, float]]:
    """The seconds of the batches that both ran in the same session, by number."""
    return {
        number: (one.batches[number][1], other.batches[number][1])
        for number in sorted(one.batches.keys() & other.batches.keys())
        if one.batches[number][0] == other.batches[number][0]
    }
