"""What keeps two stored experiments from being compared: other weights, other questions, another machine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bert_evaluation.device import HARDWARE, VERSIONS
from bert_evaluation.outcome import Outcome
from bert_evaluation.stored import Stored, StoredEvaluation

HASH = 12  # characters shown of one


@dataclass(frozen=True)
class Obstacle:
    """Something that differs, so that a difference of results would say nothing of the graphs."""

    kind: Literal["weights", "data", "question", "machine", "versions"]
    sentence: str

    @property
    def label(self) -> str:
        """The obstacle in two words."""
        return f"other {self.kind}"


def obstacles(one: Stored, other: Stored) -> tuple[Obstacle, ...]:
    """All that keeps the two from being compared."""
    return tuple(_obstacles(one, other))


def _obstacles(one: Stored, other: Stored) -> Iterator[Obstacle]:
    before, after = one.outcome, other.outcome
    if before.weights_hash != after.weights_hash:
        said = [f"{each.experiment.model} ({each.weights_hash[:HASH]})" for each in (before, after)]
        yield Obstacle("weights", _differ("weights", said, one, other))
    if _asks_otherwise(one, other):
        yield Obstacle("data", _differ("data", [_described(one), _described(other)], one, other))
    asked = [(each.experiment.question, each.experiment.context, each.experiment.windowing) for each in (before, after)]
    if before.experiment.infer and after.experiment.infer and asked[0] != asked[1]:
        said = [repr(question) for question, *_ in asked]
        if said[0] == said[1]:
            said = [f"{question} with another context or window" for question in said]
        yield Obstacle("question", _differ("question of --infer", said, one, other))
    if said := _unequal(HARDWARE, _hardware(before), _hardware(after)):
        yield Obstacle("machine", _differ("machine", said, one, other))
    if said := _unequal(VERSIONS, before.machine, after.machine):
        yield Obstacle("versions", _differ("versions", said, one, other))


def notes(one: Stored, other: Stored) -> tuple[str, ...]:
    """What does not keep them from being compared, but may be why they differ."""
    return tuple(_notes(one, other))


def _notes(one: Stored, other: Stored) -> Iterator[str]:
    for each in (one, other):
        if each.state != "finished":
            yield f"{each.name} is not finished, but {each.state}; what it has is compared"
    settings = [_settings(one), _settings(other)]
    if all(settings) and (said := _unequal(sorted(settings[0].keys() | settings[1].keys()), *settings)):
        yield _differ("settings", said, one, other)


def same_batches(one: StoredEvaluation, other: StoredEvaluation) -> bool:
    """Whether batches of the same number hold the same windows and were worked on alike."""
    return one.key.data_hash == other.key.data_hash and _workload(one) == _workload(other)


def _workload(evaluation: StoredEvaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.key.settings.items() if name != "machine"}


def _settings(stored: Stored) -> dict[str, Any]:
    """The settings of an experiment's evaluations, which all of them share."""
    found = next(iter(stored.evaluations.values()), None)
    threshold = stored.outcome.experiment.rule.null_threshold
    return {} if found is None else _workload(found) | {"null threshold": f"{threshold:g}"}


def _asks_otherwise(one: Stored, other: Stored) -> bool:
    """Whether both ask questions, but others: by their hash where the store has it, else by name, number and seed."""
    before, after = _data_hash(one), _data_hash(other)
    if before and after:
        return before != after
    named = [(each.dataset, each.samples, each.experiment.seed) for each in (one.outcome, other.outcome)]
    return None not in (one.outcome.dataset, other.outcome.dataset) and named[0] != named[1]


def _data_hash(stored: Stored) -> str:
    return next((each.key.data_hash for each in stored.evaluations.values()), "")


def _described(stored: Stored) -> str:
    outcome = stored.outcome
    content = f" ({found[:HASH]})" if (found := _data_hash(stored)) else ""
    return f"{outcome.samples} questions of {outcome.dataset} with seed {outcome.experiment.seed}{content}"


def _unequal(names: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, as it is in both; nothing if nothing does."""
    differ = [name for name in names if before.get(name) != after.get(name)]
    return [", ".join(f"{name} {side.get(name)}" for name in differ) for side in (before, after)] if differ else []


def _hardware(outcome: Outcome) -> dict[str, Any]:
    """The machine; without its device's name on a CPU, which is the processor's."""
    machine = outcome.machine
    twice = machine.get("device_name") == machine.get("processor")
    return {name: machine.get(name) for name in HARDWARE if not (twice and name == "device_name")}


def _differ(what: str, said: Sequence[str], one: Stored, other: Stored) -> str:
    return f"other {what}, {said[0]} in {one.name} and {said[1]} in {other.name}"
