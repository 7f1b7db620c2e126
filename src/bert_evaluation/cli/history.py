"""`bert-evaluation history`: what the store has."""

from typing import Annotated

import typer

from bert_evaluation.cli.root import StoreOption


def history(
    number: Annotated[int | None, typer.Argument(metavar="[ID]", help="show this experiment; none lists them")] = None,
    store: StoreOption = None,
    show_changes: Annotated[bool, typer.Option("--show-changes", help="list the answers that changed")] = False,
) -> None:
    """List the experiments in the store, or show one of them as it was printed."""
    from bert_evaluation.outcome import load
    from bert_evaluation.report.terminal import entry_line, stage_lines, stages
    from bert_evaluation.store import Store

    with Store(store, readonly=True) as results:
        if number is None:
            for entry in results.experiments():
                print(entry_line(entry, load(entry)))
            return
        entry = results.experiment(number)
    outcome = load(entry)
    print(entry_line(entry, outcome))
    print("Machine:", ", ".join(f"{name} {value}" for name, value in outcome.machine.items()))
    for stage in stages(outcome):
        print("", *stage_lines(stage, outcome, show_changes), sep="\n")
