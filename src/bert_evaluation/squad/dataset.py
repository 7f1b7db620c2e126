"""Questions in SQuAD's form, streamed from its JSON file or from rows of a hub data set, checked, and sampled."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from bert_evaluation.errors import DatasetError, UsageError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FORM = "data / paragraphs / context, qas / id, question, answers / text, answer_start"


@dataclass(frozen=True)
class Example:
    """A question on a passage; `answers` are the accepted ones, none if it cannot be answered from the passage."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their source. `examples` can be iterated again and again; a file is read anew each time.

    So a data set of any size takes no memory. Length and hash are known after one pass over it, which also checks it:
    it raises DatasetError if there are no examples or two have the same id.
    """

    name: str
    examples: Iterable[Example]

    def __len__(self) -> int:
        return self._surveyed[0]

    @property
    def content_hash(self) -> str:
        """A hash of every id, question, passage and accepted answer, in order."""
        return self._surveyed[1]

    @cached_property
    def _surveyed(self) -> tuple[int, str]:
        digest, ids, context = hashlib.sha256(), array("q"), None
        for example in self.examples:
            passage = None if example.context == context else example.context  # most passages have several questions
            digest.update(json.dumps([example.id, example.question, passage, example.answers]).encode())
            ids.append(hash(example.id))
            context = example.context
        if not ids:
            raise DatasetError(f"{self.name} holds no questions.")
        if len(np.unique(np.frombuffer(ids, dtype=np.int64))) < len(ids):
            self._refuse_ids_met_twice()
        return len(ids), digest.hexdigest()

    def _refuse_ids_met_twice(self) -> None:
        seen = set[str]()
        for example in self.examples:
            if example.id in seen:
                raise DatasetError(
                    f"{self.name} holds more than one question with the id {example.id}; ids must differ."
                )
            seen.add(example.id)


@dataclass(frozen=True)
class _Anew:
    """An iterable that starts over each time, as a function that returns an iterator does."""

    start: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.start()


def read_squad(file: str | Path) -> Dataset:
    """Read a file of SQuAD 1.1 or 2.0. Raises DatasetError if it is not there, not SQuAD, or has no questions."""
    path = Path(file)
    return _checked(Dataset(path.name, _Anew(lambda: _read(path))))


def from_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The data set of rows as the hub's `squad` and `squad_v2` have them. Raises DatasetError for other columns."""

    def read() -> Iterator[Example]:
        try:
            for row in rows:
                pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                yield _example(
                    row, row["context"], [{"text": text, "answer_start": start} for text, start in pairs], name
                )
        except (KeyError, TypeError) as error:
            raise DatasetError(
                f"The data set {name} is not SQuAD ({type(error).__name__}: {error}); it needs the columns"
                " id, question, context, answers (text, answer_start)."
            ) from None

    return _checked(Dataset(name, _Anew(read)))


def sample(dataset: Dataset, samples: int | None, seed: int = 42) -> Dataset:
    """The examples that `datasets` selects by `shuffle(seed).select(range(samples))`; all, in order, for None.

    Raises UsageError for a number below 1 or above what there is.
    """
    if samples is None:
        return dataset
    if not 1 <= samples <= len(dataset):
        raise UsageError(f"{samples} samples were asked for; {dataset.name} has 1 to {len(dataset)}.")
    order = np.random.default_rng(seed).permutation(len(dataset))[:samples]
    wanted = set(order.tolist())
    drawn = {index: example for index, example in enumerate(dataset.examples) if index in wanted}
    return Dataset(dataset.name, tuple(drawn[index] for index in order.tolist()))


def _read(path: Path) -> Iterator[Example]:
    found = False
    try:
        with path.open("rb") as file:
            if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
                file.seek(0)
            for paragraph in ijson.items(file, "data.item.paragraphs.item", use_float=True):
                for question in paragraph["qas"]:
                    found = True
                    yield _example(question, paragraph["context"], question["answers"], path.name)
    except FileNotFoundError:
        raise DatasetError(f"There is no data set file {path}.") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].strip()
        raise DatasetError(f"{path} is not JSON ({reason}); give a SQuAD 1.1 or 2.0 file.") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is JSON but not SQuAD ({type(error).__name__}: {error}); it needs {_FORM}."
        ) from None
    if not found:
        raise DatasetError(f"{path} holds no questions, or is not SQuAD; it needs {_FORM}.")


def _example(row: Mapping[str, Any], context: str, answers: Iterable[Mapping[str, Any]], name: str) -> Example:
    texts = []
    for answer in answers:
        text, start = answer["text"], answer["answer_start"]
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise DatasetError(
                f"{name}: the answer {text!r} of question {row['id']} does not stand at {start} of its context,"
                f" where there is {found!r}; correct its answer_start."
            )
        texts.append(text)
    return Example(str(row["id"]), row["question"], context, tuple(texts))


def _checked(dataset: Dataset) -> Dataset:
    len(dataset)
    return dataset
