"""One model answers windows: the forward pass, and the spans that its logits say. Also, how many at once pays."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.device import synchronize
from bert_evaluation.graph import GraphModule
from bert_evaluation.squad.answers import Answer, AnswerRule, Logits, Span, best_spans, choose
from bert_evaluation.squad.batches import Batching, batches, padded, tensors
from bert_evaluation.squad.dataset import Example
from bert_evaluation.squad.windows import Window, Windowing, question_first, windows
from bert_evaluation.streams import Streams

# Tokens of a batch that a CPU was measured to be near its best with. It is used where there is too little to measure.
TOKENS = 1024
SIZES, ROUNDS, WORTH = (512, 1024, 2048), 2, 0.05
ENOUGH = 10 * (1 + ROUNDS) * sum(SIZES)  # tokens of which measuring reads a tenth


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a model made of one batch: the spans of its windows, seconds in all and of the forward pass alone.

    `session` says which run computed it: times of one session compare, those of two do not.
    """

    spans: tuple[Span, ...]
    seconds: float
    model_seconds: float
    session: int = 0


@dataclass(frozen=True)
class Reader:
    """A model or graph, with what is needed to put windows to it."""

    model: nn.Module
    tokenizer: Any
    rule: AnswerRule

    @torch.inference_mode()
    def read(self, group: Sequence[Window], session: int = 0) -> BatchResult:
        """Answer one batch."""
        model, in_front = self.model, not question_first(self.tokenizer)
        device = device_of(model)
        synchronize(device)
        start = time.perf_counter()
        inputs = tensors(group, self.tokenizer.pad_token_id or 0, model_inputs(model), device, in_front)
        synchronize(device)
        before = time.perf_counter()
        output = model(**inputs)
        synchronize(device)
        after = time.perf_counter()
        start_logits, end_logits = _numbers(output["start_logits"]), _numbers(output["end_logits"])
        spans = best_spans(group, start_logits, end_logits, self.rule, in_front)
        return BatchResult(tuple(spans), time.perf_counter() - start, after - before, session)


def _numbers(logits: torch.Tensor) -> Logits:
    found: Logits = logits.float().cpu().numpy()
    return found


def answer(
    model: nn.Module,
    tokenizer: Any,
    question: str,
    context: str,
    rule: AnswerRule = AnswerRule(),  # noqa: B008  # frozen
    windowing: Windowing = Windowing(),  # noqa: B008
) -> Answer:
    """The answer to one question."""
    cut = windows(tokenizer, [Example("", question, context, ())], windowing)
    return choose(context, Reader(model, tokenizer, rule).read(cut).spans, rule)


def cheapest_batching(reader: Reader, cut: Sequence[Window], streams: int = 1) -> Batching:
    """The smallest number of tokens a batch at which a token costs within 5 % of the least, measured on these windows.

    `streams` batches are read at once, as they will be. Beyond 2,048 sizes double for as long as that gains 5 %. 1,024
    where there are too few windows for measuring to pay.
    """
    total = sum(len(window) for window in cut)
    if total < ENOUGH:
        return Batching(tokens=TOKENS)
    costs = _costs(reader, cut, SIZES, streams)
    largest = SIZES[-1]
    while 16 * largest < total:
        # Side by side, since the machine may be slower by now.
        pair = _costs(reader, cut, (largest, 2 * largest), streams)
        if pair[2 * largest] > (1 - WORTH) * pair[largest]:
            break
        largest *= 2
        costs = {size: cost * pair[largest // 2] / costs[largest // 2] for size, cost in costs.items()} | pair
    least = min(costs.values())
    return Batching(tokens=min(size for size, cost in costs.items() if cost <= (1 + WORTH) * least))


def _costs(reader: Reader, cut: Sequence[Window], sizes: Sequence[int], streams: int) -> dict[int, float]:
    """Seconds a token of batches of `sizes` tokens, made of windows of middling length; the best of a few rounds."""
    longer_half = sorted(cut, key=len)[len(cut) // 2 :]
    groups = {}
    for size in sizes:
        fitting = longer_half[: max(1, size // len(longer_half[0]))]
        groups[size] = next(batches(fitting, Batching(tokens=size)))
    order, costs = random.Random(0), dict.fromkeys(sizes, float("inf"))  # noqa: S311
    with Streams(streams) as workers:
        for round_ in range(1 + ROUNDS):
            for size in order.sample(list(sizes), len(sizes)):
                found = list(workers.map(reader.read, [groups[size]] * streams))
                if round_:  # the first warms up
                    cost = sum(result.seconds for result in found) / padded(groups[size])
                    costs[size] = min(costs[size], cost)
    return costs


def model_inputs(model: nn.Module) -> tuple[str, ...]:
    """The names that a model or graph is called with."""
    return graphs.input_names(model) if isinstance(model, GraphModule) else tuple(text_inputs(model, 1, 1))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
