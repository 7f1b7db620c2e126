"""Scores of SQuAD 1.1 and 2.0, with the keys and values of the official script (evaluate-v2.0.py)."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bert_evaluation.errors import DatasetError
from bert_evaluation.squad.dataset import Dataset, Example

Column = NDArray[np.float64]
Row = tuple[float, float, bool, bool, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(1 << 16)  # models answer alike, and accepted answers resemble each other
def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(accepted: str, answer: str) -> float:
    """1 if both are the same once normalised, else 0."""
    return float(normalize(accepted) == normalize(answer))


def token_f1(accepted: str, answer: str) -> float:
    """The harmonic mean of precision and recall over the words of both; where one has none, whether both have none."""
    gold, predicted = normalize(accepted).split(), normalize(answer).split()
    if not gold or not predicted:
        return float(gold == predicted)
    common = (Counter(gold) & Counter(predicted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def question_scores(example: Example, answer: str) -> tuple[float, float]:
    """Exact match and F1 of one answer, the best over the accepted ones; of none, the empty answer is right."""
    accepted = [text for text in example.answers if normalize(text)] or [""]
    return max(exact_match(text, answer) for text in accepted), max(token_f1(text, answer) for text in accepted)


def score(
    dataset: Dataset,
    predictions: Mapping[str, str],
    no_answer_probability: Mapping[str, float] | None = None,
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """Score `{question id: answer}`, in percent, as the official script does.

    Where the probability of no answer is above the threshold, the answer counts as empty. With probabilities, the
    thresholds that would have been best are found too. Ids that the data set does not have are ignored, as there.
    Raises DatasetError that names the questions without a prediction (or probability).
    """
    _require(dataset, predictions, "prediction")
    if no_answer_probability is not None:
        _require(dataset, no_answer_probability, "probability of no answer")
    odds = no_answer_probability or {}
    judged = Judged.of(judge(each, predictions[each.id], odds.get(each.id, 0.0)) for each in dataset.examples)
    result = judged.averages(no_answer_threshold)
    if no_answer_probability is not None:
        place = {each: index for index, each in enumerate(no_answer_probability)}
        # The official script breaks ties by the order of the probabilities' file.
        result |= judged.best_thresholds(np.array([place[example.id] for example in dataset.examples]))
    return result


def judge(example: Example, answer: str, probability: float = 0.0) -> Row:
    """One question's exact match and F1, whether it has an answer, whether it was given one, and the probability."""
    return *question_scores(example, answer), bool(example.answers), bool(answer), probability


@dataclass(frozen=True)
class Judged:
    """Answers held against the accepted ones, one entry a question; probabilities of no answer may be any number."""

    exact: Column
    f1: Column
    answerable: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    probability: Column

    @staticmethod
    def of(rows: Iterable[Row]) -> "Judged":
        """The columns of what `judge` found for each question."""
        exact, f1, answerable, answered, probability = map(np.array, zip(*rows, strict=True))
        return Judged(exact, f1, answerable, answered, probability.astype(np.float64))

    def final(self, threshold: float) -> tuple[Column, Column]:
        """Exact match and F1 of each question (0 to 1) if answers above this probability of no answer are dropped."""
        dropped = self.probability > threshold
        right = (~self.answerable).astype(np.float64)
        return np.where(dropped, right, self.exact), np.where(dropped, right, self.f1)

    def averages(self, threshold: float) -> dict[str, float]:
        """The official script's averages, in percent."""
        exact, f1 = self.final(threshold)
        result = _averages(exact, f1)
        for prefix, part in (("HasAns", self.answerable), ("NoAns", ~self.answerable)):
            if part.any():
                result |= {f"{prefix}_{key}": value for key, value in _averages(exact[part], f1[part]).items()}
        return result

    def best_thresholds(self, ties: NDArray[np.int64] | None = None) -> dict[str, float]:
        """The best averages that any threshold gives, and those thresholds: the lowest of equally good ones.

        Starts by answering nothing, then answers one question more at a time, least likely unanswerable first; `ties`
        orders those of the same probability (else their own order does).
        """
        order = np.lexsort((np.arange(len(self.exact)) if ties is None else ties, self.probability))
        result: dict[str, float] = {}
        for name, column in (("exact", self.exact), ("f1", self.f1)):
            gains = np.where(self.answerable, column, -self.answered.astype(np.float64))[order]
            totals = np.concatenate([[0.0], np.cumsum(gains)])
            best = int(totals.argmax())
            threshold = float(self.probability[order][best - 1]) if best else 0.0
            total = float((~self.answerable).sum() + totals[best])
            result |= {f"best_{name}": 100 * total / len(column), f"best_{name}_thresh": threshold}
        return result


def _averages(exact: Column, f1: Column) -> dict[str, float]:
    return {"exact": 100 * float(exact.mean()), "f1": 100 * float(f1.mean()), "total": len(exact)}


def _require(dataset: Dataset, values: Mapping[str, object], what: str) -> None:
    missing = [each.id for each in dataset.examples if each.id not in values]
    if missing:
        raise DatasetError(f"{len(missing)} of {len(dataset)} questions have no {what}: {some(missing)}.")


def some(ids: Sequence[str]) -> str:
    """A few of the ids, and a sign that there are more."""
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
