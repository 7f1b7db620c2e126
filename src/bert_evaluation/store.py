"""Results on disk: experiments, their rows and raw times, and what each batch of an evaluation brought.

One SQLite file in WAL mode, which several processes may write to at once and any SQLite program can read. Every batch
is a transaction, so whatever ends a process costs no more than the batch it was at.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from bert_evaluation.answering import BatchResult
from bert_evaluation.database import Database
from bert_evaluation.errors import StoreError
from bert_evaluation.squad.answers import Span, probability

FILE, MEMORY = "results.sqlite", ":memory:"


def default_file() -> Path:
    """Where results are kept unless told otherwise: a file in the user's data folder."""
    return Path(platformdirs.user_data_dir("bert-evaluation", appauthor=False)) / FILE


@dataclass(frozen=True)
class EvaluationKey:
    """What an evaluation is known by: equal keys give equal answers, so a result may stand for another."""

    graph_hash: str
    weights_hash: str
    data_hash: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """One hash of all of it."""
        parts = [self.graph_hash, self.weights_hash, self.data_hash, dict(self.settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One experiment as the store has it. `state`: running (or killed), finished, interrupted, failed."""

    number: int
    started: str
    finished: str | None
    state: str
    command: str
    outcome: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class AnswerRecord:
    """One question's best span in an evaluation, how it was chosen (in logits), and how it scores."""

    question: str
    span: str
    score: float
    null_odds: float
    gap: float
    exact: float
    f1: float
    answerable: bool

    def text(self, null_threshold: float) -> str:
        """The answer: the span, or nothing where null odds are above the threshold."""
        return "" if self.null_odds > null_threshold else self.span

    @property
    def no_answer_probability(self) -> float:
        """The null odds as a probability."""
        return probability(self.null_odds)


class Store:
    """The results in one file. Raises StoreError, with a sentence, for whatever the file or the disk will not do."""

    def __init__(self, file: str | Path | None = None, readonly: bool = False) -> None:
        """Open a store, the user's own by default, and make it if it is not there; `":memory:"` is kept nowhere.

        With `readonly` it must exist, and nothing is written.
        """
        self.file = default_file() if file is None else Path(file).expanduser()
        if self.file.is_dir():
            self.file /= FILE
        if file is None and not readonly:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self._database = Database(self.file, readonly)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @property
    def is_volatile(self) -> bool:
        """Whether it ends with the process."""
        return str(self.file) == MEMORY

    def begin(self, command: str, outcome: str) -> int:
        """Take note of a new experiment, and return its number."""
        values = (_now(), "running", command, outcome)
        cursor = self._database.do(
            "INSERT INTO experiments (started, state, command, outcome) VALUES (?, ?, ?, ?)", values
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def save(self, number: int, outcome: str, rows: Sequence[tuple[str, str | None, str]]) -> None:
        """Keep what an experiment has brought so far; `rows` are name, key of the evaluation, and content."""
        with self._database.transaction():
            self._database.do("UPDATE experiments SET outcome = ? WHERE id = ?", (outcome, number))
            for position, (name, evaluation, row) in enumerate(rows):
                values = (number, position, name, evaluation, row)
                self._database.do("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", values)

    def save_times(self, number: int, name: str, seconds: Sequence[float]) -> None:
        """Keep the raw times of one row's inference."""
        self._database.do("INSERT OR REPLACE INTO timings VALUES (?, ?, ?)", (number, name, json.dumps(seconds)))

    def end(self, number: int, state: str) -> None:
        """Take note of how an experiment ended: finished, interrupted or failed."""
        self._database.do("UPDATE experiments SET finished = ?, state = ? WHERE id = ?", (_now(), state, number))

    def experiments(self) -> Iterator[Entry]:
        """Every experiment, the first one first."""
        for number, *rest in self._database.do(
            "SELECT id, started, finished, state, command, outcome FROM experiments"
        ).fetchall():
            rows = self._database.do("SELECT row FROM rows WHERE experiment = ? ORDER BY position", (number,))
            started, finished, state, command, outcome = rest
            yield Entry(number, started, finished, state, command, outcome, tuple(row for (row,) in rows))

    def experiment(self, number: int) -> Entry:
        """One experiment. Raises StoreError that says which there are."""
        entries = {entry.number: entry for entry in self.experiments()}
        if number not in entries:
            there = f"1 to {max(entries)}" if entries else "none yet"
            raise StoreError(f"The store {self.file} has no experiment {number}; it has {there}.")
        return entries[number]

    def times(self, number: int) -> dict[str, list[float]]:
        """The raw times (seconds) of an experiment's inference, by row."""
        found = self._database.do("SELECT name, seconds FROM timings WHERE experiment = ?", (number,))
        return {name: json.loads(seconds) for name, seconds in found}

    def batch_seconds(self, key: str) -> list[float]:
        """The raw times (seconds) of an evaluation's batches, in their order."""
        found = self._database.do("SELECT seconds FROM batches WHERE evaluation = ? ORDER BY number", (key,))
        return [seconds for (seconds,) in found]

    def batch_times(self, key: str) -> dict[int, tuple[int, float]]:
        """The session and the raw time (seconds) of an evaluation's batches, by number."""
        found = self._database.do("SELECT number, session, seconds FROM batches WHERE evaluation = ?", (key,))
        return {number: (session, seconds) for number, session, seconds in found}

    def evaluation(self, key: str) -> EvaluationKey | None:
        """What an evaluation is known by, or None if the store has no such."""
        found = self._database.do(
            "SELECT graph_hash, weights_hash, data_hash, settings FROM evaluations WHERE key = ?", (key,)
        ).fetchone()
        if found is None:
            return None
        graph_hash, weights_hash, data_hash, settings = found
        return EvaluationKey(graph_hash, weights_hash, data_hash, json.loads(settings))

    def results(self, evaluation: EvaluationKey, fresh: bool = False) -> "StoredResults":
        """The results of an evaluation's batches, kept as they come; `fresh` forgets those that there are."""
        key, parts = evaluation.key, evaluation
        with self._database.transaction():
            values = (
                key,
                parts.graph_hash,
                parts.weights_hash,
                parts.data_hash,
                json.dumps(dict(parts.settings)),
                _now(),
            )
            self._database.do("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)", values)
            if fresh:
                self._database.do("DELETE FROM batches WHERE evaluation = ?", (key,))
                self._database.do("DELETE FROM answers WHERE evaluation = ?", (key,))
        return StoredResults(self._database, key)

    def save_answers(self, key: str, answers: Iterable[AnswerRecord]) -> None:
        """Keep the answers of a complete evaluation."""
        with self._database.transaction():
            for each in answers:
                values = (key, *dataclasses.astuple(each))
                self._database.do("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def answers(self, key: str) -> Iterator[AnswerRecord]:
        """The answers of an evaluation, in the order of their ids."""
        names = ", ".join(field.name for field in dataclasses.fields(AnswerRecord))
        found = self._database.do(f"SELECT {names} FROM answers WHERE evaluation = ? ORDER BY question", (key,))  # noqa: S608
        for question, span, score, null_odds, gap, exact, f1, answerable in found:
            yield AnswerRecord(question, span, score, null_odds, gap, exact, f1, bool(answerable))

    def tuned(self, key: str, find: Callable[[], int]) -> int:
        """A number that was found by measuring, found once and then kept, so that a run taken up does not change it."""
        found = self._database.do("SELECT value FROM tuned WHERE key = ?", (key,)).fetchone()
        if found is None:
            self._database.do("INSERT OR IGNORE INTO tuned VALUES (?, ?)", (key, find()))
            found = self._database.do("SELECT value FROM tuned WHERE key = ?", (key,)).fetchone()
        return int(found[0])

    def measured(self, key: str, find: Callable[[], str], fresh: bool = False) -> tuple[str, str]:
        """A measurement, made once and then kept, or made anew with `fresh`; and when it was made."""
        found = None if fresh else self.kept(key)
        if found is None:
            found = (find(), _now())
            self._database.do("INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", (key, *found))
        return found

    def kept(self, key: str) -> tuple[str, str] | None:
        """A measurement that was made before, and when; None if it was not."""
        found = self._database.do("SELECT value, created FROM measured WHERE key = ?", (key,)).fetchone()
        return None if found is None else (str(found[0]), str(found[1]))


class StoredResults:
    """The results of one evaluation's batches, in a store."""

    def __init__(self, database: Database, key: str) -> None:
        self._database, self.key = database, key

    def get(self, number: int) -> BatchResult | None:
        """The result of a batch, or None if it has not been computed."""
        found = self._database.do(
            "SELECT spans, seconds, model_seconds, session FROM batches WHERE evaluation = ? AND number = ?",
            (self.key, number),
        ).fetchone()
        if found is None:
            return None
        spans, *times = found
        return BatchResult(tuple(Span(*span) for span in json.loads(spans)), *times)

    def put(self, number: int, result: BatchResult) -> None:
        """Keep the result of a batch. If another process was first, its result stays."""
        values = (self.key, number, result.session, result.seconds, result.model_seconds, json.dumps(result.spans))
        self._database.do("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, ?, ?, ?)", values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
