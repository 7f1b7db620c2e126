"""One run: checkpoint × recipes × device × data set → rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bert_evaluation import builtin
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import capture
from bert_evaluation.checkpoints import load, load_dataset
from bert_evaluation.device import choose_device, machine
from bert_evaluation.evaluation import BATCH_SIZE, Evaluation, answer, evaluate_together, model_inputs
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import ROUNDS, measure
from bert_evaluation.recipe import Recipe, compose, parse_recipe
from bert_evaluation.rows import Quality, Row, row_as_json
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.squad.dataset import Dataset, Example, sample
from bert_evaluation.squad.windows import Windowing, batch, windows
from bert_evaluation.stats import speedup
from bert_evaluation.transformations import REGISTRY, original_recipes
from bert_evaluation.verification import check, observe

BASE = "Base"
QUESTION = "Which zelda game is my favorite?"
CONTEXT = "I cannot decide whether my favorite Zelda game is Ocarina of time or The Wind Waker."


@dataclass(frozen=True)
class Experiment:
    """What is to be run. `recipes` are text forms; none given stands for those of the original script."""

    infer: bool = False
    evaluate: bool = False
    transform: bool = False
    model: str = builtin.NAME
    dataset: str = builtin.NAME
    device: str = "auto"
    samples: int | None = None
    seed: int = 42
    recipes: tuple[str, ...] = ()
    batch_size: int = BATCH_SIZE
    rounds: int = ROUNDS
    question: str = QUESTION
    context: str = CONTEXT
    rule: AnswerRule = field(default_factory=AnswerRule)
    windowing: Windowing = field(default_factory=Windowing)


@dataclass(frozen=True)
class Outcome:
    """All that an experiment brought: what it ran on, and the rows, Base first."""

    experiment: Experiment
    machine: Mapping[str, Any]
    parameters: int
    weights_hash: str
    dataset: str | None
    samples: int | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Listener:
    """Who is told of the progress: `stage` of a finished part, `begin` of a long one, `advance` of each step in it."""

    stage: Callable[[str, Outcome], None] = lambda name, outcome: None
    begin: Callable[[str, int], None] = lambda what, total: None
    advance: Callable[[int], None] = lambda count: None


def run(experiment: Experiment, listener: Listener = Listener()) -> Outcome:
    """Carry an experiment out: transform, infer, evaluate, as asked; what is cheap to refuse is refused first."""
    recipes = _recipes(experiment)
    device = choose_device(experiment.device)
    data = _questions(experiment) if experiment.evaluate else None
    model, tokenizer = load(experiment.model, device)
    graphs_by_name, rows = _transform(model, recipes, listener)
    outcome = Outcome(
        experiment=experiment,
        machine=machine(device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_hash=graphs.weights_hash(model),
        dataset=data.name if data else None,
        samples=len(data) if data else None,
        rows=rows,
    )
    if experiment.transform:
        listener.stage("transform", outcome)
    distinct = {row.name: graphs_by_name[row.name] for row in rows if not row.unchanged}
    if experiment.infer:
        outcome = replace(outcome, rows=_infer(experiment, rows, distinct, tokenizer, device, listener))
        listener.stage("infer", outcome)
    if data is not None:
        outcome = replace(outcome, rows=_evaluate(experiment, outcome.rows, distinct, tokenizer, data, listener))
        listener.stage("evaluate", outcome)
    return outcome


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
    listener.begin("Capturing and checking promises", 1 + len(recipes))
    base = capture(model)
    made, rows = {BASE: base}, [Row(BASE, "")]
    listener.advance(1)
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
            )
        )
        listener.advance(1)
    return made, tuple(rows)


def _infer(
    experiment: Experiment,
    rows: tuple[Row, ...],
    variants: Mapping[str, GraphModule],
    tokenizer: Any,
    device: torch.device,
    listener: Listener,
) -> tuple[Row, ...]:
    """Answer the one question with every variant, and time them."""
    base, rule = variants[BASE], experiment.rule
    cut = windows(tokenizer, [Example("", experiment.question, experiment.context, ())], experiment.windowing)
    inputs = batch(cut, tokenizer.pad_token_id or 0, model_inputs(base), device)
    listener.begin("Timing", experiment.rounds)
    timing = measure(variants, inputs, experiment.rounds, on_round=lambda: listener.advance(1))
    answers = {
        name: answer(graph, tokenizer, experiment.question, experiment.context, rule, experiment.windowing).text
        for name, graph in variants.items()
    }
    return tuple(
        replace(
            row,
            answer=answers[row.name],
            latency=timing.latency(row.name),
            rounds=len(timing.seconds[row.name]),
            speedup=None if row.name == BASE else timing.speedup(row.name),
        )
        if row.name in variants
        else replace(row, answer=answers[BASE])
        for row in rows
    )


def _evaluate(
    experiment: Experiment,
    rows: tuple[Row, ...],
    variants: Mapping[str, GraphModule],
    tokenizer: Any,
    data: Dataset,
    listener: Listener,
) -> tuple[Row, ...]:
    """Score every variant on the same questions. A row whose graph is Base's has Base's quality, and no speed."""
    found = evaluate_together(
        variants,
        tokenizer,
        data,
        experiment.rule,
        experiment.windowing,
        experiment.batch_size,
        on_start=lambda total: listener.begin("Answering", total),
        on_windows=listener.advance,
    )
    base = found[BASE]
    return tuple(
        replace(
            row,
            quality=_quality(found[row.name], base, row.name != BASE),
            samples_per_second=found[row.name].samples_per_second,
            throughput_speedup=None if row.name == BASE else speedup(base.seconds, found[row.name].seconds),
        )
        if row.name in variants
        else replace(row, quality=_quality(base, base, True))
        for row in rows
    )


def _quality(found: Evaluation, base: Evaluation, compared: bool) -> Quality:
    changed = sum(answer != base.answers[each] for each, answer in found.answers.items())
    return Quality(
        exact=found.exact,
        f1=found.f1,
        has_answer_f1=found.scores.get("HasAns_f1"),
        no_answer_f1=found.scores.get("NoAns_f1"),
        samples=len(found.answers),
        changed_answers=changed if compared else None,
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome in the published form, schema 1."""
    experiment = outcome.experiment
    return {
        "schema": 1,
        "machine": dict(outcome.machine),
        "model": {
            "name": experiment.model,
            "parameters": outcome.parameters,
            "weights_hash": outcome.weights_hash,
        },
        "dataset": {"name": outcome.dataset, "samples": outcome.samples, "seed": experiment.seed}
        if outcome.dataset
        else None,
        "rows": [row_as_json(row) for row in outcome.rows],
    }
