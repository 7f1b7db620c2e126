"""One recipe's result, and its published form."""

from dataclasses import asdict, dataclass
from typing import Any

from bert_evaluation.stats import Interval, Ratio
from bert_evaluation.transformation import Report
from bert_evaluation.verification import Verification


@dataclass(frozen=True)
class Quality:
    """Scores in percent; `changed_answers` counts questions that Base answers otherwise."""

    exact: float
    f1: float
    has_answer_f1: float | None
    no_answer_f1: float | None
    samples: int
    changed_answers: int | None
    f1_difference: None = None  # paired statistics are not there yet


@dataclass(frozen=True)
class Row:
    """One recipe's result. A part that was not asked for, or not timed since nothing changed, is None.

    `speedup` compares the time of one inference, `throughput_speedup` that of the evaluation's batches.
    """

    name: str
    recipe: str
    sites: tuple[Report, ...] = ()
    verification: Verification | None = None
    unchanged: bool = False
    answer: str | None = None
    latency: Interval | None = None
    rounds: int = 0
    speedup: Ratio | None = None
    quality: Quality | None = None
    samples_per_second: float | None = None
    throughput_speedup: Ratio | None = None


def row_as_json(row: Row) -> dict[str, Any]:
    """One row in the published form (schema 1). What was not asked for is None."""
    check, latency = row.verification, row.latency
    return {
        "name": row.name,
        "recipe": row.recipe,
        "sites": [
            {
                "transformation": report.transformation.partition("(")[0],
                "found": report.found,
                "applied": len(report.applied),
                "refused": [{"site": each.site, "reason": each.reason} for each in report.refused],
            }
            for report in row.sites
        ],
        "promise": {
            "kind": check.promise,
            "max_abs_error": check.max_abs_error,
            "max_ulp": check.max_ulp,
            "tolerance": check.tolerance,
            "verdict": check.verdict,
            "failing_probe": check.failing_probe,
            "first_difference": check.first_difference,
        }
        if check
        else None,
        "answer": row.answer,
        "latency_ms": {
            "median": latency.estimate,
            "low": latency.low,
            "high": latency.high,
            "samples": row.rounds,
        }
        if latency
        else None,
        "speedup": asdict(row.speedup) if row.speedup else None,
        "quality": asdict(row.quality) if row.quality else None,
        "samples_per_second": row.samples_per_second,
        "throughput_speedup": asdict(row.throughput_speedup) if row.throughput_speedup else None,
    }
