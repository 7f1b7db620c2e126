"""Linears that do more at once, with weights stored as the processor reads them. For CPUs.

Linears in tiles (`TileLinears`, `QuantizeLinears`) take what follows them in themselves; others become oneDNN's.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.activations import activation_at, activations
from bert_evaluation.transformations.linear import (
    free_name,
    readers,
    sites_by_weight,
    stem,
    tensor_of,
    weight_and_bias,
    written_between,
)
from bert_evaluation.transformations.tiles import why_not_ended, with_ending

aten = torch.ops.aten
# Of 2 outputs a packed weight takes 31 µs for 32 rows of 768, a plain one 14, and as long for 256 to 3,072 rows; and
# without one a graph that has no other can be a library (see `aot_inductor`).
LEAST_OUTPUTS = 16


class FuseLinearActivation(ReversibleTransformation):
    """A linear and the function of each element that alone reads it become one operator.

        y = linear(x, W, b)          becomes          z = linear_pointwise(x, W, b, "gelu")
        z = gelu(y)

    GELU is known in all the forms that models write it in: the operator, exact or with tanh, and either spelt out.
    Others: relu, tanh, sigmoid, silu. What oneDNN is slow at on this processor is refused unless `anyway`.
    """

    promise = Reassociates()

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every activation."""
        return [Site(each.nodes[-1], each.nodes) for each in activations(graph.graph.nodes)]

    def why_not(self, site: Site) -> str | None:
        """Refuse an activation of what is no linear, or of one that others read too."""
        found = activation_at(site.node)
        assert found is not None
        for node in found.nodes[:-1]:
            if outside := next((user for user in node.users if user not in found.nodes), None):
                return f"{node.name}, a part of it, is also read by {outside.name}."
        if found.source.target is kernels.LINEAR:
            if found.activation.label not in kernels.ACTIVATIONS:
                return f"Linears in tiles end with no {found.activation.label}."
            return why_not_ended(found.source, found.nodes, "activation")
        if not self.anyway and (reason := onednn.why_slow(found.activation)):
            return reason
        return _why_not_fused(found.source, found.nodes)

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the linear end with the activation."""
        found = activation_at(site.node)
        assert found is not None
        linear, activation = found.source, found.activation
        inner = (*reversed(found.nodes[:-1]), linear)
        if linear.target is kernels.LINEAR:
            _replace(graph, site.node, inner, kernels.LINEAR, with_ending(linear, activation=activation.label))
            return
        weight, bias = weight_and_bias(linear)
        arguments: tuple[object, ...] = (linear.args[0], weight, bias, activation.name, [], activation.variant)
        _replace(graph, site.node, inner, onednn.POINTWISE, arguments)


class FuseResidual(ReversibleTransformation):
    """A linear and the addition of another tensor that alone reads it become one operator.

    y = linear(x, W, b)          becomes          z = linear_pointwise(x, r, W, b, "add")
    z = y + r
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every addition of two tensors one of which a linear, or a dropout of one, makes."""
        return [
            Site(node)
            for node in graphs.calls(graph, aten.add.Tensor)
            if any(_made_by_linear(each) for each in node.all_input_nodes)
        ]

    def why_not(self, site: Site) -> str | None:
        """Refuse a sum with a factor, of different shapes, or of a linear that others read too."""
        node = site.node
        if node.kwargs.get("alpha", 1) != 1 or len(node.all_input_nodes) != 2:
            return f"{node.name} adds no other tensor as it is."
        one, other = node.all_input_nodes
        shapes = {_shape(each) for each in (one, other, node)}
        if None in shapes or len(shapes) > 1:
            return f"{one.name} and {other.name} differ in shape or type; one is repeated to be added."
        reasons = [_why_not_added(each, node) for each in (one, other) if _made_by_linear(each)]
        return None if None in reasons else reasons[0]

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the linear end with the addition."""
        node = site.node
        one, other = node.all_input_nodes
        if not (_made_by_linear(other) and _why_not_added(other, node) is None):
            one, other = other, one
        if other.target is kernels.LINEAR:
            _replace(graph, node, (other,), kernels.LINEAR, with_ending(other, residual=one))
            return
        weight, bias = weight_and_bias(other)
        _replace(graph, node, (other,), onednn.BINARY, (other.args[0], one, weight, bias, "add"))


