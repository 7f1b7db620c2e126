"""What the stages of a run do but the evaluation: each takes rows and gives them back with more in them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from bert_evaluation import attribution, compiled, hashes
from bert_evaluation.answering import answer, model_inputs
from bert_evaluation.capturing import capture, longest_input, text_inputs
from bert_evaluation.device import DECISIVE
from bert_evaluation.graph import GraphModule
from bert_evaluation.listing import step_diffs
from bert_evaluation.measurement import Measurement, Plan, measure
from bert_evaluation.memory import memory
from bert_evaluation.outcome import Experiment, Outcome
from bert_evaluation.products import precision
from bert_evaluation.recipe import Recipe, compose
from bert_evaluation.regime import Cells, Shape, regime
from bert_evaluation.roofline import flops, kept, share
from bert_evaluation.rows import BASE, Row, StepChange
from bert_evaluation.squad.batches import tensors
from bert_evaluation.squad.dataset import Example
from bert_evaluation.squad.windows import question_first, windows
from bert_evaluation.store import Store
from bert_evaluation.verification import check, observe

MEMORY_SHAPE = (8, 384)  # batch and length at which a row's memory is counted, or what the model reads at most
CHECKING = "Capturing and checking promises"
_CELLS: TypeAdapter[Cells] = TypeAdapter(Cells)


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
class Run:
    """What the stages of one run share. `outcome` is what was known of it before the first."""

    experiment: Experiment
    store: Store
    listener: Listener
    model: nn.Module
    tokenizer: Any
    device: torch.device
    outcome: Outcome


@dataclass(frozen=True)
class Variants:
    """The graphs that are run side by side, Base first: those of rows that changed something, and parts of recipes."""

    graphs: Mapping[str, GraphModule]
    parts: attribution.Parts


def transform(run: Run, recipes: tuple[Recipe, ...]) -> tuple[Variants, tuple[Row, ...]]:
    """Capture the model, apply each recipe to a graph of its own, check its promise, count its memory."""
    model, listener = run.model, run.listener
    listener.begin(CHECKING, {"": 1 + len(recipes)})
    base = capture(model)
    batch, length = MEMORY_SHAPE
    inputs = text_inputs(model, batch, min(length, longest_input(model)))
    made, rows = {BASE: base}, [Row(BASE, "", memory=memory(base, inputs), precision=precision(base))]
    listener.advance("", 1)
    reference = observe(model) if recipes else None
    for recipe in recipes:
        own = compose(*recipe.steps, inplace=False)
        graph = own(base)
        name = f"{BASE}+{recipe.name}"
        made[name] = graph
        if compiled.is_pending(graph):
            listener.begin(f"Compiling {name}, once, up to a minute", {"": None})
            compiled.prepare([graph])
            listener.begin(CHECKING, {"": 1 + len(recipes)})
            listener.advance("", len(rows))
        rows.append(
            Row(
                name=name,
                recipe=repr(own),
                sites=own.reports,
                verification=check(reference, graph) if reference else None,
                memory=memory(graph, inputs),
                precision=precision(graph),
                unchanged=not own.report.applied,
                graph_changes=tuple(StepChange(each.transformation, each.diff) for each in step_diffs(base, recipe)),
            )
        )
        listener.advance("", 1)
    changed = {row.name: made[row.name] for row in rows if not row.unchanged}
    parts = attribution.Parts(changed)
    if run.experiment.attribute:
        for row, recipe in zip(rows[1:], recipes, strict=True):
            if not row.unchanged:
                parts.add(row.name, recipe)
    return Variants(parts.graphs, parts), tuple(rows)


def infer(run: Run, rows: tuple[Row, ...], variants: Variants) -> tuple[Measurement, tuple[Row, ...]]:
    """Answer the one question with every variant, and time them."""
    experiment, tokenizer, listener, made = run.experiment, run.tokenizer, run.listener, variants.graphs
    question, context, rule = experiment.question, experiment.context, experiment.rule
    cut = windows(tokenizer, [Example("", question, context, ())], experiment.windowing)
    padding, in_front = tokenizer.pad_token_id or 0, not question_first(tokenizer)
    inputs = tensors(cut, padding, model_inputs(made[BASE]), run.device, in_front)
    listener.begin("Timing", {"": experiment.rounds})
    count = flops(made[BASE], inputs)
    timing = measure(
        made,
        inputs,
        experiment.rounds,
        precision=experiment.precision,
        time_limit=experiment.time_limit,
        on_round=lambda: listener.advance("", 1),
    )
    for name, seconds in timing.seconds.items():
        run.store.save_times(run.outcome.number, name, seconds)
    roofline = kept(run.store, run.device)

    def share_of_peak(row: Row) -> float | None:
        peak = None if roofline is None else roofline.peak(row.precision)
        return None if peak is None else share(count, timing.latency(row.name).estimate / 1000, peak)

    answers = {
        row.name: answer(made[row.name], tokenizer, question, context, rule, experiment.windowing).text
        for row in rows
        if row.name in made
    }
    return timing, tuple(
        replace(
            row,
            answer=answers[row.name],
            latency=timing.latency(row.name),
            percentiles=timing.percentiles(row.name),
            first_call_ms=1000 * timing.first_calls[row.name],
            pays_after=None if row.name == BASE else timing.pays_after(row.name),
            rounds=len(timing.seconds[row.name]),
            speedup=None if row.name == BASE else timing.speedup(row.name),
            share_of_peak=share_of_peak(row),
            effects=variants.parts.effects(row.name, speedup=timing.ratio),
        )
        if row.name in made
        else replace(row, answer=answers[BASE])
        for row in rows
    )


def map_regime(run: Run, rows: tuple[Row, ...], variants: Variants) -> tuple[Row, ...]:
    """Time every row at every shape of the grid, but those that the store has. Inputs are not padded."""
    experiment, grid = run.experiment, run.experiment.map
    made = {row.name: variants.graphs[row.name] for row in rows if row.name in variants.graphs}
    if grid is None or len(made) < 2:
        return rows
    plan = Plan(experiment.precision, experiment.time_limit, experiment.rounds)
    facts = {name: [hashes.graph_hash(graph), hashes.constants_hash(graph)] for name, graph in made.items()}
    decisive = {name: run.outcome.machine[name] for name in DECISIVE if name != "threads"}

    def stored(shape: Shape, find: Callable[[], Cells]) -> Cells:
        parts = ["regime", facts, decisive, str(shape), repr(plan)]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        cells, _ = run.store.measured(key, lambda: _CELLS.dump_json(find()).decode(), experiment.fresh)
        return _CELLS.validate_json(cells)

    run.listener.begin("Mapping", {"": len(grid.shapes)})
    cells = regime(
        made,
        lambda batch, length: text_inputs(run.model, batch, length),
        grid,
        plan,
        stored,
        on_shape=lambda shape: run.listener.advance("", 1),
    )
    return tuple(replace(row, regime=cells.get(row.name, ())) for row in rows)
