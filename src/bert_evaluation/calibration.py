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
from bert_evaluation.squad.batches import Batching, batches, tensors
from bert_evaluation.squad.dataset import Dataset, sample
from bert_evaluation.squad.windows import question_first, windows

CALIBRATION = "bert_evaluation.calibration"  # key in GraphModule.meta: a Calibration
QUESTIONS, SEED = 32, 0  # of the built-in data set; more changed few of the units that were pruned
BATCHING = Batching(size=8)
MASK = "attention_mask"

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
    graph: GraphModule, nodes: Iterable[Node], inputs: Iterable[Inputs]
) -> Iterator[tuple[Inputs, dict[Node, Tensor]]]:
    """Run a graph on each of `inputs`, and yield that with what the nodes returned there."""
    wanted, device = frozenset(nodes), next((tensor.device for tensor in graphs.tensors(graph).values()), None)
    for each in inputs:
        there = {name: tensor.to(device) for name, tensor in each.items()}
        yield there, _Recorder(graph, wanted).record(there)


def at_tokens(tensor: Tensor, inputs: Inputs) -> Tensor:
    """What a tensor (batch, length, ...) has at real tokens: (tokens, ...). All, where there is no mask or no padding."""
    mask = inputs.get(MASK)
    return tensor[mask.bool()] if mask is not None and mask.shape == tensor.shape[:2] else tensor.flatten(0, 1)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what the wanted nodes returned."""

    def __init__(self, graph: GraphModule, wanted: frozenset[Node]) -> None:
        super().__init__(graph)
        self._wanted, self._values = wanted, dict[Node, Tensor]()

    @torch.no_grad()
    def record(self, inputs: Inputs) -> dict[Node, Tensor]:
        names = graphs.input_names(self.module)
        self.run(*(inputs[name] for name in names), enable_io_processing=False)
        return self._values

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted:
            # What writes in place later would write here too.
            self._values[n] = value.clone() if graphs.writer(n) is not None else value
        return value
