"""`bert-evaluation doctor`: what this machine can do, what it reaches, and what disturbs measurements on it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bert_evaluation.cli.console import output
from bert_evaluation.cli.root import StoreOption
from bert_evaluation.errors import BertEvaluationError


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto is the best one present")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="tell what share this checkpoint's Base reaches: built-in, a folder, or a hub name"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew what the store has")] = False,
) -> None:
    """Tell what this machine can do, what it reaches at most, what disturbs measurements, and what to do about that."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BertEvaluationError(f"There is no folder {json_file.parent} to write {json_file.name} to.")

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
        text = json.dumps(published(examination), indent=1, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if (console := output()).is_terminal:
        console.print(*tables(examination), sep="\n")
    else:
        print(*lines(examination), sep="\n")
