"""`bert-evaluation map`: at which shapes of input a recipe pays."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import DeviceOption, StoreOption
from bert_evaluation.cli.progress import shown
from bert_evaluation.errors import UsageError


def regime(
    recipe: Annotated[list[str], typer.Option(help='e.g. "RemoveDropout+MergeLinears"; repeatable')],
    model: Annotated[str, typer.Option(help="checkpoint: built-in, a folder, or a hub name")] = "built-in",
    batches: Annotated[str, typer.Option(help="batch sizes")] = "1,8",
    lengths: Annotated[str, typer.Option(help="tokens of each sequence")] = "32,128,384",
    threads: Annotated[
        str | None, typer.Option(help="threads [default: as many as torch uses, on a CPU also 1]")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[float, typer.Option(help="time each shape until ratios are known within this")] = 0.01,
    time_limit: Annotated[float, typer.Option(help="or for so many seconds")] = 20.0,
    rounds: Annotated[int | None, typer.Option(help="time exactly so many rounds instead")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write the result as one page to this file")] = None,
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew what the store has")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Time recipes over batch size × length × threads, and show where each pays and where it costs."""
    require_folders(json_file, html)
    shapes = {"batches": _numbers(batches), "lengths": _numbers(lengths)}
    chosen = None if threads is None else _numbers(threads)

    import torch

    from bert_evaluation.device import choose_device
    from bert_evaluation.experiment import run
    from bert_evaluation.outcome import Experiment, as_json
    from bert_evaluation.regime import Grid
    from bert_evaluation.store import Store

    # To a device that is no CPU, it is all the same how many threads give it its work.
    usual = {1, torch.get_num_threads()} if choose_device(device).type == "cpu" else {torch.get_num_threads()}
    grid = Grid(**shapes, threads=chosen or tuple(sorted(usual)))
    experiment = Experiment(
        transform=True,
        model=model,
        device=device,
        recipes=tuple(recipe),
        rounds=rounds,
        precision=precision,
        time_limit=time_limit,
        map=grid,
        fresh=fresh,
    )
    with Store(store) as results:
        command = shlex.join(["bert-evaluation", *sys.argv[1:]])
        outcome = shown(lambda listener: run(experiment, results, listener, command), quiet, show_changes=False)
        if json_file is not None:
            write_json(json_file, as_json(outcome))
        if html is not None:
            from bert_evaluation.cli.report import write_page

            write_page(results, outcome.number, html)
        if not quiet and not results.is_volatile:
            print(f"Kept as experiment {outcome.number} in {results.file}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers such as 1,8.") from None
