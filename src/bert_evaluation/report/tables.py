"""Experiments as tables and sentences for a terminal, made of the same words as the plain lines."""

from collections.abc import Iterable, Iterator
from itertools import chain

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from bert_evaluation.outcome import Outcome
from bert_evaluation.report import cells, terminal
from bert_evaluation.report.headline import headline, short
from bert_evaluation.report.layout import Column, Figures, Prose, labelled, text
from bert_evaluation.report.writing import error, milliseconds, tone
from bert_evaluation.rows import Cell, Effect, Quality, Row
from bert_evaluation.store import Entry
from bert_evaluation.transformation import Report

STATES = {"finished": "green", "running": "yellow"}
RECIPE = Column("\nrecipe", least=16, hang=2)
SPEED = Column("\ntimes Base's speed")


def stage(name: str, outcome: Outcome, show_changes: bool = False) -> Iterator[RenderableType]:
    """The title, the table and the sentences of one stage."""
    yield Rule(text(terminal.TITLES[name], "bold"), align="left", style="dim")
    yield Text()
    yield from STAGES[name](outcome)
    if show_changes and name == "evaluate":
        yield from map(cells.sentence, terminal.change_lines(outcome))
    yield Text()


def _transform(outcome: Outcome) -> Iterator[RenderableType]:
    recipes = outcome.rows[1:]
    columns = (
        RECIPE,
        Column("applied\nsites", "right"),
        Column("\npromise"),
        Column("max\ndifference", "right"),
    )
    if not recipes:
        return
    yield Figures(columns, list(chain.from_iterable(map(_promised, recipes))))
    yield Text()
    if probes := {row.verification.probes for row in recipes if row.verification}:
        counts = " and ".join(f"{count:,}" for count in sorted(probes))
        verdicts = [row.verification.verdict for row in recipes if row.verification]
        yield cells.verdicts_of(
            f"Promises checked on {counts} probes", verdicts, {"kept": "{} kept", "broken": "{} broken"}
        )
    yield from cells.alike((row, terminal.sites(row)) for row in recipes if row.unchanged)
    checked = [(row, row.verification) for row in recipes if row.verification]
    yield from cells.alike((row, f"outputs {found.compared}") for row, found in checked if found.compared)
    for row in recipes:
        if row.verification and not row.verification.kept:
            yield cells.said(row, terminal.promise(row), "red")
    for row in recipes:
        yield from _refusals(row)
    yield from map(cells.sentence, terminal.memory_lines(outcome))


def _refusals(row: Row) -> Iterator[RenderableType]:
    """The refusals of a recipe, by step where it has several."""
    if any(report.refused for report in row.sites):
        yield Prose(Text.assemble(text(short(row)), ":"), hang=2)
    for report in row.sites:
        step = f"{_step(report)} " if len(row.sites) > 1 else ""
        for line in terminal.refusals(report):
            yield Prose(text(f"  {step}{line}"), hang=4)


def _promised(row: Row) -> Iterator[tuple[Text, ...]]:
    """A recipe's line; of a composed one a line for each step before it."""
    found = row.verification
    promise, difference = Text("not checked", "dim"), Text()
    if found is not None:
        promise = Text.assemble(text(found.promise), " ", cells.verdict_of(found.verdict))
        difference = text(error(found.max_abs_error))
    title = text(short(row))
    if len(row.sites) > 1:
        for place, report in enumerate(row.sites, 1):
            step = _step(report) + ("+" if place < len(row.sites) else "")
            yield text(step if place == 1 else f"  {step}"), _count(terminal.applied_of([report])), Text(), Text()
        title = Text("  together", "italic")
    yield title, _count(terminal.applied_of(row.sites)), promise, difference


