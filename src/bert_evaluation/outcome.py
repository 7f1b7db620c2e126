"""The frozen description of a run, what it brought, and both as text: published, and for the store."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from bert_evaluation import builtin
from bert_evaluation.measurement import PRECISION, TIME_LIMIT
from bert_evaluation.regime import Grid
from bert_evaluation.rows import Row, row_as_json
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.squad.batches import Batching
from bert_evaluation.squad.windows import Windowing
from bert_evaluation.stats import Ratio
from bert_evaluation.store import Entry

QUESTION = "Which zelda game is my favorite?"
CONTEXT = "I cannot decide whether my favorite Zelda game is Ocarina of time or The Wind Waker."
MARGIN = 0.99  # of Base's F1, as in MLPerf Inference


@dataclass(frozen=True)
class Experiment:
    """What is to be run. `recipes` are text forms; none given stands for those of the original script.

    `margin` is the share of Base's F1 that a recipe has to keep; `attribute` runs each step of a recipe alone, and the
    recipe without it, too; precision and time limit of a `map` are for each of its shapes; `fresh` computes anew what
    the store has.
    """

    infer: bool = False
    evaluate: bool = False
    transform: bool = False
    model: str = builtin.NAME
    dataset: str = builtin.NAME
    device: str = "auto"
    samples: int | None = None
    seed: int = 42
    recipes: tuple[str, ...] = ()
    rounds: int | None = None
    precision: float = PRECISION
    time_limit: float = TIME_LIMIT
    question: str = QUESTION
    context: str = CONTEXT
    rule: AnswerRule = field(default_factory=AnswerRule)
    windowing: Windowing = field(default_factory=Windowing)
    batching: Batching = field(default_factory=Batching)
    streams: int | None = None
    margin: float = MARGIN
    attribute: bool = False
    map: Grid | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Outcome:
    """All that an experiment brought: what it ran on, and the rows, Base first. `number` is its own in the store.

    `noise` is Base's inference against itself: what this machine calls a difference where there is none; `remarks` say
    what else a reader of the times should know. `conditions` are those of the machine around each timed
    stage.
    """

    number: int
    experiment: Experiment
    machine: Mapping[str, Any]
    parameters: int
    weights_hash: str
    dataset: str | None
    samples: int | None
    rows: tuple[Row, ...]
    noise: Ratio | None = None
    remarks: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)


_ROW, _OUTCOME = TypeAdapter(Row), TypeAdapter(Outcome)


def _text(adapter: TypeAdapter[Any], value: Any) -> str:
    # By way of Python's json, which keeps infinities.
    return json.dumps(adapter.dump_python(value, mode="json"))


def dump(outcome: Outcome) -> tuple[str, list[str]]:
    """The outcome without its rows, and each row, as the store keeps them."""
    return _text(_OUTCOME, replace(outcome, rows=())), [_text(_ROW, row) for row in outcome.rows]


def load(entry: Entry) -> Outcome:
    """The outcome that `dump` made."""
    rows = tuple(_ROW.validate_python(json.loads(row)) for row in entry.rows)
    outcome = _OUTCOME.validate_python(json.loads(entry.outcome))
    return replace(outcome, number=entry.number, rows=rows)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome in the published form, schema 1. What is infinite or no number is None: JSON has no word for it."""
    experiment = outcome.experiment
    published = {
        "schema": 1,
        "experiment": outcome.number,
        "machine": dict(outcome.machine),
        "model": {
            "name": experiment.model,
            "parameters": outcome.parameters,
            "weights_hash": outcome.weights_hash,
        },
        "dataset": {"name": outcome.dataset, "samples": outcome.samples, "seed": experiment.seed}
        if outcome.dataset
        else None,
        "noise": asdict(outcome.noise) if outcome.noise else None,
        "remarks": list(outcome.remarks),
        "conditions": dict(outcome.conditions) if outcome.conditions else None,
        "rows": [row_as_json(row) for row in outcome.rows],
    }
    return {name: _finite(part) for name, part in published.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
