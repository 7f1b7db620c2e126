"""Memory that a graph needs: its weights, and what a call holds at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node


@dataclass(frozen=True)
class Memory:
    """Bytes: of the tensors that a graph reads, and of those and all that a call holds at its fullest moment.

    The second is counted between operators: what one takes for itself while it works is not in it.
    """

    weights: int
    peak: int


@torch.inference_mode()
def memory(graph: GraphModule, inputs: Mapping[str, Tensor]) -> Memory:
    """Count, tensor by tensor, what a call of `graph` with these inputs (by keyword) holds.

    It is counted rather than read from the system, so it is the same in every run, whatever an allocator keeps.
    """
    stored = dict[int, int]()
    for name in graphs.read_names(graph):
        _note(graphs.get_tensor(graph, name), stored)
    weights = sum(stored.values())
    count = _Count(graph, stored)
    count.run(*(inputs[name] for name in graphs.input_names(graph)))
    return Memory(weights, weights + count.fullest)


class _Count(fx.Interpreter):
    """Runs a graph, forgets each value after its last use, and notes the most bytes of values alive at once."""

    def __init__(self, graph: GraphModule, stored: Mapping[int, int]) -> None:
        super().__init__(graph)
        self.stored, self.fullest = stored, 0

    def run_node(self, node: Node) -> Any:
        """Run one node, and count what is alive beside what is stored."""
        result = super().run_node(node)
        alive = dict[int, int]()
        for value in (*self.env.values(), result):
            _note(value, alive)
        self.fullest = max(self.fullest, sum(size for place, size in alive.items() if place not in self.stored))
        return result


def _note(value: Any, places: dict[int, int]) -> None:
    """Note the memory of every tensor in `value`, once where several share it."""
    for tensor in graphs.output_tensors(value):
        if tensor.is_mkldnn:  # a layout of oneDNN's own, which shows neither its address nor its size
            places[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            places[storage.data_ptr()] = storage.nbytes()
