"""Quality on a data set: several models answer the same questions, taking turns, so that their speeds compare too."""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Protocol

from torch import nn

from bert_evaluation.answering import BatchResult, Reader, cheapest_batching, device_of
from bert_evaluation.device import give_back_memory
from bert_evaluation.errors import UsageError
from bert_evaluation.squad.answers import Answer, AnswerRule, Span, choose
from bert_evaluation.squad.batches import Batching, batches, padded
from bert_evaluation.squad.dataset import Dataset, Example
from bert_evaluation.squad.scores import Column, Judged, Row, judge
from bert_evaluation.squad.windows import Window, Windowing, windows
from bert_evaluation.stats import Ratio, speedup
from bert_evaluation.streams import Streams, default_streams

# Questions that are in memory at a time. Large enough for batches of like length, small beside a model.
CHUNK = 1024
TIDY = 16  # batches between two times that freed memory is given back


class Results(Protocol):
    """Where the results of batches are kept, by number of the batch."""

    def get(self, number: int) -> BatchResult | None:
        """The result, or None if there is none yet."""

    def put(self, number: int, result: BatchResult) -> None:
        """Keep a result."""


@dataclass(frozen=True)
class Work:
    """What an evaluation computed, and the seconds that each part of it took. Tokens of padding are computed too.

    Seconds of model and extraction are those of all batches, divided by the streams that worked at once.
    """

    streams: int = 1
    tokens: int = 0
    padding: int = 0
    tokenise: float = 0.0
    model: float = 0.0
    extract: float = 0.0
    score: float = 0.0

    def with_batches(self, groups: Collection[Sequence[Window]], tokenise: float) -> "Work":
        """With these batches too, which it took `tokenise` seconds to make."""
        tokens = sum(len(window) for group in groups for window in group)
        padding = sum(map(padded, groups)) - tokens
        return replace(
            self,
            tokens=self.tokens + tokens,
            padding=self.padding + padding,
            tokenise=self.tokenise + tokenise,
        )

    @property
    def padding_share(self) -> float:
        """The share of padding in what the model computed."""
        return self.padding / (self.tokens + self.padding) if self.tokens else 0.0


@dataclass(frozen=True)
class Evaluation:
    """Scores (the official keys, in percent), the answers by question id, their judgement, and the time it took.

    The best thresholds among the scores are over the best spans, given or not, and so is `judged`, whose probability is
    the null odds; `by_question` is exact match and F1 (0 to 1) of the answers. Both are in the data set's order.
    `times` are the session and the seconds of each batch.
    """

    scores: Mapping[str, float]
    details: Mapping[str, Answer]
    judged: Judged
    by_question: tuple[Column, Column]
    times: tuple[tuple[int, float], ...]
    work: Work

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
    def seconds(self) -> tuple[float, ...]:
        """Seconds of each batch: forward pass, its inputs, and answer extraction."""
        return tuple(seconds for _, seconds in self.times)

    @property
    def samples_per_second(self) -> float:
        """Questions a second, of model and answer extraction."""
        return len(self.details) * self.work.streams / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, padding left out."""
        return self.work.tokens * self.work.streams / sum(self.seconds)

    @property
    def latency(self) -> float:
        """Milliseconds a question."""
        return 1000 / self.samples_per_second

    def speedup(self, base: "Evaluation") -> Ratio | None:
        """How many times faster than `base`, by the batches that both ran in the same session; None if there is none.

        Times of different sessions do not pair: the machine may have been another, or busier.
        """
        pairs = [(one, other) for one, other in zip(base.times, self.times, strict=True) if one[0] == other[0]]
        if not pairs:
            return None
        return speedup([one for (_, one), _ in pairs], [other for _, (_, other) in pairs])


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    rule: AnswerRule = AnswerRule(),  # noqa: B008  # frozen
    windowing: Windowing = Windowing(),  # noqa: B008
    batch_size: int | None = None,
    batching: Batching | None = None,
    streams: int | None = None,
) -> Evaluation:
    """Answer every question with one model or graph, and score the answers.

    Windows are batched by tokens, so many as measuring finds cheapest, unless `batch_size` (in windows) or `batching`
    says otherwise; `streams` batches are answered at once, by default one a thread of a CPU.
    """
    reader = Reader(model, tokenizer, rule)
    batching = batching or (
        Batching(size=batch_size) if batch_size is not None else measured(reader, dataset, windowing, streams)
    )
    return evaluate_together({"model": reader}, dataset, batching, windowing, streams=streams)["model"]


def measured(reader: Reader, dataset: Dataset, windowing: Windowing, streams: int | None = None) -> Batching:
    """The batching that is cheapest for this reader, measured on the data set's first questions."""
    cut = windows(reader.tokenizer, list(islice(dataset.examples, CHUNK)), windowing)
    return cheapest_batching(reader, cut, streams or default_streams(device_of(reader.model)))


