"""Batch normalisation with fixed statistics is an affine map: it folds into the layer beside it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.keeping import KeepsTensors, Kept
from bert_evaluation.transformations.linear import free_name, stem, tensor_of, weight_and_bias, why_not_ours

aten = torch.ops.aten


def _norms(graph: GraphModule, dimensions: tuple[int, ...]) -> list[Node]:
    nodes = graphs.calls(graph, aten.batch_norm.default)
    return [node for node in nodes if "val" in node.meta and node.meta["val"].dim() in dimensions]


def _statistics(norm: Node) -> list[Node]:
    """The nodes of weight, bias, mean and variance; those that are not None."""
    return [node for node in norm.args[1:5] if isinstance(node, Node)]


def _scale_and_shift(norm: Node) -> tuple[Tensor, Tensor]:
    """The affine map, in float64: one scale and one shift a channel. Weight and bias may be absent (affine=False)."""
    weight, bias, mean, variance = (
        tensor_of(node).detach().double() if isinstance(node, Node) else None for node in norm.args[1:5]
    )
    assert mean is not None and variance is not None  # noqa: PT018
    epsilon: Any = norm.args[7]
    scale = torch.rsqrt(variance + epsilon)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _why_not_fixed(norm: Node) -> str | None:
    if norm.args[5] is not False or not isinstance(norm.args[3], Node):
        return f"{norm.name} normalises by the statistics of each batch, which no constant can hold."
    for node in _statistics(norm):
        if node.op != "get_attr":
            return f"{norm.name} reads {node.name}, which the graph computes: it is no stored parameter."
    return None


def _fold(graph: GraphModule, norm: Node, layer: Node, weight: Tensor, bias: Tensor) -> Kept:
    """Give the layer its new weight and bias (float64), take the norm out, and return what was there."""
    weight_node, bias_node = weight_and_bias(layer)
    stored = [weight_node, *([bias_node] if bias_node is not None else []), *_statistics(norm)]
    memo = {str(node.target): tensor_of(node) for node in stored}
    old = tensor_of(weight_node)
    bias_name = str(bias_node.target) if bias_node is not None else free_bias_name(graph, weight_node)
    graphs.set_tensor(graph, str(weight_node.target), graphs.like(weight.to(old.dtype), old))
    graphs.set_tensor(graph, bias_name, graphs.like(bias.to(old.dtype), old))
    if bias_node is None:
        with graph.graph.inserting_before(layer):
            bias_node = graph.graph.get_attr(bias_name)
    layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])
    source = norm.args[0]
    assert isinstance(source, Node)
    norm.replace_all_uses_with(source)
    graph.graph.erase_node(norm)
    return memo


def free_bias_name(graph: GraphModule, weight: Node) -> str:
    """A name for the bias that a layer without one is given: beside its weight if that is free."""
    beside = f"{stem(weight)}.bias"
    return beside if graphs.get_tensor(graph, beside) is None else free_name(graph, stem(weight) + "_fused", "bias")


class FuseBatchNorm1dInLinear(KeepsTensors):
    """A batch norm right after or right before a linear becomes part of it.

        y = linear(x, W, b)                     y = linear(x, s·W, s·b + t)
        z = batch_norm(y)         becomes       z = y
        ---------------------------------------------------------------------
        y = batch_norm(x)         becomes       y = x
        z = linear(y, W, b)                     z = linear(x, W·s, b + W t)

    with s = weight / sqrt(variance + eps) and t = bias - mean · s. Both need rows of features: of a tensor of three
    dimensions the norm takes the second, and a linear the last.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every batch norm of rows or of sequences."""
        return [Site(norm) for norm in _norms(graph, (2, 3))]

    def why_not(self, site: Site) -> str | None:
        """Refuse statistics that are not fixed, neighbours that others read, and three dimensions."""
        norm = site.node
        if reason := _why_not_fixed(norm):
            return reason
        if norm.meta["val"].dim() != 2:
            return f"{norm.name} normalises dimension 1 of a tensor of three dimensions; a linear works on the last."
        if (layer := self._layer(norm)) is None:
            return f"No linear right before or after {norm.name} has it as its only neighbour on that side."
        return why_not_ours([layer])

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Fold into the linear before it, else into the one after it."""
        norm = site.node
        layer = self._layer(norm)
        assert layer is not None
        scale, shift = _scale_and_shift(norm)
        weight_node, bias_node = weight_and_bias(layer)
        weight = tensor_of(weight_node).detach().double()
        bias = tensor_of(bias_node).detach().double() if bias_node is not None else weight.new_zeros(len(weight))
        if layer is norm.args[0]:
            weight, bias = weight * scale[:, None], bias * scale + shift
        else:
            weight, bias = weight * scale, bias + weight @ shift
        return _fold(graph, norm, layer, weight, bias)

    @staticmethod
    def _layer(norm: Node) -> Node | None:
        before, after = norm.args[0], next(iter(norm.users), None)
        if isinstance(before, Node) and before.target is aten.linear.default and len(before.users) == 1:
            return before
        reads_only_as_input = after is not None and after.args[0] is norm and len(norm.users) == 1
        return after if after is not None and after.target is aten.linear.default and reads_only_as_input else None


class FuseBatchNorm2dInConv2d(KeepsTensors):
    """A batch norm right after a convolution becomes part of it.

        y = conv2d(x, W, b)        becomes        z = conv2d(x, s·W, s·b + t)
        z = batch_norm(y)

    with s = weight / sqrt(variance + eps) and t = bias - mean · s, a value a channel.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every batch norm of images."""
        return [Site(norm) for norm in _norms(graph, (4,))]

    def why_not(self, site: Site) -> str | None:
        """Refuse statistics that are not fixed, and a convolution whose result or parameters others read."""
        norm = site.node
        if reason := _why_not_fixed(norm):
            return reason
        layer = norm.args[0]
        if not isinstance(layer, Node) or layer.target not in (aten.conv2d.default, aten.conv2d.padding):
            return f"{norm.name} does not come right after a convolution."
        if len(layer.users) > 1:
            return f"The result of {layer.name} is also read by others than {norm.name}."
        return why_not_ours([layer])

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Fold into the convolution."""
        norm = site.node
        layer: Any = norm.args[0]
        scale, shift = _scale_and_shift(norm)
        weight_node, bias_node = weight_and_bias(layer)
        weight = tensor_of(weight_node).detach().double()
        bias = tensor_of(bias_node).detach().double() if bias_node is not None else weight.new_zeros(len(weight))
        return _fold(graph, norm, layer, weight * scale[:, None, None, None], bias * scale + shift)
