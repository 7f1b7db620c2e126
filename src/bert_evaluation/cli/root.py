"""The original script's options, and more."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bert_evaluation.errors import BertEvaluationError, UsageError

ACTIONS = "--infer answers a question, --evaluate scores a data set, --transform tries transformations"


def root(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto is the best one present")] = "auto",
    infer: Annotated[bool, typer.Option("--infer", help="answer a question")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="score the model on a data set")] = False,
    transform: Annotated[bool, typer.Option("--transform", help="do so for transformed models too")] = False,
    model: Annotated[str, typer.Option(help="checkpoint: built-in, a folder, or a hub name")] = "built-in",
    dataset: Annotated[str, typer.Option(help="questions: built-in, a SQuAD JSON file, or a hub name")] = "built-in",
    samples: Annotated[int | None, typer.Option(help="evaluate on so many questions, chosen at random")] = None,
    seed: Annotated[int, typer.Option(help="seed of that choice")] = 42,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='instead of the default ones, e.g. "RemoveDropout+MergeLinears"; repeatable'),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="windows evaluated at once")] = 8,
    rounds: Annotated[int, typer.Option(help="timed rounds of --infer")] = 40,
    question: Annotated[str | None, typer.Option(help="the question of --infer")] = None,
    passage: Annotated[str | None, typer.Option("--context", help="where its answer is looked for")] = None,
    null_threshold: Annotated[float, typer.Option(help="abstain where null score - best score is above this")] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,  # noqa: ARG001
) -> None:
    """Does a graph transformation keep a Transformer's answers and quality, and is it really faster?"""
    if context.invoked_subcommand is not None:
        return
    if not (infer or evaluate or transform):
        raise UsageError(f"Say what to do: {ACTIONS}; they combine.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BertEvaluationError(f"There is no folder {json_file.parent} to write {json_file.name} to.")

    from bert_evaluation.experiment import CONTEXT, QUESTION, Experiment, as_json, run
    from bert_evaluation.squad.answers import AnswerRule

    experiment = Experiment(
        infer=infer,
        evaluate=evaluate,
        transform=transform,
        model=model,
        dataset=dataset,
        device=device,
        samples=samples,
        seed=seed,
        recipes=tuple(recipe or ()),
        batch_size=batch_size,
        rounds=rounds,
        question=QUESTION if question is None else question,
        context=CONTEXT if passage is None else passage,
        rule=AnswerRule(null_threshold=null_threshold),
    )
    outcome = _shown(lambda listener: run(experiment, listener), quiet)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(outcome), indent=1) + "\n", encoding="utf-8")


def _shown(call: Any, quiet: bool) -> Any:
    """Carry out `call(listener)`, with a progress bar on a terminal and the lines of each stage as it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bert_evaluation.experiment import Listener
    from bert_evaluation.report.terminal import LINES, TITLES

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def begin(what: str, total: int) -> None:
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(what, total=total)

        def stage(name: str, outcome: Any) -> None:
            for task in bar.task_ids:
                bar.remove_task(task)
            if not quiet:
                bar.refresh()
                print(TITLES[name], *LINES[name](outcome), "", sep="\n", flush=True)

        return call(Listener(stage, begin, lambda count: bar.advance(bar.task_ids[-1], count)))