def evaluate_together(
    readers: Mapping[str, Reader],
    dataset: Dataset,
    batching: Batching,
    windowing: Windowing = Windowing(),  # noqa: B008
    results: Mapping[str, Results] | None = None,
    streams: int | None = None,
    session: int = 0,
    seed: int = 0,
    on_questions: Callable[[str, float], None] = lambda name, count: None,
) -> dict[str, Evaluation]:
    """Answer every question with each reader: the same batches, in a new random order of readers for each batch.

    Questions are tokenised once for all readers, 1,024 at a time, outside of what is timed; their windows are batched
    by length. `results` may hold results of batches by number, which are then not computed again, and takes those that
    are. Batches depend on the arguments only, so a run that is cut off and taken up ends like one that was not.
    `streams` batches are answered at once (see `streams.default_streams`). `on_questions` is told of the share of
    questions done, by reader. Raises UsageError for less than one stream.
    """
    if streams is not None and streams < 1:
        raise UsageError(f"{streams} streams answer nothing; give at least 1.")
    streams = streams or default_streams(device_of(next(iter(readers.values())).model))
    kept: Mapping[str, Results] = results or dict.fromkeys(readers, _Nowhere())
    tables = {name: _Table(reader.rule, streams) for name, reader in readers.items()}
    tokenizer = next(iter(readers.values())).tokenizer
    order, numbers, cold, work = random.Random(seed), count(), set(readers), Work()  # noqa: S311
    with Streams(streams) as workers:

        def read(group: list[Window], names: Sequence[str]) -> dict[str, BatchResult]:
            return {name: readers[name].read(group, session) for name in names if not workers.stopped.is_set()}

        for chunk in _chunks(dataset.examples):
            start = time.perf_counter()
            groups = dict(zip(numbers, batches(windows(tokenizer, chunk, windowing), batching)))  # noqa: B905
            work = work.with_batches(groups.values(), time.perf_counter() - start)
            known = {number: {name: kept[name].get(number) for name in readers} for number in groups}
            tasks = [
                (groups[number], [name for name in order.sample(list(found), len(found)) if found[name] is None])
                for number, found in known.items()
            ]
            for group, names in tasks:
                read(group, sorted(cold.intersection(names)))  # to warm up
                cold.difference_update(names)
            windows_of = Counter(window.example for group in groups.values() for window in group)
            spans = {name: [list[Span]() for _ in chunk] for name in readers}
            for (number, group), new in zip(groups.items(), workers.map(lambda task: read(*task), tasks), strict=True):
                share = sum(1 / windows_of[window.example] for window in group)
                for name, computed in new.items():
                    kept[name].put(number, computed)
                for name, result in (known[number] | new).items():
                    assert result is not None
                    for span in result.spans:
                        spans[name][span.example].append(span)
                    tables[name].take(result)
                    on_questions(name, share)
                if number % TIDY == 0:
                    give_back_memory()
            for name, table in tables.items():
                table.answer(chunk, spans[name])
    return {name: table.evaluation(work) for name, table in tables.items()}


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rest = iter(examples)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


class _Nowhere:
    """For results that nobody wants to keep."""

    def get(self, number: int) -> BatchResult | None:  # noqa: ARG002
        return None

    def put(self, number: int, result: BatchResult) -> None:
        pass


class _Table:
    """The answers of one reader as they come, and their scores at the end."""

    def __init__(self, rule: AnswerRule, streams: int) -> None:
        self.rule, self.streams = rule, streams
        self.answers: dict[str, Answer] = {}
        self.rows: list[Row] = []
        self.times: list[tuple[int, float]] = []
        self.model = self.score = 0.0

    def take(self, result: BatchResult) -> None:
        """Take note of the time that a batch took."""
        self.times.append((result.session, result.seconds))
        self.model += result.model_seconds

    def answer(self, chunk: Sequence[Example], spans: Sequence[Sequence[Span]]) -> None:
        """Choose the answers of a chunk, and judge its best spans."""
        start = time.perf_counter()
        for example, found in zip(chunk, spans, strict=True):
            chosen = choose(example.context, found, self.rule)
            self.answers[example.id] = chosen
            self.rows.append(judge(example, chosen.span, chosen.null_odds))
        self.score += time.perf_counter() - start

    def evaluation(self, work: Work) -> Evaluation:
        """The scores of what was answered. The best spans, dropped above the threshold, are the answers."""
        start = time.perf_counter()
        judged, threshold = Judged.of(self.rows), self.rule.null_threshold
        scores = judged.averages(threshold) | judged.best_thresholds()
        extract = sum(seconds for _, seconds in self.times) - self.model
        work = replace(
            work,
            streams=self.streams,
            model=self.model / self.streams,
            extract=extract / self.streams,
            score=self.score + time.perf_counter() - start,
        )
        return Evaluation(scores, self.answers, judged, judged.final(threshold), tuple(self.times), work)
