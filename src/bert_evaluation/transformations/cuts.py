"""Cuts: rows and columns of linears are taken out, and the sizes of what lies between follow."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformations.keeping import Kept
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias
from bert_evaluation.transformations.written_attention import VIEWS


def cut_rows(graph: GraphModule, linear: Node, rows: Iterable[int]) -> Kept:
    """Take rows out of a linear's weight and bias."""
    kept, places = Kept(), list(rows)
    for parameter in weight_and_bias(linear):
        if parameter is not None:
            kept |= _replaced(graph, str(parameter.target), _without(tensor_of(parameter), 0, places))
    return kept


def cut_columns(graph: GraphModule, linear: Node, columns: Sequence[int], mean: Tensor) -> Kept:
    """Take columns out of a linear's weight; what they add to its result on average goes into its bias."""
    weight, bias = weight_and_bias(linear)
    assert bias is not None
    gone, before = tensor_of(weight).detach()[:, list(columns)], tensor_of(bias).detach()
    after = (before.double() + gone.double() @ mean).to(before.dtype)
    return _replaced(graph, str(weight.target), _without(tensor_of(weight), 1, columns)) | _replaced(
        graph, str(bias.target), after
    )


def resize(node: Node, axis: int, size: int) -> None:
    """Say that a node's result has another size at an axis, also in the arguments of a view."""
    value = node.meta["val"]
    node.meta["val"] = value.new_empty((*value.shape[:axis], size, *value.shape[axis + 1 :]))
    if node.target in VIEWS:
        sizes = list(node.args[1])  # type: ignore[arg-type]
        sizes[axis] = sizes[axis] if sizes[axis] == -1 else size
        node.args = (node.args[0], sizes)


def _replaced(graph: GraphModule, name: str, tensor: Tensor) -> Kept:
    """Put a tensor in the place of the one of this name, which is returned."""
    before = graphs.get_tensor(graph, name)
    assert before is not None
    graphs.set_tensor(graph, name, graphs.like(tensor, before))
    for node in graph.graph.find_nodes(op="get_attr"):
        if node.target == name:
            graphs.propagate(node)
    return {name: before}


def _without(tensor: Tensor, axis: int, places: Iterable[int]) -> Tensor:
    stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stays[list(places)] = False
    return tensor.detach().index_select(axis, stays.nonzero().flatten().to(tensor.device))
