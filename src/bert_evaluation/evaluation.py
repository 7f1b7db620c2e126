"""Quality on a data set: several models answer the same questions, taking turns, so that their speeds compare too."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import timed
from bert_evaluation.squad.answers import Answer, AnswerRule, Span, best_span, choose
from bert_evaluation.squad.dataset import Dataset, Example
from bert_evaluation.squad.scores import score
from bert_evaluation.squad.windows import Window, Windowing, batch, windows

BATCH_SIZE = 8


@dataclass(frozen=True)
class Evaluation:
    """Scores (the official keys, in percent), the answers by question id, and the seconds of each batch.

    The best thresholds among the scores are over the best spans, given or not.
    """

    scores: Mapping[str, float]
    details: Mapping[str, Answer]
    seconds: tuple[float, ...]

    @property
    def exact(self) -> float:
        """Exact match in percent."""
        return self.scores["exact"]

    @property
    def f1(self) -> float:
        """F1 in percent."""
        return self.scores["f1"]

    @property
    def answers(self) -> dict[str, str]:
        """The answers by question id; empty where the model abstains."""
        return {each: answer.text for each, answer in self.details.items()}

    @property
    def samples_per_second(self) -> float:
        """Questions a second, of model and answer extraction."""
        return len(self.details) / sum(self.seconds)

    @property
    def latency(self) -> float:
        """Milliseconds a question."""
        return 1000 / self.samples_per_second


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    rule: AnswerRule = AnswerRule(),  # noqa: B008  # frozen
    windowing: Windowing = Windowing(),  # noqa: B008
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Answer every question with one model or graph, and score the answers."""
    return evaluate_together({"model": model}, tokenizer, dataset, rule, windowing, batch_size)["model"]


def evaluate_together(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    dataset: Dataset,
    rule: AnswerRule = AnswerRule(),  # noqa: B008
    windowing: Windowing = Windowing(),  # noqa: B008
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda total: None,
    on_windows: Callable[[int], None] = lambda count: None,
) -> dict[str, Evaluation]:
    """Answer every question with each model: the same batches, in a new random order of models for each batch.

    Windows are batched by length, the longest first. `on_start` is told how many there are, `on_windows` of those done.
    Raises UsageError for a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"A batch of {batch_size} holds nothing; give a batch size of at least 1.")
    cut = sorted(windows(tokenizer, dataset.examples, windowing), key=len, reverse=True)
    order = random.Random(seed)  # noqa: S311
    on_start(len(cut))
    spans = {name: [list[Span]() for _ in dataset.examples] for name in models}
    seconds = {name: list[float]() for name in models}
    padding = tokenizer.pad_token_id or 0
    with torch.inference_mode():
        for model in models.values():
            answer_batch(model, cut[:batch_size], padding, rule)
        for first in range(0, len(cut), batch_size):
            group = cut[first : first + batch_size]
            for name in order.sample(list(models), len(models)):
                took, found = timed(
                    lambda name=name, group=group: answer_batch(models[name], group, padding, rule),  # type: ignore[misc]
                    device_of(models[name]),
                )
                seconds[name].append(took)
                for span in found:
                    spans[name][span.example].append(span)
            on_windows(len(group))
    return {
        name: _scored(dataset, [choose(*pair, rule) for pair in zip(dataset.examples, spans[name], strict=True)], times)
        for name, times in seconds.items()
    }


def answer_batch(model: nn.Module, group: Sequence[Window], padding: int, rule: AnswerRule) -> list[Span]:
    """The best span of each window."""
    output = model(**batch(group, padding, model_inputs(model), device_of(model)))
    start, end = output["start_logits"].float().cpu().numpy(), output["end_logits"].float().cpu().numpy()
    return [best_span(window, start[row], end[row], rule) for row, window in enumerate(group)]


def answer(
    model: nn.Module,
    tokenizer: Any,
    question: str,
    context: str,
    rule: AnswerRule = AnswerRule(),  # noqa: B008
    windowing: Windowing = Windowing(),  # noqa: B008
) -> Answer:
    """The answer to one question."""
    example = Example("", question, context, ())
    with torch.inference_mode():
        spans = answer_batch(model, windows(tokenizer, [example], windowing), tokenizer.pad_token_id or 0, rule)
    return choose(example, spans, rule)


def model_inputs(model: nn.Module) -> tuple[str, ...]:
    """The names that a model or graph is called with."""
    return graphs.input_names(model) if isinstance(model, GraphModule) else tuple(text_inputs(model, 1, 1))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _scored(dataset: Dataset, answers: list[Answer], seconds: list[float]) -> Evaluation:
    details = {example.id: each for example, each in zip(dataset.examples, answers, strict=True)}
    scores = score(dataset, {each: found.text for each, found in details.items()})
    spans = {each: found.span for each, found in details.items()}
    odds = {each: found.null_odds for each, found in details.items()}
    best = score(dataset, spans, odds)
    scores |= {key: value for key, value in best.items() if key.startswith("best_")}
    return Evaluation(scores, details, tuple(seconds))
