"""`bert-evaluation diff`: what recipes do to the graph, step by step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from bert_evaluation.cli.console import console
from bert_evaluation.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from bert_evaluation.listing import StepDiff

STYLES = {"---": "bold", "+++": "bold", "@@ ": "cyan", "-": "red", "+": "green"}


def diff(
    model: Annotated[str, typer.Option(help="checkpoint: built-in, a folder, or a hub name")] = "built-in",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='instead of the original ones, e.g. "RemoveDropout+MergeLinears"; repeatable'),
    ] = None,
    context: Annotated[int, typer.Option(help="lines shown around each change")] = 3,
    full: Annotated[bool, typer.Option("--full", help="print the graph before and after as well")] = False,
) -> None:
    """Show what recipes change in the graph, written as Python, with the sites of each step and its refusals."""
    if context < 0:
        raise UsageError(f"{context} lines of context cannot be shown; 0 or more can.")

    from bert_evaluation.capturing import capture
    from bert_evaluation.checkpoints import load
    from bert_evaluation.listing import listing, step_diffs
    from bert_evaluation.transformations import recipes

    chosen = recipes(recipe or ())
    graph = capture(load(model)[0])
    output = console()
    if full:
        _print(output, _heading("Base, the whole graph"), _python(listing(graph)))
    for each in chosen:
        steps = step_diffs(graph, each, context)
        _print(output, _heading(f"Base+{each.name}"), *(line for step in steps for line in _lines(step)))
        if full:
            _print(output, _heading(f"Base+{each.name}, the whole graph"), _python(steps[-1].after))


def _print(output: "Console", *lines: "Text") -> None:
    for line in lines:
        output.print(line, soft_wrap=True)
    output.print()


def _lines(step: "StepDiff") -> "Iterator[Text]":
    """One step: what it found, what it applied and refused, what that changed."""
    from rich.text import Text

    report = step.report
    yield Text()
    if not report.found:
        yield Text(f"{step.transformation} found no sites: the graph stays the same.")
        return
    unchanged = "" if report.applied else "; the graph stays the same"
    yield Text(f"{step.transformation}: {len(report.applied)} of {report.found} sites{unchanged}")
    for site in report.applied:
        yield Text(f"  applied {site}")
    for refusal in report.refused:
        yield Text.assemble(f"  refused {refusal.site}: ", (refusal.reason, "yellow"))
    yield from map(_coloured, step.diff.splitlines())


def _coloured(line: str) -> "Text":
    """A line of a diff, removed, added or neither; the comment of the last fainter."""
    from rich.text import Text

    text = Text(line, next((style for start, style in STYLES.items() if line.startswith(start)), ""))
    if line.startswith(" ") and "# " in line:
        text.stylize("dim", line.index("# "))
    return text


def _python(code: str) -> "Text":
    from rich.syntax import Syntax

    text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(code)
    text.rstrip()
    return text


def _heading(title: str) -> "Text":
    from rich.text import Text

    return Text(title, "bold")
