"""`bert-evaluation history`: what the store has."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from bert_evaluation.cli.console import show
from bert_evaluation.cli.options import StoreOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bert_evaluation.outcome import Outcome
    from bert_evaluation.store import Entry


def history(
    number: Annotated[int | None, typer.Argument(metavar="[ID]", help="show this experiment; none lists them")] = None,
    store: StoreOption = None,
    show_changes: Annotated[bool, typer.Option("--show-changes", help="list the answers that changed")] = False,
) -> None:
    """List the experiments in the store, or show one of them as it was printed."""
    from bert_evaluation.outcome import load
    from bert_evaluation.report import tables
    from bert_evaluation.report.terminal import entry_line
    from bert_evaluation.store import Store

    with Store(store, readonly=True) as results:
        if number is None:
            entries = [(entry, load(entry)) for entry in results.experiments()]
            show((entry_line(*each) for each in entries), tables.experiments(entries))
            return
        entry = results.experiment(number)
    outcome = load(entry)
    show(_lines(entry, outcome, show_changes), _tables(entry, outcome, show_changes))


def _lines(entry: "Entry", outcome: "Outcome", show_changes: bool) -> Iterator[str]:
    from bert_evaluation.report.terminal import entry_line, machine, stage_lines, stages

    yield entry_line(entry, outcome)
    yield f"Machine: {machine(outcome)}"
    for stage in stages(outcome):
        yield ""
        yield from stage_lines(stage, outcome, show_changes)


def _tables(entry: "Entry", outcome: "Outcome", show_changes: bool) -> "Iterator[RenderableType]":
    from bert_evaluation.report import tables
    from bert_evaluation.report.terminal import stages

    yield from tables.experiment(entry, outcome)
    for stage in stages(outcome):
        yield from tables.stage(stage, outcome, show_changes)
    yield from tables.answer(outcome)