class PackLinears(ReversibleTransformation):
    """The weights of linears are stored in the order in which the processor's kernels read them.

        y = linear(x, W, b)          becomes          y = linear_pointwise(x, packed W, b, "none")

    The packed weight takes the place of the plain one, and as much memory. A site is one weight, wherever applied.
    It holds for the processor that packed it, so a graph is saved before this step.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their weight together."""
        return sites_by_weight(graph)

    def why_not(self, site: Site) -> str | None:
        """Refuse a weight that is computed, that others read too, of few outputs, or that oneDNN does not take."""
        weight = onednn.weight_of(site.node)
        if weight.op != "get_attr":
            return f"{site.node.name} reads {weight.name}, which the graph computes: it is no stored parameter."
        if reader := next((user for user in readers(weight) if user not in site.nodes), None):
            return f"{weight.target} is also read by {reader.name}, which would keep the old copy."
        tensor = tensor_of(weight)
        if tensor.is_mkldnn:
            return "It is packed already."
        if (reason := onednn.why_not(tensor)) is not None:
            return reason
        few = f"It has {len(tensor)} outputs; packing is of no use to fewer than {LEAST_OUTPUTS}."
        return few if len(tensor) < LEAST_OUTPUTS else None

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, str, bool, bool]:
        """Pack the weight, and let every linear read it."""
        weight = onednn.weight_of(site.node)
        tensor, name = tensor_of(weight), free_name(graph, stem(weight) + "_packed", "weight")
        graphs.set_tensor(graph, name, onednn.pack(tensor))
        for linear in site.nodes:
            with graph.graph.inserting_before(linear):
                packed = graph.graph.get_attr(name)
            if linear.target is aten.linear.default:
                x, bias = linear.args[0], weight_and_bias(linear)[1]
                _replace(graph, linear, (), onednn.POINTWISE, (x, packed, bias, "none", [], ""))
            else:
                linear.replace_input_with(onednn.weight_of(linear), packed)
        return str(weight.target), name, isinstance(tensor, torch.nn.Parameter), tensor.requires_grad

    def undo(self, graph: GraphModule, memo: tuple[str, str, bool, bool]) -> None:
        """Bring the weight back into its own order."""
        plain, name, is_parameter, trained = memo
        packed = graphs.get_tensor(graph, name)
        assert packed is not None
        tensor = onednn.unpack(packed)
        graphs.set_tensor(graph, plain, torch.nn.Parameter(tensor, requires_grad=trained) if is_parameter else tensor)


def _why_not_fused(linear: Node, readers: Sequence[Node]) -> str | None:
    """Why a linear cannot end with what `readers`, first to last, make of it."""
    if linear.target is not aten.linear.default:
        return f"{linear.name} is no plain linear, but {linear.target}."
    if outside := next((user for user in linear.users if user not in readers), None):
        return f"{linear.name} is also read by {outside.name}."
    weight = weight_and_bias(linear)[0]
    if weight.op != "get_attr":
        return f"{linear.name} reads {weight.name}, which the graph computes: it is no stored parameter."
    if writer := written_between(linear, readers[-1]):
        return f"{writer.name} writes in place between them."
    return onednn.why_not(tensor_of(weight))


def _why_not_added(linear: Node, addition: Node) -> str | None:
    if linear.target is kernels.LINEAR:
        return why_not_ended(linear, (addition,), "residual")
    return _why_not_fused(linear, (addition,))


def _made_by_linear(node: Node) -> bool:
    return node.target in (aten.linear.default, kernels.LINEAR) or (
        node.target is aten.dropout.default and isinstance(node.args[0], Node) and _made_by_linear(node.args[0])
    )


def _shape(node: Node) -> tuple[object, ...] | None:
    value = node.meta.get("val")
    return (value.dtype, *map(str, value.shape)) if isinstance(value, Tensor) else None


def _replace(
    graph: GraphModule, node: Node, inner: Iterable[Node], target: object, arguments: tuple[object, ...]
) -> None:
    """Put an operator in the place of `node`, with its shape, and remove the nodes that it stands for, last first."""
    with graph.graph.inserting_before(node):
        fused = graph.graph.call_function(target, arguments)  # type: ignore[arg-type]
    if "val" in node.meta:
        fused.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(fused)
    for each in (node, *inner):
        if not each.users:
            graph.graph.erase_node(each)
