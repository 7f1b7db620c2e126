"""Questions in SQuAD's form: read from its JSON file or from rows of a hub data set, checked, and sampled."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bert_evaluation.errors import DatasetError, UsageError


@dataclass(frozen=True)
class Example:
    """A question on a passage; `answers` are the accepted ones, none if it cannot be answered from the passage."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their source."""

    name: str
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)


def read_squad(file: str | Path) -> Dataset:
    """Read a file of SQuAD 1.1 or 2.0. Raises DatasetError if it is not there, not SQuAD, or has no questions."""
    path = Path(file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"There is no data set file {path}.") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); give a SQuAD 1.1 or 2.0 file.") from None
    try:
        rows = [
            {**question, "context": paragraph["context"]}
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        examples = tuple(_example(row, row["answers"], path.name) for row in rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is JSON but not SQuAD ({type(error).__name__}: {error}); it needs"
            " data / paragraphs / context, qas / id, question, answers / text, answer_start."
        ) from None
    return _checked(path.name, examples)


def from_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The data set of rows as the hub's `squad` and `squad_v2` have them. Raises DatasetError for other columns."""
    try:
        examples = []
        for row in rows:
            pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            examples.append(_example(row, [{"text": text, "answer_start": start} for text, start in pairs], name))
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"The data set {name} is not SQuAD ({type(error).__name__}: {error}); it needs the columns"
            " id, question, context, answers (text, answer_start)."
        ) from None
    return _checked(name, tuple(examples))


def sample(dataset: Dataset, samples: int | None, seed: int = 42) -> Dataset:
    """The examples that `datasets` selects by `shuffle(seed).select(range(samples))`; all, in order, for None.

    Raises UsageError for a number below 1 or above what there is.
    """
    if samples is None:
        return dataset
    if not 1 <= samples <= len(dataset):
        raise UsageError(f"{samples} samples were asked for; {dataset.name} has 1 to {len(dataset)}.")
    order = np.random.default_rng(seed).permutation(len(dataset))[:samples]
    return replace(dataset, examples=tuple(dataset.examples[index] for index in order))


def _example(row: Mapping[str, Any], answers: Iterable[Mapping[str, Any]], name: str) -> Example:
    context, texts = row["context"], []
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


def _checked(name: str, examples: tuple[Example, ...]) -> Dataset:
    if not examples:
        raise DatasetError(f"{name} holds no questions.")
    ids = [example.id for example in examples]
    if twice := next((each for each in set(ids) if ids.count(each) > 1), None) if len(set(ids)) < len(ids) else None:
        raise DatasetError(f"{name} holds more than one question with the id {twice}; ids must differ.")
    return Dataset(name, examples)