def _infer(outcome: Outcome) -> Iterator[RenderableType]:
    base = outcome.rows[0]
    yield labelled([(label, text(content)) for label, content in terminal.asked(outcome)])
    yield Text()
    columns = (RECIPE, Column("average\ninference, ms", "right"), SPEED, Column("\nanswer"))
    rows = []
    for row in outcome.rows:
        if row.latency is None:
            rows.append((text(short(row)), Text("not timed", "dim"), Text(), Text()))
            continue
        time = cells.interval(row.latency, milliseconds(row.latency.estimate), ".2f")
        answer = Text() if row is base else Text("same") if row.answer == base.answer else Text("OTHERWISE", "bold red")
        rows.append((text(short(row)), time, cells.ratio(row.speedup), answer))
    yield Figures(columns, rows)
    yield Text()
    yield from cells.speeds(row.speedup for row in outcome.rows)
    yield from cells.alike(
        (row, f"{terminal.sites(row)}; not timed") for row in outcome.rows[1:] if row.latency is None
    )
    for row in outcome.rows:
        if row.latency is not None and row.answer != base.answer:
            yield cells.said(row, terminal.otherwise(row), "bold red")
    yield from map(cells.sentence, terminal.timing_lines(outcome))
    if not outcome.experiment.evaluate:
        yield from _effects(outcome)


def _evaluate(outcome: Outcome) -> Iterator[RenderableType]:
    yield cells.sentence(terminal.data_line(outcome))
    yield Text()
    columns = (
        RECIPE,
        Column("F1,\nexact", "right"),
        Column("\nF1 difference"),
        Column("answers\nchanged", "right"),
        Column("ms,\nper s", "right"),
        SPEED,
    )
    rows = [(row, row.quality) for row in outcome.rows if row.quality is not None]
    if not rows:
        return
    yield Figures(columns, [_evaluated(*each) for each in rows])
    yield Text()
    differences = [found.f1_difference for row, found in rows if found.f1_difference and row.samples_per_second]
    share = f"{outcome.experiment.margin:g} of Base's F1"
    words = {"not worse": "{} not worse", "worse": "{} worse", "cannot tell": "cannot tell for {}"}
    if differences:
        yield cells.verdicts_of(f"Quality against {share}", [each.verdict for each in differences], words)
    yield from cells.speeds(row.throughput_speedup for row in outcome.rows)
    yield from cells.alike((row, terminal.sites(row)) for row, _ in rows if row.samples_per_second is None)
    compared = [row for row, found in rows if row.samples_per_second and found.changed_answers is not None]
    yield from cells.alike((row, terminal.speed(row)) for row in compared if row.throughput_speedup is None)
    for row, found in rows:
        if row.samples_per_second and found.changed_answers is None:
            yield from (cells.said(row, line) for line in terminal.base_lines(row, found))
        if row.alarm:
            yield cells.said(row, f"ALARM: {row.alarm}", "bold red")
    yield from _effects(outcome)


def _evaluated(row: Row, found: Quality) -> tuple[Text, ...]:
    """A row's cells: scores, their difference, changed answers, time, speed."""
    name, scores = text(short(row)), cells.two(text(f"{found.f1:.2f}"), f"{found.exact:.2f}")
    if row.samples_per_second is None:
        return name, scores, Text("as Base", "dim"), Text(), Text(), Text()
    time = cells.two(text(milliseconds(1000 / row.samples_per_second)), f"{row.samples_per_second:.2f}")
    if found.changed_answers is None:
        return name, scores, Text(), Text(), time, Text()
    changed = text(f"{found.changed_answers:,}", "bold" if found.changed_answers else "")
    if row.alarm:
        changed = cells.two(changed, "ALARM", "bold red")
    speed = cells.ratio(row.throughput_speedup) if row.throughput_speedup else Text("not compared", "dim")
    return name, scores, cells.difference(found.f1_difference), changed, time, speed


def _map(outcome: Outcome) -> Iterator[RenderableType]:
    columns = (Column("batch ×\nlength", "right"), Column("\nthreads", "right"), Column("\nms", "right"), SPEED)
    for row in outcome.rows[1:]:
        if row.regime:
            yield cells.said(row, terminal.tally(row.regime))
            yield Figures(columns, [_cell(cell) for cell in row.regime])
            yield Text()
    yield from cells.alike((row, f"{terminal.sites(row)}; not timed") for row in outcome.rows[1:] if not row.regime)


