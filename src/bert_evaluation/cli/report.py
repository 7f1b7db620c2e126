"""`bert-evaluation report`: a stored experiment as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bert_evaluation.cli.files import require_folders
from bert_evaluation.cli.options import StoreOption

if TYPE_CHECKING:
    from bert_evaluation.store import Store


def report(
    number: Annotated[int, typer.Argument(metavar="ID", help="the experiment; `history` lists them")],
    html: Annotated[Path, typer.Option("--html", help="write the page to this file")],
    store: StoreOption = None,
) -> None:
    """Write a stored experiment as one page that opens from disk, offline."""
    from bert_evaluation.store import Store

    require_folders(html)
    with Store(store, readonly=True) as results:
        write_page(results, number, html)
    print(f"Experiment {number} is shown in {html}")


def write_page(results: "Store", number: int, file: Path) -> None:
    """Write the page of an experiment that the store has."""
    from bert_evaluation.outcome import load
    from bert_evaluation.report.html import page

    entry = results.experiment(number)
    keys = {row.name: row.evaluation for row in load(entry).rows if row.evaluation and not row.unchanged}
    batch_times = {name: results.batch_seconds(key) for name, key in keys.items()}
    file.write_text(page(entry, results.times(number), batch_times), encoding="utf-8")
