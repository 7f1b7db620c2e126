"""Attention between the tensors (batch, length, width) that its heads are split from, and the one that they make."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bert_evaluation import kernels
from bert_evaluation.graph import Node
from bert_evaluation.transformations.positions import shape

aten = torch.ops.aten
CHECK = aten._assert_tensor_metadata.default
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
SAME = (aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default)


class RefusedError(Exception):
    """Why a graph stays as it is, in a sentence."""


@dataclass(frozen=True)
class Attention:
    """An attention, the nodes that split its tensors into heads, that which joins them, and all but the last."""

    node: Node
    mask: Node | None
    splits: tuple[Node, ...]
    result: Node
    inner: frozenset[Node]
    heads: int
    scale: float | None


def attentions(graph: fx.Graph) -> Iterator[Node]:
    """Every attention: one operator, torch's or that of our kernels, or the softmax of one that is written out."""
    for node in graph.nodes:
        if node.target in (SDPA, kernels.ATTENTION) or (node.target in SOFTMAX and len(shape(node)) == 4):
            yield node


def heads_at(node: Node) -> Attention:
    """What an attention's tensors are split from, and what its heads are joined to. Raises RefusedError."""
    if node.target is kernels.ATTENTION:
        raise RefusedError(f"{node.name} is attention of our kernels already; this step comes before TileAttention.")
    if node.target is not SDPA:
        raise RefusedError(f"{node.name} is a part of attention that is written out; apply FuseAttention before.")
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    mask, scale = arguments.get("attn_mask"), arguments.get("scale")
    if arguments.get("dropout_p") or arguments.get("is_causal") or arguments.get("enable_gqa"):
        raise RefusedError(f"{node.name} is causal, drops out, or shares keys between heads.")
    splitting = [_splitting(node, arguments[name]) for name in names[:3]]
    *joining, result = _joining(node)
    heads, *others = (shape(nodes[-1])[2] for nodes in splitting)
    if not isinstance(heads, int) or any(other != heads for other in others):
        raise RefusedError(f"{node.name} has not the same number of heads for query, key and value.")
    inner = frozenset((node, *joining, *(each for nodes in splitting for each in nodes)))
    splits = tuple(nodes[-1] for nodes in splitting)
    return Attention(node, mask if isinstance(mask, Node) else None, splits, result, inner, heads, scale)


def _splitting(attention: Node, node: Node) -> list[Node]:
    """The nodes that split (batch, length, width) into heads, last to first."""
    found, swapped = [], False
    while (node.target in SAME or _swaps(node)) and isinstance(source := node.args[0], Node):
        found.append(node)
        swapped ^= _swaps(node)
        before, after = shape(source), shape(node)
        if swapped and len(before) == 3 and len(after) == 4 and before[:2] == after[:2]:
            return found
        if not _swaps(node) and before != after:
            break
        node = source
    raise RefusedError(f"{attention.name} reads {node.name}, which is more than a tensor split into heads.")


def _joining(attention: Node) -> list[Node]:
    """The nodes that join the heads of attention's result, first to last."""
    node, found, swapped = attention, list[Node](), False
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target not in SAME and not _swaps(user):
            break
        found.append(user)
        swapped ^= _swaps(user)
        before, after = shape(node), shape(user)
        if swapped and len(before) == 4 and len(after) == 3 and before[:2] == after[:2]:
            return found
        if not _swaps(user) and before != after:
            break
        node = user
    raise RefusedError(f"{node.name}, of {attention.name}, is read otherwise than by what joins its heads.")


def _swaps(node: Node) -> bool:
    """Whether the node exchanges heads and positions."""
    if node.target is aten.transpose.int:
        return node.args[1:] in ((1, 2), (2, 1), (-3, -2), (-2, -3))
    return node.target is aten.permute.default and node.args[1] == [0, 2, 1, 3]


def call(target: Any, arguments: tuple[Any, ...], like: Node, value: object) -> Node:
    """Call an operator, in the layer of another node."""
    node = like.graph.call_function(target, arguments)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    node.meta["val"] = value
    return node


def drop(graph: fx.Graph, exchanged: set[Node]) -> None:
    """Remove the old attentions, and what nothing reads but checks of its type: they would keep the old mask alive."""
    for node in reversed(graph.nodes):
        idle = node.op == "call_function" and all(user.target is CHECK for user in node.users)
        if idle and (node in exchanged or not node.is_impure()):
            for check in list(node.users):
                graph.erase_node(check)
            graph.erase_node(node)
