"""The columns of the page's table of rows, and what each is sorted by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bert_evaluation.rows import Row
from bert_evaluation.transformation import Report


@dataclass(frozen=True)
class Column:
    """A column of the table of rows, and what it is sorted by."""

    id: str
    title: str
    value: Callable[[Row], float | None]


def _sites(row: Row) -> float | None:
    return float(applied(row.sites)) if row.sites else None


def _kept(row: Row) -> float | None:
    return None if row.verification is None else float(row.verification.kept)


def _throughput(row: Row) -> float | None:
    if row.throughput_speedup is not None:
        return row.throughput_speedup.estimate
    return None if row.samples_per_second is None else 1.0


def _inference(row: Row) -> float | None:
    if row.speedup is not None:
        return row.speedup.estimate
    return None if row.latency is None else 1.0


def _f1(row: Row) -> float | None:
    return row.quality.f1 if row.quality else None


def _changed(row: Row) -> float | None:
    return row.quality.changed_answers if row.quality else None


def _memory(row: Row) -> float | None:
    return row.memory.peak if row.memory else None


def applied(reports: Iterable[Report]) -> int:
    """How many sites were applied in all."""
    return sum(len(report.applied) for report in reports)


COLUMNS = (
    Column("sites", "Sites", _sites),
    Column("promise", "Promise", _kept),
    Column("evaluation", "Speed on the data set", _throughput),
    Column("inference", "Speed of one inference", _inference),
    Column("quality", "F1", _f1),
    Column("changed", "Answers changed", _changed),
    Column("memory", "Memory", _memory),
)
