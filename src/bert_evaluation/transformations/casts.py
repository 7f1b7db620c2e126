"""Casts between float32 and a lower type (`low`), of what a graph computes and of what it has stored."""

from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn
from bert_evaluation.graph import Node
from bert_evaluation.transformations.activations import LARGEST, Found, activation_at
from bert_evaluation.transformations.linear import free_name, tensor_of, weight_and_bias
from bert_evaluation.transformations.positions import LINEARS

aten = torch.ops.aten
CAST, NORM, EMBEDDING = aten.to.dtype, aten.layer_norm.default, aten.embedding.default
HIGH = torch.float32
OF = "bert_evaluation.cast_of"  # key in the meta of a node that reads a cast parameter: the parameter's name, the type
# What may stand between linears in a lower type: it moves numbers, or computes each in float32 and rounds it once.
MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.dropout.default,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
SUMS_AND_PRODUCTS = (aten.add.Tensor, aten.mul.Tensor)
ROUNDS_ONCE = (*SUMS_AND_PRODUCTS, NORM, *(activation.operator for activation in onednn.ACTIVATIONS))


def name_of(low: torch.dtype) -> str:
    """A type as people call it: `bfloat16`."""
    return str(low).removeprefix("torch.")


def type_of(node: Node) -> torch.dtype | None:
    """The type of what the node returns, or of all its parts."""
    value: Any = node.meta.get("val")
    types = {
        each.dtype for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, Tensor)
    }
    return types.pop() if len(types) == 1 else None


def is_cast(node: Node, source: torch.dtype, to: torch.dtype) -> bool:
    """Whether the node casts from one type to the other."""
    return node.target is CAST and node.args[1:] == (to,) and type_of(node.all_input_nodes[0]) is source


def cast_down(source: Node, reader: Node, low: torch.dtype) -> Node:
    """The node's result in the lower type: as it was computed, as it is cast for others, or cast."""
    if known := known_low(source, reader, low):
        return known
    inputs = source.graph.find_nodes(op="placeholder")
    with source.graph.inserting_after(inputs[-1] if source in inputs else source):
        cast = source.graph.call_function(CAST, (source, low))
    cast.meta["val"] = source.meta["val"].to(low)
    return cast


def known_low(source: Node, reader: Node, low: torch.dtype) -> Node | None:
    """What there is of the node's result in the lower type where it is read."""
    if is_cast(source, low, HIGH):
        return source.all_input_nodes[0]
    return next((user for user in source.users if is_cast(user, HIGH, low) and user < reader), None)


def stored(node: Node) -> list[Node]:
    """What is multiplied, added or looked up, stored, and has to be of the type that the node returns."""
    if node.target is EMBEDDING:
        return node.all_input_nodes[:1]
    if node.target is NORM:
        # On a CPU they stay in float32, which the kernel for CUDA does not take (pytorch/pytorch#138128).
        return [] if node.meta["val"].device.type == "cpu" else node.all_input_nodes[1:]
    if node.target not in LINEARS or node.target is kernels.LINEAR:
        return []
    if node.target is aten.linear.default:
        return [each for each in weight_and_bias(node) if each is not None]
    first = 2 if node.target is onednn.BINARY else 1
    return [each for each in node.args[first : first + 2] if isinstance(each, Node)]


def lower_stored(node: Node, low: torch.dtype) -> list[tuple[str, Tensor]]:
    """Let the node read what it has stored in the lower type; returns the tensors, by name, as they were."""
    replaced = [(str(parameter.target), tensor_of(parameter)) for parameter in stored(node)]
    for parameter in stored(node):
        node.replace_input_with(parameter, _lowered(parameter, node, low))
    return replaced


def _lowered(parameter: Node, reader: Node, low: torch.dtype) -> Node:
    """A node for the parameter in the lower type, stored beside it, once for all that read it."""
    graph, name = reader.graph.owning_module, str(parameter.target)
    assert graph is not None
    known = next((each for each in reader.graph.find_nodes(op="get_attr") if each.meta.get(OF) == (name, low)), None)
    if known is None:
        leaf = name.rpartition(".")[2]
        target = free_name(graph, f"{name.removesuffix(f'.{leaf}')}_{name_of(low)}", leaf)
        graphs.set_tensor(graph, target, _cast(tensor_of(parameter), low))
    else:
        target = str(known.target)
    with reader.graph.inserting_before(reader):
        node = reader.graph.get_attr(target)
    node.meta[OF] = name, low
    return node


def _cast(tensor: Tensor, low: torch.dtype) -> Tensor:
    if tensor.is_mkldnn:
        return onednn.pack(onednn.unpack(tensor).to(low))
    return graphs.like(tensor.detach().to(low), tensor)


def spelt_out(cast: Node) -> Found | None:
    """The activation of what was cast that takes several nodes, all its own, to write down."""
    best, node = None, cast
    for _ in range(LARGEST):
        node = node.next
        found = activation_at(node)
        if found is not None and found.source is cast and len(found.nodes) > 1:
            inner = [user for each in found.nodes[:-1] for user in each.users]
            best = found if set(inner) <= set(found.nodes) else best
    return best


def as_operator(found: Found) -> Node:
    """Write an activation as one operator, which rounds once."""
    last = found.nodes[-1]
    with last.graph.inserting_before(last):
        node = last.graph.call_function(found.activation.operator, (found.source.args[0],), found.activation.keywords)
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for each in reversed(found.nodes):
        each.graph.erase_node(each)
    return node
