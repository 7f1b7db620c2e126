"""From logits to answers: the n-best and null-score rule of SQuAD 2.0 (google-research/bert, run_squad.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bert_evaluation.squad.dataset import Example
from bert_evaluation.squad.windows import Window

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class AnswerRule:
    """How an answer is chosen. It is empty where null score - best span score is above `null_threshold`."""

    null_threshold: float = 0.0
    n_best: int = 20
    max_answer_length: int = 30


@dataclass(frozen=True)
class Span:
    """The best span of one window, in characters of the passage, its score, and the window's null score."""

    example: int
    start: int
    end: int
    score: float
    null_score: float


@dataclass(frozen=True)
class Answer:
    """An answer, with the best span whether it was given or not, and null score - best span score."""

    text: str
    span: str
    null_odds: float

    @property
    def no_answer_probability(self) -> float:
        """The odds as a probability: above 0.5 where the null score is the higher one."""
        return float(1 / (1 + np.exp(-np.clip(self.null_odds, -700, 700))))


def best_span(window: Window, start: Logits, end: Logits, rule: AnswerRule) -> Span:
    """The best pair among the `n_best` starts and ends of one window; `start` and `end` are its logits."""
    start, end = start[: len(window)], end[: len(window)]
    null_score = float(start[window.no_answer]) + float(end[window.no_answer])
    starts, ends = (np.argsort(-logits, kind="stable")[: rule.n_best] for logits in (start, end))
    starts = starts[(starts >= window.first) & (starts <= window.last)]
    ends = ends[(ends >= window.first) & (ends <= window.last)]
    lengths = ends[None, :] - starts[:, None] + 1
    scores = start[starts][:, None].astype(np.float64) + end[ends][None, :]
    scores = np.where((lengths >= 1) & (lengths <= rule.max_answer_length), scores, -np.inf)
    if scores.size == 0 or not (best := scores.max()) > -np.inf:
        return Span(window.example, 0, 0, float("-inf"), null_score)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    first, last = starts[row] - window.first, ends[column] - window.first
    return Span(window.example, int(window.offsets[first, 0]), int(window.offsets[last, 1]), float(best), null_score)


def choose(example: Example, spans: Sequence[Span], rule: AnswerRule) -> Answer:
    """The answer of one example from the spans of its windows. Its null score is the lowest over them."""
    best = max(spans, key=lambda span: span.score)
    odds = min(span.null_score for span in spans) - best.score
    text = example.context[best.start : best.end]
    # "not <=" so that logits that are not numbers abstain
    return Answer("" if not odds <= rule.null_threshold else text, text, float(odds))
