"""From logits to answers: the n-best and null-score rule of SQuAD 2.0 (google-research/bert, run_squad.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bert_evaluation.errors import UsageError
from bert_evaluation.squad.windows import Window

Logits = NDArray[np.float32]
NONE = float("-inf")  # the score of a span where there is none


@dataclass(frozen=True)
class AnswerRule:
    """How an answer is chosen. It is empty where null score - best span score is above `null_threshold`."""

    null_threshold: float = 0.0
    n_best: int = 20
    max_answer_length: int = 30

    def __post_init__(self) -> None:
        if self.n_best < 1 or self.max_answer_length < 1:
            raise UsageError("An answer is chosen from at least 1 best and has at least 1 token.")


class Span(NamedTuple):
    """The best span of one window, in characters of the passage, its score, the next best's, and the null score."""

    example: int
    start: int
    end: int
    score: float
    next_score: float
    null_score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, with the best span whether it was given or not, and how clear the choice was, in logits.

    `null_odds` is null score - best span score; `gap` is best span score - the next best's, at another place; `margin`
    is by how much those scores must change for another answer: from the threshold, and if not empty from the next best.
    """

    text: str
    span: str
    score: float
    null_odds: float
    gap: float
    margin: float

    @property
    def no_answer_probability(self) -> float:
        """The null odds as a probability: above 0.5 where the null score is the higher one."""
        return probability(self.null_odds)


def probability(odds: float) -> float:
    """Odds in logits as a probability."""
    return float(1 / (1 + np.exp(-np.clip(odds, -700, 700))))


def best_spans(group: Sequence[Window], start: Logits, end: Logits, rule: AnswerRule, in_front: bool) -> list[Span]:
    """The best pair among the `n_best` starts and ends of each window. `start`, `end`: its logits, (window, position).

    `in_front` says on which side the windows are padded.
    """
    length, first, last, null = (
        np.array(column)[:, None]
        for column in zip(*((len(each), each.first, each.last, each.no_answer) for each in group), strict=True)
    )
    position = np.arange(start.shape[1])[None, :]
    if in_front:
        aligned = (position + start.shape[1] - length) % start.shape[1]
        start, end = (np.take_along_axis(logits, aligned, axis=1) for logits in (start, end))
    null_start, null_end = (
        np.take_along_axis(logits, null, axis=1)[:, 0].astype(np.float64) for logits in (start, end)
    )
    null_scores = null_start + null_end
    (starts, start_scores), (ends, end_scores) = (
        _best(np.where(position < length, logits, NONE), rule.n_best) for logits in (start, end)
    )
    tokens = ends[:, None, :] - starts[:, :, None] + 1
    in_passage = ((starts >= first) & (starts <= last))[:, :, None] & ((ends >= first) & (ends <= last))[:, None, :]
    allowed = in_passage & (tokens >= 1) & (tokens <= rule.max_answer_length)
    scores = np.where(allowed, start_scores[:, :, None] + end_scores[:, None, :], NONE).reshape(len(group), -1)
    row, best = np.arange(len(group)), scores.argmax(axis=1)
    best_scores = scores[row, best]
    scores[row, best] = NONE
    next_scores = scores.max(axis=1)
    spans = []
    for index, window in enumerate(group):
        begin = stop = 0
        score = float(best_scores[index])
        if score > NONE:
            one, other = divmod(int(best[index]), ends.shape[1])
            begin = int(window.offsets[starts[index, one] - window.first, 0])
            stop = int(window.offsets[ends[index, other] - window.first, 1])
        else:  # also for logits that are not numbers
            score = NONE
        spans.append(Span(window.example, begin, stop, score, float(next_scores[index]), float(null_scores[index])))
    return spans


def _best(logits: Logits, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places and values of the `count` largest of each row."""
    places = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return places, np.take_along_axis(logits, places, axis=1).astype(np.float64)


def choose(context: str, spans: Sequence[Span], rule: AnswerRule) -> Answer:
    """The answer of one example from the spans of its windows. Its null score is the lowest over them."""
    best = max(spans, key=lambda span: span.score)
    others = [span.score for span in spans if (span.start, span.end) != (best.start, best.end)]
    gap = best.score - max([*others, *(span.next_score for span in spans)])
    odds = min(span.null_score for span in spans) - best.score
    if np.isnan(odds) or best.score == NONE:
        return Answer("", "", NONE, float("inf"), float("inf"), float("inf"))
    text = context[best.start : best.end].strip()  # some tokens begin with the blank in front of a word
    if odds > rule.null_threshold:
        return Answer("", text, best.score, odds, gap, odds - rule.null_threshold)
    return Answer(text, text, best.score, odds, gap, min(rule.null_threshold - odds, gap))
