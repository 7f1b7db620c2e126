"""Rows as lines of text, in the original script's form followed by what it lacked."""

from collections.abc import Iterator, Sequence

from bert_evaluation.memory import Memory
from bert_evaluation.outcome import Outcome
from bert_evaluation.report.headline import headline
from bert_evaluation.report.writing import mebibytes
from bert_evaluation.rows import Cell, Quality, Row
from bert_evaluation.stats import Interval, Ratio
from bert_evaluation.store import Entry
from bert_evaluation.transformation import Report

ONE_LINE = 4  # refusals named in a listing; the rest is counted
TIMES, POINTS = ".3f", "+.2f"  # how a ratio and a difference of quality are written


def transform_lines(outcome: Outcome) -> Iterator[str]:
    """Each recipe with its sites, refusals and promise check."""
    for row in outcome.rows[1:]:
        yield f"{row.name}: {sites(row)}; {promise(row)}"
        for report in row.sites:
            if len(row.sites) > 1:
                yield f"  {report.transformation.partition('(')[0]}: {len(report.applied)} of {report.found} sites"
            yield from (f"  {line}" for line in refusals(report))
    yield from memory_lines(outcome)


def refusals(report: Report) -> Iterator[str]:
    """What a transformation left as it was and why: the first few sites, and how many more."""
    for refusal in report.refused[:ONE_LINE]:
        yield f"refused {refusal.site}: {refusal.reason}"
    if len(report.refused) > ONE_LINE:
        yield f"and {len(report.refused) - ONE_LINE} more refusals (--json has them all)"


def infer_lines(outcome: Outcome) -> Iterator[str]:
    """Question and answer, then one line a recipe with its time."""
    base = outcome.rows[0]
    yield from (f"{label}: {text}" for label, text in asked(outcome))
    yield ""
    for row in outcome.rows:
        if row.latency is None:
            yield f"{row.name}: {sites(row)}; not timed"
            continue
        line = f"{row.name} average inference: {row.latency.estimate:.2f} ms"
        if row.speedup is not None:
            line += f"; {sites(row)}; {difference(row)}; {ratio(row.speedup)}"
        if row.answer != base.answer:
            line += f"; {otherwise(row)}"
        yield line
    yield from timing_lines(outcome)
    if not outcome.experiment.evaluate:
        yield from effect_lines(outcome)


def asked(outcome: Outcome) -> list[tuple[str, str]]:
    """What was asked, and what Base answered, each with its label."""
    experiment, answer = outcome.experiment, outcome.rows[0].answer
    return [
        ("Context", experiment.context),
        ("Question", experiment.question),
        ("Answer", answer or "(none in this context)"),
    ]


def otherwise(row: Row) -> str:
    """The answer of a row that is not Base's."""
    return f"ANSWERS OTHERWISE: {row.answer or '(none)'}"


def memory_lines(outcome: Outcome) -> Iterator[str]:
    """The memory that Base needs, and that rows need otherwise."""
    base, *others = outcome.rows
    if base.memory is not None:
        yield f"Base: {memory(base.memory)}"
    for row in others:
        if row.memory is not None and row.memory != base.memory and not row.unchanged:
            yield f"{row.name}: {memory(row.memory)}"


def memory(found: Memory) -> str:
    """Weights, and the most that a call holds."""
    return f"weights {mebibytes(found.weights)}, at most {mebibytes(found.peak)} in a call of 8 long texts"


def share_lines(outcome: Outcome) -> Iterator[str]:
    """What share of the machine's measured peak an inference reaches, where that was measured."""
    for row in outcome.rows:
        if row.share_of_peak is not None:
            yield f"{row.name}: {row.share_of_peak:.0%} of what the machine reaches in {row.precision}"


def timing_lines(outcome: Outcome) -> Iterator[str]:
    """What the machine calls a difference where there is none, and what else a reader of the times should know."""
    if (noise := outcome.noise) is not None:
        rounds = outcome.rows[0].rounds
        yield (
            f"Base against itself: {noise.estimate:{TIMES}} ({between(noise, TIMES)}), {rounds} rounds; a difference"
            " below this is none"
        )
    yield from share_lines(outcome)
    yield from outcome.remarks


