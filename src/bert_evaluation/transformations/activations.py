"""Functions of each element, known by what they compute, however they are written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bert_evaluation.graph import Node, get_tensor
from bert_evaluation.onednn import ACTIVATIONS, Activation

aten = torch.ops.aten
CURVED = (aten.erf.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default)
ARITHMETIC = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.neg.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
)
LARGEST = 16  # nodes that one activation is written with, at most
# Where functions are compared, and how near they have to be: the two GELUs are 5e-4 apart, and a constant may be
# written with seven digits.
PLACES, NEAR = torch.linspace(-8, 8, 257, dtype=torch.float64), 1e-6


@dataclass(frozen=True)
class Found:
    """An activation in a graph: the nodes that it is written with, first to last, and what it is applied to."""

    activation: Activation
    nodes: tuple[Node, ...]
    source: Node


def activations(nodes: Iterable[Node]) -> list[Found]:
    """Every activation among a graph's nodes, but for those that are a part of another."""
    found = [each for node in nodes if (each := activation_at(node)) is not None]
    inner = {node for each in found for node in each.nodes[:-1]}
    return [each for each in found if each.nodes[-1] not in inner]


def activation_at(node: Node) -> Found | None:
    """The activation whose result is this node's, as one operator or spelt out; None if there is none.

    What is spelt out is followed back to the one tensor that it is a function of, and computed in float64.
    """
    if node.op != "call_function":
        return None
    for activation in ACTIVATIONS:
        if node.target is activation.operator and isinstance(source := node.args[0], Node):
            variant = node.kwargs.get("approximate", "none") if activation.name == "gelu" else ""
            if variant == activation.variant:
                return Found(activation, (node,), source)
    if node.target not in ARITHMETIC:
        return None
    found = _function(node)
    if found is None:
        return None
    nodes, source = found
    values = _computed(nodes, source)
    for activation in ACTIVATIONS:
        expected: Tensor = activation.operator(PLACES, **activation.keywords)
        if values is not None and values.shape == PLACES.shape and bool(((values - expected).abs() <= NEAR).all()):
            return Found(activation, nodes, source)
    return None


def _function(node: Node) -> tuple[tuple[Node, ...], Node] | None:
    """The fewest nodes up to this one that are a curved function of a single node, and that node."""
    place = {each: number for number, each in enumerate(node.graph.nodes)}
    inside, border = {node}, set(_inputs(node))
    while border and len(inside) <= LARGEST:
        last = max(border, key=place.__getitem__)
        if border == {last} and any(each.target in CURVED for each in inside):
            return tuple(sorted(inside, key=place.__getitem__)), last
        if last.target not in (*ARITHMETIC, *CURVED):
            return None
        border.remove(last)
        inside.add(last)
        border.update(_inputs(last))
    return None


def _inputs(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if _constant(each) is None]


def _constant(node: Node) -> Tensor | None:
    """The stored number that a node reads, if it does."""
    graph = node.graph.owning_module
    tensor = get_tensor(graph, str(node.target)) if node.op == "get_attr" and graph is not None else None
    return tensor if tensor is not None and tensor.numel() == 1 else None


def _computed(nodes: tuple[Node, ...], source: Node) -> Tensor | None:
    values: dict[Node, Any] = {source: PLACES}

    def value(node: Node) -> Any:
        if node not in values:
            constant = _constant(node)
            assert constant is not None
            values[node] = constant.detach().cpu().double()
        return values[node]

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    result = values[nodes[-1]]
    return result if isinstance(result, Tensor) else None
