"""One recipe's result, and its published form."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bert_evaluation.evaluation import Work
from bert_evaluation.memory import Memory
from bert_evaluation.products import Precision
from bert_evaluation.stats import Difference, Interval, Ratio
from bert_evaluation.transformation import Report
from bert_evaluation.verification import Verification

BASE = "Base"  # the row that recipes are compared with: the model as it was captured
Way = Literal["left out", "alone"]


@dataclass(frozen=True)
class Change:
    """A question that is answered otherwise than by Base.

    A margin is by how many logits the model's scores must change for another answer: how clear its choice was.
    """

    question: str
    before: str
    after: str
    margin_before: float
    margin_after: float


@dataclass(frozen=True)
class Quality:
    """Scores in percent, on all questions and on those with and without an answer; what the best threshold would give.

    Compared with Base on the same questions: differences in percentage points with verdicts against `margin` (the
    share of Base's score to be kept), McNemar's p-value for exact match, and the answers that changed.
    """

    exact: float
    f1: float
    has_answer_exact: float | None
    has_answer_f1: float | None
    no_answer_exact: float | None
    no_answer_f1: float | None
    best_exact: float
    best_exact_threshold: float
    best_f1: float
    best_f1_threshold: float
    samples: int
    margin: float
    f1_difference: Difference | None = None
    exact_difference: Difference | None = None
    mcnemar_p: float | None = None
    changed_answers: int | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Cell:
    """How a recipe does against Base at one shape of input and one number of threads. Times are milliseconds a call."""

    batch: int
    length: int
    threads: int
    base_ms: float
    row_ms: float
    speedup: Ratio


@dataclass(frozen=True)
class Effect:
    """What one step of a recipe does to it: the whole recipe against it without the step, or the step alone on Base.

    A ratio above 1 is what the step gains: `speedup` in the time of one inference, `throughput_speedup` in that of the
    evaluation's batches. `f1_difference` is in percentage points, with - without. A step that left the graph as it was
    does nothing; of any other, `attribution.verdict` says what it does.
    """

    step: str
    way: Way
    speedup: Ratio | None = None
    throughput_speedup: Ratio | None = None
    f1_difference: Difference | None = None
    verdict: str = "does nothing"


@dataclass(frozen=True)
class StepChange:
    """What one step of a recipe did to the graph, as a unified diff of its listing."""

    step: str
    diff: str


@dataclass(frozen=True)
class Row:
    """One recipe's result. A part that was not asked for, or not timed since nothing changed, is None.

    `precision` is the one that most weights are multiplied in; `share_of_peak` is the work of Base's inference a second
    against what the machine was measured to reach in that, None where that was not measured or torch has no way to.
    `percentiles` are the 50th, 90th and 99th of one inference's milliseconds; after `pays_after` calls the extra time
    of the first one is won back. `speedup` compares the time of one inference, `throughput_speedup` that of the
    evaluation's batches. `memory` is that of one batch of 8, as long as windows usually are. `evaluation` is the key of
    the evaluation in the store.
    """

    name: str
    recipe: str
    sites: tuple[Report, ...] = ()
    verification: Verification | None = None
    memory: Memory | None = None
    unchanged: bool = False
    answer: str | None = None
    latency: Interval | None = None
    percentiles: tuple[float, float, float] | None = None
    first_call_ms: float | None = None
    pays_after: float | None = None
    rounds: int = 0
    precision: Precision = "fp32"
    share_of_peak: float | None = None
    speedup: Ratio | None = None
    quality: Quality | None = None
    alarm: str | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    work: Work | None = None
    throughput_speedup: Ratio | None = None
    evaluation: str | None = None
    regime: tuple[Cell, ...] = ()
    effects: tuple[Effect, ...] = ()
    graph_changes: tuple[StepChange, ...] = ()


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
            "compared_where": check.where,
            "tolerance": check.tolerance,
            "verdict": check.verdict,
            "failing_probe": check.failing_probe,
            "first_difference": check.first_difference,
        }
        if check
        else None,
        "memory_bytes": asdict(row.memory) if row.memory else None,
        "answer": row.answer,
        "latency_ms": {
            "median": latency.estimate,
            "low": latency.low,
            "high": latency.high,
            "samples": row.rounds,
            **(dict(zip(("p50", "p90", "p99"), row.percentiles, strict=True)) if row.percentiles else {}),
            "first_call": row.first_call_ms,
        }
        if latency
        else None,
        "precision": row.precision,
        "share_of_peak": row.share_of_peak,
        "speedup": asdict(row.speedup) if row.speedup else None,
        "pays_after_calls": row.pays_after,
        "quality": asdict(row.quality) if row.quality else None,
        "alarm": row.alarm,
        "samples_per_second": row.samples_per_second,
        "tokens_per_second": row.tokens_per_second,
        "padding_share": row.work.padding_share if row.work else None,
        "seconds": {part: getattr(row.work, part) for part in ("tokenise", "model", "extract", "score")}
        if row.work
        else None,
        "throughput_speedup": asdict(row.throughput_speedup) if row.throughput_speedup else None,
        "regime": [asdict(cell) for cell in row.regime] or None,
        "effects": [asdict(effect) for effect in row.effects] or None,
    }