def _cell(cell: Cell) -> tuple[Text, ...]:
    shape, time = text(f"{cell.batch}×{cell.length}"), text(milliseconds(cell.row_ms))
    return shape, text(f"{cell.threads}"), time, cells.ratio(cell.speedup)


def _effects(outcome: Outcome) -> Iterator[RenderableType]:
    """What each step of a composed recipe does to it."""
    columns = (
        Column("\nstep", least=16, hang=2),
        Column("\nway"),
        Column("\nit"),
        Column("times as fast\nwith it"),
        Column("\nF1 difference"),
    )
    for row in outcome.rows:
        if row.effects:
            yield Text()
            yield cells.said(row, "what each step does")
            yield Figures(columns, [_effect(effect) for effect in row.effects])


def _effect(effect: Effect) -> tuple[Text, ...]:
    ratio = effect.throughput_speedup or effect.speedup
    faster = (
        Text() if ratio is None else cells.two(text(f"{ratio.estimate:.3f}"), terminal.between(ratio, terminal.TIMES))
    )
    return (
        text(effect.step),
        text(effect.way),
        cells.verdict_of(effect.verdict),
        faster,
        cells.difference(effect.f1_difference),
    )


STAGES = {"transform": _transform, "infer": _infer, "map": _map, "evaluate": _evaluate}


def answer(outcome: Outcome) -> Iterator[RenderableType]:
    """The answer in a sentence and what qualifies it, where recipes were measured."""
    if not terminal.compared(outcome):
        return
    found = headline(outcome)
    details = (Prose(text(each, "dim")) for each in found.details)
    border = cells.COLOURS["good"] if found.subject else "dim"
    yield Panel(Group(Prose(text(found.sentence, "bold")), *details), border_style=border, padding=(0, 1))


def experiment(entry: Entry, outcome: Outcome) -> Iterator[RenderableType]:
    """An experiment of the store: what it was, its stages, its answer."""
    yield labelled(
        [
            ("Experiment", text(f"{entry.number}: {terminal.subject(outcome)}")),
            ("Started", text(entry.started)),
            ("State", _state(entry.state)),
            ("Command", text(entry.command)),
            ("Machine", text(terminal.machine(outcome))),
        ]
    )
    yield Text()


def experiments(entries: Iterable[tuple[Entry, Outcome]]) -> Iterator[RenderableType]:
    """The experiments of a store, one row each."""
    columns = (
        Column("#", "right"),
        Column("started (UTC)"),
        Column("experiment", least=20),
        Column("state"),
    )
    rows = []
    for entry, outcome in entries:
        started = text(entry.started[:16].replace("T", " "))
        what = cells.two(text(terminal.subject(outcome)), entry.command)
        count = f"{len(outcome.rows)} rows" if outcome.rows else ""
        rows.append((text(f"{entry.number}", "bold"), started, what, cells.two(_state(entry.state), count)))
    if rows:
        yield Figures(columns, rows, spaced=True)


def transformations(kinds: Iterable[tuple[str, str, str, str]]) -> Iterator[RenderableType]:
    """What there is to put into a recipe: name, promise, whether it can be undone, what it does."""
    columns = (Column("transformation"), Column("promise"), Column("what it does", least=20))
    rows = [(text(name, "bold"), cells.two(text(promise), undo), text(what)) for name, promise, undo, what in kinds]
    yield Figures(columns, rows, spaced=True)


def whole(lines: Iterable[str]) -> Iterator[Text]:
    """Lines that the terminal breaks itself, so that they can be copied; with the verdicts on promises coloured."""
    for line in lines:
        shown = text(line)
        for verdict in ("kept", "broken"):
            shown.highlight_regex(f"(?<= promise ){verdict}", cells.COLOURS[tone(verdict)])
        shown.no_wrap, shown.overflow = True, "ignore"
        yield shown


def _step(report: Report) -> str:
    return report.transformation.partition("(")[0]


def _count(applied: str) -> Text:
    return text(applied) if applied else Text("none", "dim")


def _state(state: str) -> Text:
    return text(state, STATES.get(state, "red"))
