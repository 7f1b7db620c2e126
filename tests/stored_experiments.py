"""Experiments made up and stored as `experiment.run` stores them, to be compared."""

import random
from dataclasses import replace

from bert_evaluation.answering import BatchResult
from bert_evaluation.outcome import Experiment, Outcome, dump
from bert_evaluation.rows import Row
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.store import AnswerRecord, EvaluationKey
from bert_evaluation.verification import Verification

MACHINE = {
    "processor": "AMD EPYC",
    "device": "cpu",
    "device_name": "AMD EPYC",
    "threads": 2,
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "bert_evaluation": "0.1.0",
}
OUTCOME = Outcome(
    number=0,
    experiment=Experiment(infer=True, evaluate=True, transform=True),
    machine=MACHINE,
    parameters=1,
    weights_hash="9f86d081884c7d65",
    dataset="built-in",
    samples=400,
    rows=(),
)
KEPT = Verification("reassociates", "kept", 1e-6, 3.0, 1e-6, 1e-5, 16)
BROKEN = replace(KEPT, verdict="broken", failing_probe="batch 1, length 2", first_difference="add_3")


def answers(wrong=(), count=400):
    """So many answers, all right but those numbered."""
    return [
        AnswerRecord(f"q{each:04}", f"span {each}", 3.0, -1.0, 0.5, float(each not in wrong), float(each not in wrong),
                     True)
        for each in range(count)
    ]  # fmt: skip


def keep(
    store,
    rows,
    *,
    found=OUTCOME,
    machine_speed=1.0,
    noise=0.003,
    rounds=40,
    batches=20,
    wrong=None,
    answered=answers,
    data="data",
    graphs=None,
    settings=None,
    null_threshold=0.0,
    verification=KEPT,
    recipes=None,
    unchanged=(),
    measured=("inference", "throughput", "answers"),
    state="finished",
    seed=0,
):
    """Store an experiment whose `rows` are so many times faster than a unit; return its number.

    `machine_speed` speeds up all of it; `wrong` are the questions that a row answers wrongly.
    """
    luck = random.Random(seed)  # noqa: S311
    number = store.begin(f"bert-evaluation --made-up {seed}", dump(found)[0])
    rule = AnswerRule(null_threshold=null_threshold)
    found = replace(found, number=number, experiment=replace(found.experiment, rule=rule))
    pace = [luck.lognormvariate(0, 0.01) / machine_speed for _ in range(max(rounds, batches))]  # the same for all rows
    made = []
    for name, speed in rows.items():
        key = None
        if "inference" in measured and name not in unchanged:
            store.save_times(number, name, [0.01 * pace[each] / speed * luck.gauss(1, noise) for each in range(rounds)])
        if "throughput" in measured or "answers" in measured:
            graph = "Base" if name in unchanged else (graphs or {}).get(name, name)
            known = {"stride": 128, "batching": "512", "machine": found.machine} | (settings or {})
            key = EvaluationKey(graph, found.weights_hash, data, known)
            kept = store.results(key)
            for each in range(batches if "throughput" in measured else 0):
                seconds = (1 + each) * pace[each] / speed * luck.gauss(1, noise)
                kept.put(each, BatchResult((), seconds, seconds, number))
            store.save_answers(key.key, answered((wrong or {}).get(name, ())) if "answers" in measured else [])
        promise = None if name == "Base" else verification
        recipe = "" if name == "Base" else (recipes or {}).get(name, f"{name.removeprefix('Base+')}()")
        made.append(
            Row(name, recipe, verification=promise, unchanged=name in unchanged, evaluation=key.key if key else None)
        )
    text, texts = dump(replace(found, rows=tuple(made)))
    store.save(number, text, [(row.name, row.evaluation, each) for row, each in zip(made, texts, strict=True)])
    store.end(number, state)
    return number
