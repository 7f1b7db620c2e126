"""What a graph is, in a hash: of its operators, and of its tensors' bits."""

import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node


def _describe(value: Any, number: Mapping[Node, int | str], graph: nn.Module) -> str:
    if isinstance(value, Node):
        return f"%{number[value]}"
    if isinstance(value, (list, tuple)):
        return "(" + ",".join(_describe(item, number, graph) for item in value) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_describe(item, number, graph)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, slice):
        return f"slice{_describe((value.start, value.stop, value.step), number, graph)}"
    return f"{type(value).__name__}:{value!r}"


def _describe_target(node: Node, graph: nn.Module) -> str:
    target = node.target
    if node.op == "get_attr":
        attribute: Any = graph
        for part in str(target).split("."):
            attribute = getattr(attribute, part)
        if isinstance(attribute, GraphModule):
            return f"graph {graph_hash(attribute)}"
        layout = "" if attribute.layout is torch.strided else f" {attribute.layout}"
        return f"{target} {attribute.dtype} {tuple(attribute.shape)}{layout}"
    if isinstance(target, (types.FunctionType, types.BuiltinFunctionType)):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def description(node: Node, number: Mapping[Node, int | str], graph: GraphModule) -> str:
    """What a node calls and with what; the nodes that it reads are told by their numbers, literals with their types."""
    arguments = _describe([list(node.args), dict(node.kwargs)], number, graph)
    return f"{node.op} {_describe_target(node, graph)} {arguments}"


def graph_hash(graph: GraphModule) -> str:
    """A hash of what the graph computes with: operators, arguments, names, shapes and types of its parameters.

    The same in every process. The names of intermediate nodes and the values of parameters are left out, and so is the
    order of nodes that do not read each other: that of ModernBERT's differs from process to process, by a set in its
    code. Only what writes in place makes the order count.
    """
    names: dict[Node, str] = {}  # of each node: a hash of what it computes
    for node in graph.graph.nodes:
        names[node] = hashlib.sha256(description(node, names, graph).encode()).hexdigest()
    lines = list(names.values())
    if not any(graphs.is_mutable(node) for node in graph.graph.nodes):
        lines.sort()
    if (call := graphs.stand_in(graph)) is not None:
        lines.append(repr(call))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """A hash of every parameter and buffer that the module would save: name, type, shape and bits."""
    return _hash_of(module.state_dict())


def constants_hash(graph: GraphModule) -> str:
    """A hash of every tensor that the graph reads, saved with it or not: what `graph_hash` leaves out."""
    return _hash_of(
        {name: tensor for name in graphs.read_names(graph) if (tensor := graphs.get_tensor(graph, name)) is not None}
    )


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.to_dense() if tensor.is_mkldnn else tensor
        bits = plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()
