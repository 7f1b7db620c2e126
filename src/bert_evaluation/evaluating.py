"""The stage that evaluates: every variant answers the same questions, but what the store has of it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bert_evaluation import hashes
from bert_evaluation.answering import Reader
from bert_evaluation.calibration import calibration_of
from bert_evaluation.checkpoints import tokenizer_hash
from bert_evaluation.device import DECISIVE
from bert_evaluation.evaluation import CHUNK, Evaluation, evaluate_together, measured
from bert_evaluation.graph import GraphModule
from bert_evaluation.promise import Approximates
from bert_evaluation.quality import alarm, calibrated_on, f1_difference, quality
from bert_evaluation.rows import BASE, Row
from bert_evaluation.squad.batches import Batching
from bert_evaluation.squad.dataset import Dataset
from bert_evaluation.squad.windows import longest
from bert_evaluation.stages import Run, Variants
from bert_evaluation.stats import Difference, Ratio
from bert_evaluation.store import AnswerRecord, EvaluationKey
from bert_evaluation.streams import default_streams
from bert_evaluation.transformation import history


def evaluate(run: Run, rows: tuple[Row, ...], variants: Variants, data: Dataset) -> tuple[Row, ...]:
    """Score every variant on the same questions, with what the store has of it."""
    experiment, store, listener, made = run.experiment, run.store, run.listener, variants.graphs
    readers = {name: Reader(graph, run.tokenizer, experiment.rule) for name, graph in made.items()}
    settings = _settings(run)
    batching = experiment.batching
    if batching.is_open:
        key = _key(made[BASE], data, settings).key
        listener.begin("Choosing the batch size", {"": 1})
        tokens = store.tuned(
            key, lambda: measured(readers[BASE], data, experiment.windowing, experiment.streams).tokens or 1
        )
        batching = Batching(tokens=tokens)
    keys = {name: _key(graph, data, settings | {"batching": str(batching)}) for name, graph in made.items()}
    listener.begin("Answering", dict.fromkeys(readers, len(data)))
    found = evaluate_together(
        readers,
        data,
        batching,
        experiment.windowing,
        {name: store.results(key, experiment.fresh) for name, key in keys.items()},
        experiment.streams,
        session=run.outcome.number,
        on_questions=listener.advance,
    )
    for name, evaluation in found.items():
        store.save_answers(keys[name].key, _answer_records(evaluation))
    rows = tuple(
        _evaluated(row, made[row.name], found[row.name], found[BASE], keys[row.name].key, experiment.margin)
        if row.name in made
        # A row whose graph is Base's has Base's quality, and no speed.
        else replace(row, quality=quality(found[BASE], experiment.margin, found[BASE]), evaluation=keys[BASE].key)
        for row in rows
    )

    def throughput(without: str, with_: str) -> Ratio | None:
        return found[with_].speedup(found[without])

    def difference(without: str, with_: str) -> Difference:
        return f1_difference(found[with_], found[without], experiment.margin)

    return tuple(
        replace(row, effects=variants.parts.effects(row.name, row.effects, throughput=throughput, f1=difference))
        for row in rows
    )


def _evaluated(row: Row, graph: GraphModule, found: Evaluation, base: Evaluation, key: str, margin: float) -> Row:
    compared = row.name != BASE
    wary = row.verification is not None and row.verification.promise == Approximates.kind
    result = quality(found, margin, base if compared else None, wary)
    return replace(
        row,
        quality=result,
        alarm=alarm(result, row.verification) or _calibrated_on(graph, found),
        samples_per_second=found.samples_per_second,
        tokens_per_second=found.tokens_per_second,
        work=found.work,
        throughput_speedup=found.speedup(base) if compared else None,
        evaluation=key,
    )


def _calibrated_on(graph: GraphModule, found: Evaluation) -> str | None:
    steps = [step for step in history(graph) if step.transformation.calibrates and step.report.applied]
    names = list(dict.fromkeys(step.transformation.name for step in steps))
    return calibrated_on(found, names, calibration_of(graph).questions) if names else None


def _settings(run: Run) -> dict[str, Any]:
    """All that decides an answer beside graph, weights and questions. The null threshold is applied afterwards."""
    experiment, rule = run.experiment, run.experiment.rule
    return {
        "machine": {name: run.outcome.machine[name] for name in DECISIVE},
        "tokenizer": tokenizer_hash(run.tokenizer),
        "max_length": longest(run.tokenizer, experiment.windowing),
        "stride": experiment.windowing.stride,
        "n_best": rule.n_best,
        "max_answer_length": rule.max_answer_length,
        "chunk": CHUNK,
        "streams": experiment.streams or default_streams(run.device),
    }


def _key(graph: GraphModule, data: Dataset, settings: Mapping[str, Any]) -> EvaluationKey:
    return EvaluationKey(hashes.graph_hash(graph), hashes.constants_hash(graph), data.content_hash, settings)


def _answer_records(found: Evaluation) -> Iterator[AnswerRecord]:
    judged = zip(found.judged.exact, found.judged.f1, found.judged.answerable, strict=True)
    for (question, each), (exact, f1, answerable) in zip(found.details.items(), judged, strict=True):
        yield AnswerRecord(
            question, each.span, each.score, each.null_odds, each.gap, float(exact), float(f1), bool(answerable)
        )
