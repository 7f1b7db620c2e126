"""An experiment with all that the store has of it: what comparisons are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_evaluation.outcome import Outcome, load
from bert_evaluation.rows import BASE, Row
from bert_evaluation.store import AnswerRecord, EvaluationKey, Store


@dataclass(frozen=True)
class StoredEvaluation:
    """What an evaluation is known by, session and seconds of its batches by number, and its answers by question."""

    key: EvaluationKey
    batches: Mapping[int, tuple[int, float]]
    answers: Mapping[str, AnswerRecord]


@dataclass(frozen=True)
class Stored:
    """An experiment, the seconds of each inference by row, and its evaluations by key. `file` is the store's.

    `name` is what it is called in sentences.
    """

    name: str
    file: Path
    state: str
    outcome: Outcome
    times: Mapping[str, Sequence[float]]
    evaluations: Mapping[str, StoredEvaluation]

    @property
    def rows(self) -> dict[str, Row]:
        """The rows by name."""
        return {row.name: row for row in self.outcome.rows}

    def is_as(self, other: "Stored") -> bool:
        """Whether both are one experiment."""
        return (self.file, self.outcome.number) == (other.file, other.outcome.number)

    def times_of(self, row: Row) -> Sequence[float] | None:
        """The times of a row's inference. A row whose graph is Base's has Base's."""
        return self.times.get(BASE if row.unchanged else row.name)

    def evaluation_of(self, row: Row | None) -> StoredEvaluation | None:
        """A row's evaluation, as far as the store has it."""
        return None if row is None or row.evaluation is None else self.evaluations.get(row.evaluation)


def read(store: Store, number: int, name: str | None = None) -> Stored:
    """One experiment out of a store. Raises StoreError if there is none of that number."""
    entry = store.experiment(number)
    outcome = load(entry)
    keys = {row.evaluation for row in outcome.rows if row.evaluation}
    known = {key: found for key in keys if (found := store.evaluation(key)) is not None}
    return Stored(
        name or f"experiment {number}",
        store.file.resolve(),
        entry.state,
        outcome,
        store.times(number),
        {
            key: StoredEvaluation(found, store.batch_times(key), {each.question: each for each in store.answers(key)})
            for key, found in known.items()
        },
    )