def evaluate_lines(outcome: Outcome) -> Iterator[str]:
    """For each recipe scores and speed, and whether quality held."""
    yield data_line(outcome)
    for row in outcome.rows:
        if row.quality is None:
            continue
        line = f"{row.name}: F1 {row.quality.f1:.2f}, exact {row.quality.exact:.2f}"
        if row.samples_per_second is None:
            yield f"{line}, as Base: {sites(row)}"
            continue
        line += f", {row.samples_per_second:.2f} samples/s, latency {1000 / row.samples_per_second:.2f} ms"
        if row.quality.changed_answers is None:
            yield line
            yield from (f"  {each}" for each in base_lines(row, row.quality))
            continue
        yield f"{line}; {row.quality.changed_answers} answers changed; {held(row.quality)}; {speed(row)}"
        if row.alarm:
            yield f"  ALARM: {row.alarm}"
    yield from effect_lines(outcome)


def data_line(outcome: Outcome) -> str:
    """The questions that were answered."""
    return f"Data set: {outcome.dataset}, {outcome.samples} questions"


def base_lines(row: Row, quality: Quality) -> Iterator[str]:
    """What is told of Base alone: scores by kind of question, the best thresholds, where the time went."""
    if quality.has_answer_f1 is not None and quality.no_answer_f1 is not None:
        has, none = quality.has_answer_exact, quality.no_answer_exact
        yield f"with an answer: F1 {quality.has_answer_f1:.2f}, exact {has:.2f}; without: {none:.2f}"
    yield (
        f"best null threshold: {quality.best_f1_threshold:.2f} with F1 {quality.best_f1:.2f},"
        f" {quality.best_exact_threshold:.2f} with exact {quality.best_exact:.2f}"
    )
    if (work := row.work) is not None:
        yield (
            f"{row.tokens_per_second:.0f} tokens/s, {work.padding_share:.1%} of those computed padding; seconds:"
            f" tokenise {work.tokenise:.1f}, model {work.model:.1f}, extract {work.extract:.1f}, score {work.score:.1f}"
        )


def effect_lines(outcome: Outcome) -> Iterator[str]:
    """What each step of a composed recipe does to it."""
    for row in outcome.rows:
        for effect in row.effects:
            line = f"{row.name}, step {effect.step}, {effect.way}: {effect.verdict}"
            if (found := effect.throughput_speedup or effect.speedup) is not None:
                line += f"; {found.estimate:.3f} times as fast with it ({found.low:.3f} to {found.high:.3f})"
            if (change := effect.f1_difference) is not None:
                line += f"; F1 {change.estimate:+.2f} ({change.low:+.2f} to {change.high:+.2f})"
            yield line


def map_lines(outcome: Outcome) -> Iterator[str]:
    """Where each recipe pays and where it costs, shape by shape."""
    for row in outcome.rows[1:]:
        if not row.regime:
            yield f"{row.name}: {sites(row)}; not timed"
            continue
        yield f"{row.name}: {tally(row.regime)}"
        for cell in row.regime:
            threads = f"{cell.threads} {'thread' if cell.threads == 1 else 'threads'}"
            yield f"  {cell.batch}×{cell.length} on {threads}: {cell.row_ms:.2f} ms, {ratio(cell.speedup)}"


def tally(cells: Sequence[Cell]) -> str:
    """At how many shapes a recipe is faster, slower, or neither for sure."""
    verdicts = [cell.speedup.verdict for cell in cells]
    counted = ", ".join(f"{verdicts.count(each)} {each}" for each in ("faster", "slower", "cannot tell"))
    return f"{counted} of {len(cells)} shapes"


def change_lines(outcome: Outcome) -> Iterator[str]:
    """The answers that each recipe changed, before and after."""
    for row in outcome.rows:
        for change in row.quality.changes if row.quality else ():
            before, after = change.before or "(none)", change.after or "(none)"
            yield (
                f"{row.name}, question {change.question}: {before!r} ({change.margin_before:.1e} logits from another)"
                f" became {after!r} ({change.margin_after:.1e})"
            )


