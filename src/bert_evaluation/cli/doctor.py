"""`bert-evaluation doctor`: what this machine can do, what it reaches, and what disturbs measurements on it."""

from pathlib import Path
from typing import Annotated

import typer

from bert_evaluation.cli.console import show
from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import DeviceOption, StoreOption


def doctor(
    device: DeviceOption = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="tell what share this checkpoint's Base reaches: built-in, a folder, or a hub name"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew what the store has")] = False,
) -> None:
    """Tell what this machine can do, what it reaches at most, what disturbs measurements, and what to do about that."""
    require_folders(json_file)

    from rich.console import Console

    from bert_evaluation.capabilities import facts
    from bert_evaluation.checkpoints import load
    from bert_evaluation.device import choose_device, machine
    from bert_evaluation.doctor import Examination, findings, read
    from bert_evaluation.report.examination import lines, published, tables
    from bert_evaluation.roofline import known, reached
    from bert_evaluation.store import Store

    target = choose_device(device)
    checkpoint = None if model is None else load(model, target)[0]
    with Console(stderr=True).status("Looking, and measuring what the machine reaches"):
        found = findings(read(target))  # first: what is measured afterwards is load too
        with Store(store) as results:
            roofline = known(results, target, fresh)
        shares = () if checkpoint is None else tuple(reached(checkpoint, roofline))
    examination = Examination(machine(target), tuple(facts(target)), found, roofline, model, shares)
    if json_file is not None:
        write_json(json_file, published(examination))
    show(lines(examination), tables(examination))
