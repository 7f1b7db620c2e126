"""Calibration: what nodes of a graph compute on a few real inputs, so that a transformation knows what they matter."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from bert_evaluation import builtin
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import CHECKPOINT
from bert_evaluation.checkpoints import load_dataset, load_tokenizer
from bert_evaluation.errors import BertEvaluationError, CalibrationError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.signature import MASK
from bert_evaluation.squad.batches import Batching, batches, tensors
from bert_evaluation.squad.dataset import Dataset, sample
from bert_evaluation.squad.windows import question_first, windows

CALIBRATION = "bert_evaluation.calibration"  # key in GraphModule.meta: a Calibration
QUESTIONS, SEED = 16, 0  # of the built-in data set: 128 choose 26 of 28 heads that these choose, of budgets 0.1 and 0.3
BATCHING = Batching(size=8)

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs by their names, and the ids of the questions that they were made of, if they were."""

    batches: tuple[Inputs, ...]
    questions: frozenset[str] = frozenset()


def from_questions(tokenizer: Any, dataset: Dataset, names: Iterable[str]) -> Calibration:
    """All questions of a data set, tokenised for the inputs `names`; small data sets only. Deterministic."""
    examples, names = list(dataset.examples), tuple(names)
    padding, in_front = tokenizer.pad_token_id or 0, not question_first(tokenizer)
    groups = batches(windows(tokenizer, examples), BATCHING)
    made = tuple(tensors(group, padding, names, torch.device("cpu"), in_front) for group in groups)
    return Calibration(made, frozenset(example.id for example in examples))


def calibrate(graph: GraphModule, calibration: Calibration) -> GraphModule:
    """Let the transformations of this graph, and of its forks, calibrate with these inputs; returns the graph."""
    graph.meta[CALIBRATION] = calibration
    return graph


def calibration_of(graph: GraphModule) -> Calibration:
    """What `calibrate` gave the graph, or else built-in questions, tokenised as its checkpoint does.

    Raises CalibrationError where neither is to be had: random tokens would say nothing about texts.
    """
    if (given := graph.meta.get(CALIBRATION)) is not None:
        assert isinstance(given, Calibration)
        return given
    if CHECKPOINT not in graph.meta:
        raise CalibrationError(
            "There is no text to calibrate with: the graph is of no checkpoint; give it inputs with calibrate."
        )
    name, longest = graph.meta[CHECKPOINT]
    return _built_in(name, longest, graphs.input_names(graph))


@cache
def _built_in(checkpoint: str, longest: int, names: tuple[str, ...]) -> Calibration:
    try:
        tokenizer = load_tokenizer(checkpoint, longest)
    except BertEvaluationError as error:
        raise CalibrationError(f"There is no text to calibrate with: {error}") from error
    return from_questions(tokenizer, sample(load_dataset(builtin.NAME), QUESTIONS, SEED), names)


def activations(
    graph: GraphModule, nodes: Iterable[Node], batches: Iterable[Inputs]
) -> Iterator[tuple[Inputs, dict[Node, Tensor]]]:
    """Run a graph on each batch, and yield that with what the nodes returned there. No gradients are kept.

    Raises CalibrationError for a batch that lacks an input of the graph.
    """
    wanted, names = frozenset(nodes), graphs.input_names(graph)
    device = next((tensor.device for tensor in graphs.tensors(graph).values()), torch.device("cpu"))
    for batch in batches:
        if missing := [name for name in names if name not in batch]:
            raise CalibrationError(f"What was given to calibrate with lacks the input {missing[0]}.")
        inputs = {name: batch[name].to(device) for name in names}
        yield inputs, _recorded(graph, wanted, inputs)


@torch.no_grad()
def _recorded(graph: GraphModule, wanted: frozenset[Node], inputs: Inputs) -> dict[Node, Tensor]:
    recorder = _Recorder(graph, wanted)
    recorder.run(*inputs.values(), enable_io_processing=False)
    return recorder.values


def at_tokens(tensor: Tensor, inputs: Inputs) -> Tensor:
    """What a tensor (batch, length, ..., width) has at real tokens: (tokens, ..., width); all where none is padding.

    A tensor of other positions than the mask has, such as one that is packed, is taken whole.
    """
    mask = inputs.get(MASK)
    fits = mask is not None and tensor.dim() > 2 and mask.shape == tensor.shape[:2]
    return tensor[mask.bool()] if mask is not None and fits else tensor.flatten(0, -2)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what the wanted nodes returned."""

    def __init__(self, graph: GraphModule, wanted: frozenset[Node]) -> None:
        super().__init__(graph)
        self._wanted, self.values = wanted, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted:
            # What writes in place later would write here too.
            self.values[n] = value.clone() if graphs.writer(n) is not None else value
        return value
