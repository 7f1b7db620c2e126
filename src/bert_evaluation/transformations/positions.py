"""Operators that treat each position of (batch, length, width) by itself, known by their names and arguments."""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from bert_evaluation import float8, kernels, onednn, tanh_gelu
from bert_evaluation import graph as graphs
from bert_evaluation.graph import Node

aten = torch.ops.aten
Size = int | str
LINEARS = (
    aten.linear.default,
    onednn.POINTWISE,
    onednn.BINARY,
    kernels.LINEAR,
    float8.LINEAR,
    tanh_gelu.LINEAR_GELU,
)
PAIRS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
ELEMENTWISE = (
    *(activation.operator for activation in onednn.ACTIVATIONS),
    aten.erf.default,
    aten.exp.default,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.mul.Scalar,
    aten.rsub.Scalar,
    aten.reciprocal.default,
    aten.to.dtype,
    aten._assert_tensor_metadata.default,
)
COPIES = (aten.contiguous.default, aten.clone.default)
Check = Callable[[Node], bool]


def _along(place: int) -> Check:
    """Whether the argument in this place says the last of three dimensions."""
    return lambda node: len(node.args) > place and node.args[place] in (-1, 2)


def _lists(length: int) -> Check:
    """Whether the second argument is a list of this many numbers."""
    return lambda node: isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == length


_CUTS: dict[Any, Check] = {
    aten.split.Tensor: _along(2),
    aten.split_with_sizes.default: _along(2),
    aten.chunk.default: _along(2),
    aten.slice.Tensor: _along(1),
    operator.getitem: lambda node: _is_list(node.args[0]),
}
_POSITION_WISE: dict[Any, Check] = (
    dict.fromkeys((*LINEARS, kernels.LINEARS, *PAIRS, *ELEMENTWISE, *COPIES), lambda _: True)
    | _CUTS
    | {
        float8.ROWS: lambda _: True,
        aten.dropout.default: lambda node: node.args[2] is False,
        aten.layer_norm.default: _lists(1),
        aten.constant_pad_nd.default: _lists(2),
    }
)
_CLOSING: dict[Any, Check] = _CUTS | {aten.squeeze.dim: _along(1), aten.select.int: _along(1)}


def shapes(node: Node) -> list[tuple[Size, ...]]:
    """The shapes of the tensors that a node returns, dynamic sizes by their names."""
    values = graphs.output_tensors(node.meta.get("val"))
    return [tuple(size if isinstance(size, int) else str(size) for size in value.shape) for value in values]


def shape(node: Node) -> tuple[Size, ...]:
    """The shape of the one tensor that a node returns; empty for any other node."""
    found = shapes(node)
    return found[0] if len(found) == 1 else ()


def is_position_wise(node: Node) -> bool:
    """Whether the node's operator treats each position of its tensors by itself."""
    return node.target in _POSITION_WISE and _POSITION_WISE[node.target](node)


def why_not_position_wise(node: Node, packed: Collection[Node]) -> str | None:
    """Why the node is more than a function of the same position of each of these tensors, if it is."""
    if not is_position_wise(node):
        return f"{node.name} ({node.target}) is not known to treat each position by itself."
    if node.target in (*LINEARS, kernels.LINEARS):
        added = {onednn.BINARY: 1, kernels.LINEAR: 6, kernels.LINEARS: 4, float8.LINEAR: 1}.get(
            node.target
        )  # the argument that is, too
        tensors = [each for place, each in enumerate(node.args) if place in (0, added) and each is not None]
        more = list[Node]()
        fx.map_arg([each for place, each in enumerate(node.args) if place not in (0, added)], more.append)
        if not all(each in packed for each in tensors) or any(each in packed for each in more):
            return f"{node.name} multiplies what is computed for each token with another such tensor."
        return None
    for each in node.all_input_nodes:
        if each not in packed and any(size != 1 for size in shape(each)[:-1]):
            return f"{node.name} reads {each.name}, which may differ between positions and does not depend on the same."
    return None


def closing(nodes: Collection[Node]) -> set[Node]:
    """Those of these nodes that cut results along their last dimension for the output, and for nothing else."""
    found = set[Node]()
    for node in reversed(list(nodes)):
        cuts = node.target in _CLOSING and _CLOSING[node.target](node) and _is_deep(node.args[0])
        if (cuts or node.target in COPIES) and all(user in found or user.op == "output" for user in node.users):
            found.add(node)
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), (list, tuple))


def _is_deep(value: object) -> bool:
    return isinstance(value, Node) and all(len(each) == 3 for each in shapes(value))
