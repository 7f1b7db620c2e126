"""One run: checkpoint × recipes × device × data set → rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bert_evaluation import conditions
from bert_evaluation import graph as graphs
from bert_evaluation.answering import Reader, answer, model_inputs
from bert_evaluation.capturing import capture
from bert_evaluation.checkpoints import load, load_dataset, tokenizer_hash
from bert_evaluation.device import choose_device, machine
from bert_evaluation.errors import InterruptedRunError
from bert_evaluation.evaluation import CHUNK, Evaluation, evaluate_together, measured
from bert_evaluation.graph import GraphModule
from bert_evaluation.listing import step_diffs
from bert_evaluation.measurement import measure
from bert_evaluation.outcome import Experiment, Outcome, dump
from bert_evaluation.quality import alarm, quality
from bert_evaluation.recipe import Recipe, compose, parse_recipe
from bert_evaluation.rows import Row, StepChange
from bert_evaluation.squad.batches import Batching, tensors
from bert_evaluation.squad.dataset import Dataset, Example, sample
from bert_evaluation.squad.windows import longest, question_first, windows
from bert_evaluation.store import AnswerRecord, EvaluationKey, Store
from bert_evaluation.streams import default_streams
from bert_evaluation.transformation import Approximates
from bert_evaluation.transformations import REGISTRY, original_recipes
from bert_evaluation.verification import check, observe

BASE = "Base"
# What of the machine decides the bits and the speed of an answer.
DECISIVE = ("processor", "device", "device_name", "threads", "torch", "transformers", "bert_evaluation")


@dataclass(frozen=True)
class Listener:
    """Who is told of the progress.

    `stage` of a finished part; `begin` of a long one, with the steps of each of its tasks, None where they are not
    known; `advance` of steps done in one of those.
    """

    stage: Callable[[str, Outcome], None] = lambda name, outcome: None
    begin: Callable[[str, Mapping[str, int | None]], None] = lambda what, tasks: None
    advance: Callable[[str, float], None] = lambda task, count: None


@dataclass(frozen=True)
class _Run:
    """What the stages of one run share."""

    experiment: Experiment
    store: Store
    listener: Listener
    tokenizer: Any
    device: torch.device


def run(experiment: Experiment, store: Store, listener: Listener = Listener(), command: str = "") -> Outcome:
    """Carry an experiment out: transform, infer, evaluate, as asked; what is cheap to refuse is refused first.

    What each stage brings is kept in the store when it ends, what an evaluation brings after every batch. Raises
    InterruptedRunError for Ctrl-C, which says what is kept.
    """
    recipes = _recipes(experiment)
    device = choose_device(experiment.device)
    data = _questions(experiment) if experiment.evaluate else None
    model, tokenizer = load(experiment.model, device)
    outcome = Outcome(
        number=0,
        experiment=experiment,
        machine=machine(device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_hash=graphs.weights_hash(model),
        dataset=data.name if data else None,
        samples=len(data) if data else None,
        rows=(),
    )
    outcome = replace(outcome, number=store.begin(command, dump(outcome)[0]))
    state, shared = "failed", _Run(experiment, store, listener, tokenizer, device)
    try:
        outcome = _stages(shared, outcome, model, recipes, data)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise InterruptedRunError(_kept(experiment, store)) from None
    finally:
        store.end(outcome.number, state)
    return outcome


def _stages(
    shared: _Run, outcome: Outcome, model: nn.Module, recipes: tuple[Recipe, ...], data: Dataset | None
) -> Outcome:
    made, rows = _transform(model, recipes, shared.listener)
    variants = {row.name: made[row.name] for row in rows if not row.unchanged}

    def done(stage: str, rows: tuple[Row, ...]) -> Outcome:
        result = replace(outcome, rows=rows)
        text, texts = dump(result)
        shared.store.save(
            outcome.number, text, [(row.name, row.evaluation, each) for row, each in zip(rows, texts, strict=True)]
        )
        shared.listener.stage(stage, result)
        return result

    if shared.experiment.transform:
        outcome = done("transform", rows)
    if shared.experiment.infer:
        outcome, rows = _infer(shared, outcome, rows, variants)
        outcome = done("infer", rows)
    if data is not None:
        outcome = done("evaluate", _evaluate(shared, outcome, rows, variants, data))
    return outcome


def _kept(experiment: Experiment, store: Store) -> str:
    if not experiment.evaluate or store.is_volatile:
        return "Interrupted: the stages printed so far are complete."
    again = "without --fresh the same command goes on" if experiment.fresh else "the same command goes on"
    return f"Interrupted: what was answered so far is kept in {store.file}; {again} from there."


def _recipes(experiment: Experiment) -> tuple[Recipe, ...]:
    if not experiment.transform:
        return ()
    return tuple(parse_recipe(text, REGISTRY) for text in experiment.recipes) or original_recipes()


def _questions(experiment: Experiment) -> Dataset:
    return sample(load_dataset(experiment.dataset), experiment.samples, experiment.seed)


def _transform(
    model: nn.Module, recipes: tuple[Recipe, ...], listener: Listener
) -> tuple[dict[str, GraphModule], tuple[Row, ...]]:
    """Capture the model, apply each recipe to a graph of its own, and check its promise."""
    listener.begin("Capturing and checking promises", {"": 1 + len(recipes)})
    base = capture(model)
    made, rows = {BASE: base}, [Row(BASE, "")]
    listener.advance("", 1)
    reference = observe(model) if recipes else None
    for recipe in recipes:
        own = compose(*recipe.steps, inplace=False)
        graph = own(base)
        name = f"{BASE}+{own.name}"
        made[name] = graph
        rows.append(
            Row(
                name=name,
                recipe=repr(own),
                sites=own.reports,
                verification=check(reference, graph) if reference else None,
                unchanged=not own.report.applied,
                graph_changes=tuple(StepChange(each.transformation, each.diff) for each in step_diffs(base, recipe)),
            )
        )
        listener.advance("", 1)
    return made, tuple(rows)


def _infer(
    shared: _Run, outcome: Outcome, rows: tuple[Row, ...], variants: Mapping[str, GraphModule]
) -> tuple[Outcome, tuple[Row, ...]]:
    """Answer the one question with every variant, and time them, with what disturbed that."""
    experiment, tokenizer, listener = shared.experiment, shared.tokenizer, shared.listener
    question, context, rule = experiment.question, experiment.context, experiment.rule
    cut = windows(tokenizer, [Example("", question, context, ())], experiment.windowing)
    padding, in_front = tokenizer.pad_token_id or 0, not question_first(tokenizer)
    inputs = tensors(cut, padding, model_inputs(variants[BASE]), shared.device, in_front)
    listener.begin("Timing", {"": experiment.rounds})
    before = conditions.snapshot(shared.device)
    timing = measure(
        variants,
        inputs,
        experiment.rounds,
        precision=experiment.precision,
        time_limit=experiment.time_limit,
        on_round=lambda: listener.advance("", 1),
    )
    after = conditions.snapshot(shared.device)
    answers = {
        name: answer(graph, tokenizer, question, context, rule, experiment.windowing).text
        for name, graph in variants.items()
    }
    for name, seconds in timing.seconds.items():
        shared.store.save_times(outcome.number, name, seconds)
    outcome = replace(
        outcome,
        noise=timing.noise,
        remarks=(*timing.remarks, *conditions.remarks(before, after)),
        conditions=conditions.published(before, after),
    )
    return outcome, tuple(
        replace(
            row,
            answer=answers[row.name],
            latency=timing.latency(row.name),
            percentiles=timing.percentiles(row.name),
            first_call_ms=1000 * timing.first_calls[row.name],
            pays_after=None if row.name == BASE else timing.pays_after(row.name),
            rounds=len(timing.seconds[row.name]),
            speedup=None if row.name == BASE else timing.speedup(row.name),
        )
        if row.name in variants
        else replace(row, answer=answers[BASE])
        for row in rows
    )


def _evaluate(
    shared: _Run, outcome: Outcome, rows: tuple[Row, ...], variants: Mapping[str, GraphModule], data: Dataset
) -> tuple[Row, ...]:
    """Score every variant on the same questions, with what the store has of it."""
    experiment, store, listener = shared.experiment, shared.store, shared.listener
    readers = {name: Reader(graph, shared.tokenizer, experiment.rule) for name, graph in variants.items()}
    settings = _settings(shared, outcome)
    batching = experiment.batching
    if batching.is_open:
        key = _key(variants[BASE], data, settings).key
        listener.begin("Choosing the batch size", {"": 1})
        tokens = store.tuned(
            key, lambda: measured(readers[BASE], data, experiment.windowing, experiment.streams).tokens or 1
        )
        batching = Batching(tokens=tokens)
    keys = {name: _key(graph, data, settings | {"batching": str(batching)}) for name, graph in variants.items()}
    listener.begin("Answering", dict.fromkeys(readers, len(data)))
    found = evaluate_together(
        readers,
        data,
        batching,
        experiment.windowing,
        {name: store.results(key, experiment.fresh) for name, key in keys.items()},
        experiment.streams,
        session=outcome.number,
        on_questions=listener.advance,
    )
    for name, evaluation in found.items():
        store.save_answers(keys[name].key, _answer_records(evaluation))
    return tuple(
        _evaluated(row, found[row.name], found[BASE], keys[row.name].key, experiment.margin)
        if row.name in variants
        # A row whose graph is Base's has Base's quality, and no speed.
        else replace(row, quality=quality(found[BASE], experiment.margin, found[BASE]), evaluation=keys[BASE].key)
        for row in rows
    )


def _evaluated(row: Row, found: Evaluation, base: Evaluation, key: str, margin: float) -> Row:
    compared = row.name != BASE
    wary = row.verification is not None and row.verification.promise == Approximates.kind
    result = quality(found, margin, base if compared else None, wary)
    return replace(
        row,
        quality=result,
        alarm=alarm(result, row.verification),
        samples_per_second=found.samples_per_second,
        tokens_per_second=found.tokens_per_second,
        work=found.work,
        throughput_speedup=found.speedup(base) if compared else None,
        evaluation=key,
    )


def _settings(shared: _Run, outcome: Outcome) -> dict[str, Any]:
    """All that decides an answer beside graph, weights and questions. The null threshold is applied afterwards."""
    experiment, rule = shared.experiment, shared.experiment.rule
    return {
        "machine": {name: outcome.machine[name] for name in DECISIVE},
        "tokenizer": tokenizer_hash(shared.tokenizer),
        "max_length": longest(shared.tokenizer, experiment.windowing),
        "stride": experiment.windowing.stride,
        "n_best": rule.n_best,
        "max_answer_length": rule.max_answer_length,
        "chunk": CHUNK,
        "streams": experiment.streams or default_streams(shared.device),
    }


def _key(graph: GraphModule, data: Dataset, settings: Mapping[str, Any]) -> EvaluationKey:
    return EvaluationKey(graphs.graph_hash(graph), graphs.constants_hash(graph), data.content_hash, settings)


def _answer_records(found: Evaluation) -> Iterator[AnswerRecord]:
    judged = zip(found.judged.exact, found.judged.f1, found.judged.answerable, strict=True)
    for (question, each), (exact, f1, answerable) in zip(found.details.items(), judged, strict=True):
        yield AnswerRecord(
            question, each.span, each.score, each.null_odds, each.gap, float(exact), float(f1), bool(answerable)
        )
