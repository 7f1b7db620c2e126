"""The original script's options, and more."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bert_evaluation.cli.console import show
from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import DeviceOption, StoreOption
from bert_evaluation.cli.progress import shown
from bert_evaluation.errors import UsageError

if TYPE_CHECKING:
    from bert_evaluation.outcome import Outcome
    from bert_evaluation.store import Store

ACTIONS = "--infer answers a question, --evaluate scores a data set, --transform tries transformations"


def root(
    context: typer.Context,
    device: DeviceOption = "auto",
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
    attribute: Annotated[
        bool, typer.Option("--attribute", help="also run each step of a recipe alone, and the recipe without it")
    ] = False,
    margin: Annotated[float, typer.Option(help="share of Base's F1 that a recipe has to keep; strict: 0.999")] = 0.99,
    show_changes: Annotated[bool, typer.Option("--show-changes", help="list the answers that changed")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="tokens evaluated at once [default: measured]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="windows evaluated at once, instead")] = None,
    streams: Annotated[int | None, typer.Option(help="batches evaluated at once [default: one a CPU thread]")] = None,
    precision: Annotated[float, typer.Option(help="time --infer until ratios are known within this")] = 0.01,
    time_limit: Annotated[float, typer.Option(help="or for so many seconds")] = 60.0,
    rounds: Annotated[int | None, typer.Option(help="time exactly so many rounds instead")] = None,
    question: Annotated[str | None, typer.Option(help="the question of --infer")] = None,
    passage: Annotated[str | None, typer.Option("--context", help="where its answer is looked for")] = None,
    null_threshold: Annotated[float, typer.Option(help="abstain where null score - best score is above this")] = 0.0,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a window [default: 384, or what the model reads]")
    ] = None,
    doc_stride: Annotated[int, typer.Option(help="tokens that a window shares with the next")] = 128,
    n_best: Annotated[int, typer.Option(help="best starts and ends that are paired")] = 20,
    max_answer_length: Annotated[int, typer.Option(help="tokens of an answer")] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write the result as one page to this file")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="write Base's answers to this file, those of each recipe beside it")
    ] = None,
    no_answer_probabilities: Annotated[
        Path | None, typer.Option(help="write their probabilities of no answer likewise")
    ] = None,
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="compute anew what the store has")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,  # noqa: ARG001
) -> None:
    """Does a graph transformation keep a Transformer's answers and quality, and is it really faster?"""
    if context.invoked_subcommand is not None:
        return
    if not (infer or evaluate or transform):
        raise UsageError(f"Say what to do: {ACTIONS}; they combine.")
    if not 0 < margin <= 1:
        raise UsageError(f"A margin is the share of Base's F1 to be kept, above 0 and up to 1, not {margin:g}.")
    if attribute and not (transform and (infer or evaluate)):
        raise UsageError("Steps are told apart by --transform with --infer or --evaluate; add those to --attribute.")
    require_folders(json_file, html, predictions, no_answer_probabilities)
    if (predictions or no_answer_probabilities) and not evaluate:
        raise UsageError("There are answers to write only with --evaluate.")

    from bert_evaluation.experiment import run
    from bert_evaluation.outcome import CONTEXT, QUESTION, Experiment, as_json
    from bert_evaluation.report import tables
    from bert_evaluation.report.terminal import answer_lines
    from bert_evaluation.squad.answers import AnswerRule
    from bert_evaluation.squad.batches import Batching
    from bert_evaluation.squad.windows import Windowing
    from bert_evaluation.store import Store

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
        rounds=rounds,
        precision=precision,
        time_limit=time_limit,
        question=QUESTION if question is None else question,
        context=CONTEXT if passage is None else passage,
        rule=AnswerRule(null_threshold, n_best, max_answer_length),
        windowing=Windowing(max_length, doc_stride),
        batching=Batching(batch_tokens, batch_size),
        streams=streams,
        margin=margin,
        attribute=attribute,
        fresh=fresh,
    )
    command = shlex.join(["bert-evaluation", *sys.argv[1:]])
    with Store(store) as results:
        outcome = shown(lambda listener: run(experiment, results, listener, command), quiet, show_changes)
        if json_file is not None:
            write_json(json_file, as_json(outcome))
        if html is not None:
            from bert_evaluation.cli.report import write_page  # here, since that module imports from this one

            write_page(results, outcome.number, html)
        _write_answers(results, outcome, predictions, no_answer_probabilities)
        if not quiet:
            show(answer_lines(outcome), tables.answer(outcome))
        if not quiet and not results.is_volatile:
            kept = f"Kept as experiment {outcome.number} in {results.file}"
            show([kept], tables.whole([kept]))


def _write_answers(store: "Store", outcome: "Outcome", predictions: Path | None, probabilities: Path | None) -> None:
    """Write the answers of every row in the official form, those of Base to the files named."""
    threshold = outcome.experiment.rule.null_threshold
    for row in outcome.rows:
        answers = list(store.answers(row.evaluation or ""))
        for file, content in (
            (predictions, {each.question: each.text(threshold) for each in answers}),
            (probabilities, {each.question: each.no_answer_probability for each in answers}),
        ):
            if file is not None:
                write_json(file if row is outcome.rows[0] else file.with_stem(f"{file.stem}.{row.name}"), content)
