"""Undoing what no arithmetic undoes: the tensors as they were are kept."""

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule
from bert_evaluation.transformation import ReversibleTransformation

Kept = dict[str, Tensor]


class KeepsTensors(ReversibleTransformation):
    """A transformation whose `rewrite` returns, by name, the tensors that it replaced or reads no more."""

    def undo(self, graph: GraphModule, memo: Kept) -> None:
        """Put them back, on the device and in the type that their successors have now."""
        for name, tensor in memo.items():
            now = graphs.get_tensor(graph, name)
            back = tensor if now is None else graphs.like(tensor.to(now.device, now.dtype), tensor)
            graphs.set_tensor(graph, name, tensor if torch.equal(back, tensor) else back)
