"""One run: checkpoint × recipes × device × data set → rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from bert_evaluation import conditions, hashes, stages
from bert_evaluation.capturing import longest_input
from bert_evaluation.checkpoints import load, load_dataset
from bert_evaluation.device import choose_device, machine
from bert_evaluation.errors import InterruptedRunError, UsageError
from bert_evaluation.evaluating import evaluate
from bert_evaluation.outcome import Experiment, Outcome, dump
from bert_evaluation.recipe import Recipe
from bert_evaluation.rows import Row
from bert_evaluation.squad.dataset import Dataset, sample
from bert_evaluation.stages import Listener, Run
from bert_evaluation.store import Store
from bert_evaluation.transformations import recipes

T = TypeVar("T")


def run(
    experiment: Experiment,
    store: Store,
    listener: Listener = Listener(),  # noqa: B008  # frozen
    command: str = "",
) -> Outcome:
    """Carry an experiment out: transform, infer, map, evaluate, as asked; what is cheap to refuse is refused first.

    What each stage brings is kept in the store when it ends, what an evaluation brings after every batch. Raises
    InterruptedRunError for Ctrl-C, which says what is kept.
    """
    device = choose_device(experiment.device)
    asked = recipes(experiment.recipes, device) if experiment.transform else ()
    data = _questions(experiment) if experiment.evaluate else None
    model, tokenizer = load(experiment.model, device)
    if experiment.map is not None and max(experiment.map.lengths) > (most := longest_input(model)):
        raise UsageError(f"{experiment.model} reads {most} tokens at most, not {max(experiment.map.lengths)}.")
    outcome = Outcome(
        number=0,
        experiment=experiment,
        machine=machine(device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_hash=hashes.weights_hash(model),
        dataset=data.name if data else None,
        samples=len(data) if data else None,
        rows=(),
    )
    outcome = replace(outcome, number=store.begin(command, dump(outcome)[0]))
    state, shared = "failed", Run(experiment, store, listener, model, tokenizer, device, outcome)
    try:
        outcome = _stages(shared, asked, data)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise InterruptedRunError(_kept(experiment, store)) from None
    finally:
        store.end(outcome.number, state)
    return outcome


def _stages(run: Run, asked: tuple[Recipe, ...], data: Dataset | None) -> Outcome:
    experiment, outcome = run.experiment, run.outcome
    variants, rows = stages.transform(run, asked)

    def done(stage: str, rows: tuple[Row, ...]) -> Outcome:
        result = replace(outcome, rows=rows)
        text, texts = dump(result)
        run.store.save(
            outcome.number, text, [(row.name, row.evaluation, each) for row, each in zip(rows, texts, strict=True)]
        )
        run.listener.stage(stage, result)
        return result

    def watched(stage: str, call: Callable[[], T]) -> T:
        """What `call` returns; what disturbed it is added to the outcome."""
        nonlocal outcome
        before = conditions.snapshot(run.device)
        result = call()
        after = conditions.snapshot(run.device)
        remarks = (
            *outcome.remarks,
            *(each for each in conditions.remarks(before, after) if each not in outcome.remarks),
        )
        told = {**outcome.conditions, stage: conditions.published(before, after)}
        outcome = replace(outcome, remarks=remarks, conditions=told)
        return result

    if experiment.transform:
        outcome = done("transform", rows)
    if experiment.infer:
        timing, rows = watched("infer", lambda: stages.infer(run, rows, variants))
        outcome = replace(outcome, noise=timing.noise, remarks=(*timing.remarks, *outcome.remarks))
        outcome = done("infer", rows)
    if experiment.map is not None:
        rows = watched("map", lambda: stages.map_regime(run, rows, variants))
        outcome = done("map", rows)
    if data is not None:
        rows = watched("evaluate", lambda: evaluate(run, rows, variants, data))
        outcome = done("evaluate", rows)
    return outcome


def _kept(experiment: Experiment, store: Store) -> str:
    if not (experiment.evaluate or experiment.map) or store.is_volatile:
        return "Interrupted: the stages printed so far are complete."
    again = "without --fresh the same command goes on" if experiment.fresh else "the same command goes on"
    done = "answered" if experiment.evaluate else "measured"
    return f"Interrupted: what was {done} so far is kept in {store.file}; {again} from there."


def _questions(experiment: Experiment) -> Dataset:
    return sample(load_dataset(experiment.dataset), experiment.samples, experiment.seed)