LINES = {"transform": transform_lines, "infer": infer_lines, "map": map_lines, "evaluate": evaluate_lines}
TITLES = {"transform": "Transformations", "infer": "Inference", "map": "Regime map", "evaluate": "Evaluation"}


def stages(outcome: Outcome) -> list[str]:
    """The stages that an experiment was asked for; none where it ended before it had a row."""
    return [stage for stage in LINES if outcome.rows and getattr(outcome.experiment, stage)]


def stage_lines(stage: str, outcome: Outcome, show_changes: bool = False) -> Iterator[str]:
    """The title and the lines of one stage."""
    yield TITLES[stage]
    yield from LINES[stage](outcome)
    if show_changes and stage == "evaluate":
        yield from change_lines(outcome)


def answer_lines(outcome: Outcome) -> Iterator[str]:
    """The answer in a sentence, where recipes were measured."""
    if compared(outcome):
        yield headline(outcome).sentence


def compared(outcome: Outcome) -> bool:
    """Whether an experiment was asked to hold recipes against Base."""
    return outcome.experiment.transform and (outcome.experiment.infer or outcome.experiment.evaluate)


def entry_line(entry: Entry, outcome: Outcome) -> str:
    """One experiment of a listing."""
    return f"{entry.number}  {entry.started}  {subject(outcome)}: {state(entry, outcome)}: {entry.command}"


def subject(outcome: Outcome) -> str:
    """What an experiment is about: a model, and the data set if there is one."""
    on = f" on {outcome.dataset}, {outcome.samples} questions" if outcome.dataset else ""
    return f"{outcome.experiment.model}{on}"


def state(entry: Entry, outcome: Outcome) -> str:
    """What became of an experiment, and how many rows it has."""
    return f"{entry.state}, {len(outcome.rows)} rows" if outcome.rows else entry.state


def machine(outcome: Outcome) -> str:
    """What an experiment ran on."""
    return ", ".join(f"{name} {value}" for name, value in outcome.machine.items())


def held(quality: Quality) -> str:
    """Whether quality held, with the difference in percentage points."""
    found = quality.f1_difference
    if found is None:
        return "not compared"
    interval = f"F1 {found.estimate:{POINTS}} ({between(found, POINTS)})"
    if found.verdict == "cannot tell":
        return f"{interval}: cannot tell whether {quality.margin:g} of Base's is kept"
    return f"{interval}: {found.verdict} than {quality.margin:g} of Base's"


def speed(row: Row) -> str:
    """The throughput against Base's, or why there is none."""
    if row.throughput_speedup is None:
        return "speed not compared: not run side by side with Base (--fresh does)"
    return ratio(row.throughput_speedup)


def sites(row: Row) -> str:
    """How many sites were applied of those found."""
    if not (applied := applied_of(row.sites)):
        return "no sites, the graph stays the same"
    return f"{applied} sites" + ("" if any(report.applied for report in row.sites) else ", the graph stays the same")


def applied_of(reports: Sequence[Report]) -> str:
    """The number of sites applied and that of those found; nothing where none were found."""
    found = sum(report.found for report in reports)
    return f"{sum(len(report.applied) for report in reports)} of {found}" if found else ""


def difference(row: Row) -> str:
    """The largest difference of the outputs from the model's."""
    return "" if row.verification is None else f"max difference {row.verification.max_abs_error:.1e}"


def promise(row: Row) -> str:
    """What was promised and whether it was kept."""
    found = row.verification
    if found is None:
        return "not checked"
    text = f"{found.promise} promise {found.verdict} on {found.probes} probes, {difference(row)}"
    text += f", {found.compared}" if found.compared else ""
    if not found.kept:
        text += f" on {found.failing_probe}"
        text += f", from {found.first_difference} on" if found.first_difference else ""
    return text


def ratio(found: Ratio) -> str:
    """A ratio with its interval and verdict."""
    return f"{found.estimate:{TIMES}} times Base's speed ({between(found, TIMES)}): {found.verdict}"


def between(found: Interval, form: str) -> str:
    """The ends of an interval."""
    return f"{found.low:{form}} to {found.high:{form}}"
