"""Scores of SQuAD 1.1 and 2.0, with the keys and values of the official script (evaluate-v2.0.py)."""

import re
import string
from collections import Counter
from collections.abc import Mapping

from bert_evaluation.errors import DatasetError
from bert_evaluation.squad.dataset import Dataset, Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
    raw = {each.id: question_scores(each, predictions[each.id]) for each in dataset.examples}
    answerable = {each.id: bool(each.answers) for each in dataset.examples}
    if no_answer_probability is not None:
        _require(dataset, no_answer_probability, "probability of no answer")
    probability = no_answer_probability or dict.fromkeys(raw, 0.0)
    final = {
        each: (float(not answerable[each]),) * 2 if probability[each] > no_answer_threshold else scores
        for each, scores in raw.items()
    }
    result = _averages(list(final.values()))
    for prefix, kind in (("HasAns", True), ("NoAns", False)):
        if part := [scores for each, scores in final.items() if answerable[each] is kind]:
            result |= {f"{prefix}_{key}": value for key, value in _averages(part).items()}
    if no_answer_probability is not None:
        order = sorted((each for each in no_answer_probability if each in raw), key=no_answer_probability.__getitem__)
        for index, name in enumerate(("exact", "f1")):
            gains = [raw[each][index] if answerable[each] else -float(bool(predictions[each])) for each in order]
            best, threshold = _best_threshold(gains, [no_answer_probability[each] for each in order])
            unanswerable = sum(not kind for kind in answerable.values())
            result |= {f"best_{name}": 100 * (unanswerable + best) / len(raw), f"best_{name}_thresh": threshold}
    return result


def _averages(scores: list[tuple[float, float]]) -> dict[str, float]:
    exact, f1 = (100 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return {"exact": exact, "f1": f1, "total": len(scores)}


def _best_threshold(gains: list[float], probabilities: list[float]) -> tuple[float, float]:
    """Answer nothing, then one question more at a time, least likely unanswerable first: the best sum, and where."""
    total = best = threshold = 0.0
    for gain, probability in zip(gains, probabilities, strict=True):
        total += gain
        if total > best:
            best, threshold = total, probability
    return best, threshold


def _require(dataset: Dataset, values: Mapping[str, object], what: str) -> None:
    missing = [each.id for each in dataset.examples if each.id not in values]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DatasetError(f"{len(missing)} of {len(dataset)} questions have no {what}: {some}")
