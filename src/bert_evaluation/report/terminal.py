"""Rows as lines of text, in the original script's form followed by what it lacked."""

from collections.abc import Iterator

from bert_evaluation.experiment import Outcome
from bert_evaluation.rows import Row
from bert_evaluation.stats import Ratio

ONE_LINE = 4  # refusals named in a listing; the rest is counted


def transform_lines(outcome: Outcome) -> Iterator[str]:
    """Each recipe with its sites, refusals and promise check."""
    for row in outcome.rows[1:]:
        yield f"{row.name}: {sites(row)}; {promise(row)}"
        for report in row.sites:
            if len(row.sites) > 1:
                yield f"  {report.transformation.partition('(')[0]}: {len(report.applied)} of {report.found} sites"
            for refusal in report.refused[:ONE_LINE]:
                yield f"  refused {refusal.site}: {refusal.reason}"
            if len(report.refused) > ONE_LINE:
                yield f"  and {len(report.refused) - ONE_LINE} more refusals (--json has them all)"


def infer_lines(outcome: Outcome) -> Iterator[str]:
    """Question and answer, then one line a recipe with its time."""
    experiment, base = outcome.experiment, outcome.rows[0]
    yield f"Context: {experiment.context}"
    yield f"Question: {experiment.question}"
    yield f"Answer: {base.answer or '(none in this context)'}"
    yield ""
    for row in outcome.rows:
        if row.latency is None:
            yield f"{row.name}: {sites(row)}; not timed"
            continue
        line = f"{row.name} average inference: {row.latency.estimate:.2f} ms"
        if row.speedup is not None:
            line += f"; {sites(row)}; {difference(row)}; {ratio(row.speedup)}"
        if row.answer != base.answer:
            line += f"; ANSWERS OTHERWISE: {row.answer or '(none)'}"
        yield line


def evaluate_lines(outcome: Outcome) -> Iterator[str]:
    """One line a recipe with scores and speed."""
    yield f"Data set: {outcome.dataset}, {outcome.samples} questions"
    for row in outcome.rows:
        if row.quality is None:
            continue
        line = f"{row.name}: F1 {row.quality.f1:.2f}, exact {row.quality.exact:.2f}"
        if row.samples_per_second is None:
            yield f"{line}, as Base: {sites(row)}"
            continue
        line += f", {row.samples_per_second:.2f} samples/s, latency {1000 / row.samples_per_second:.2f} ms"
        if row.quality.changed_answers is not None:
            line += f"; {row.quality.changed_answers} answers changed"
        if row.throughput_speedup is not None:
            line += f"; {ratio(row.throughput_speedup)}"
        yield line


LINES = {"transform": transform_lines, "infer": infer_lines, "evaluate": evaluate_lines}
TITLES = {"transform": "Transformations", "infer": "Inference", "evaluate": "Evaluation"}


def sites(row: Row) -> str:
    """How many sites were applied of those found."""
    found, applied = (sum(numbers) for numbers in zip(*_counts(row), strict=True))
    if found == 0:
        return "no sites, the graph stays the same"
    return f"{applied} of {found} sites" + ("" if applied else ", the graph stays the same")


def _counts(row: Row) -> list[tuple[int, int]]:
    return [(report.found, len(report.applied)) for report in row.sites]


def difference(row: Row) -> str:
    """The largest difference of the outputs from the model's."""
    return "" if row.verification is None else f"max difference {row.verification.max_abs_error:.1e}"


def promise(row: Row) -> str:
    """What was promised and whether it was kept."""
    found = row.verification
    if found is None:
        return "not checked"
    text = f"{found.promise} promise {found.verdict} on {found.probes} probes, {difference(row)}"
    if not found.kept:
        text += f" on {found.failing_probe}"
        text += f", from {found.first_difference} on" if found.first_difference else ""
    return text


def ratio(found: Ratio) -> str:
    """A ratio with its interval and verdict."""
    return f"{found.estimate:.3f} times Base's speed ({found.low:.3f} to {found.high:.3f}): {found.verdict}"
