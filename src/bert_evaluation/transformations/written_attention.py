"""An attention that a graph writes out, read back: what is multiplied, scaled, masked, and put through a softmax."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformations.linear import tensor_of

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
ASSERTION = aten._assert_tensor_metadata.default
DROPOUT = aten.dropout.default
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
# What passes its first argument on, the same numbers in the same shape.
PASSES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, *CASTS)
MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar)
DIVIDES = (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.div_.Tensor, aten.div_.Scalar)
SCALES = MULTIPLIES + DIVIDES
ADDS = (aten.add.Tensor, aten.add_.Tensor)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
# What may stand between a softmax and the product with the values, or was meant to be one.
_BEFORE_PRODUCT = (DROPOUT, *VIEWS, *PASSES, *SCALES, *ADDS, *FILLS, *WHERES, aten.expand.default)
_LIKE_PRODUCTS = (*PRODUCTS, aten.einsum.default, aten.mm.default, aten.baddbmm.default)
# What constants are computed with, such as the square root of a head's width.
_OF_CONSTANTS = (
    *(aten.lift_fresh_copy.default, aten.sqrt.default, aten.rsqrt.default),
    *(aten.full.default, aten.scalar_tensor.default, *PASSES, *SCALES),
)


class NotAttentionError(Exception):
    """Why a softmax is not that of an attention that can be read back, as a sentence."""


def before_products(graph: GraphModule) -> list[Node]:
    """Every softmax whose result reaches a product of matrices: the attentions that the graph writes out."""
    return [node for node in graphs.calls(graph, *SOFTMAX) if _reaches_product(node)]


def _reaches_product(node: Node) -> bool:
    return any(_leads_to_product(user) for user in node.users)


def _leads_to_product(reader: Node) -> bool:
    return reader.target in _LIKE_PRODUCTS or (reader.target in _BEFORE_PRODUCT and _reaches_product(reader))


def readers(node: Node) -> list[Node]:
    """The nodes that read this one; assertions about its type aside."""
    return [user for user in node.users if user.target is not ASSERTION]


def shape_of(node: Node) -> tuple[str, ...]:
    """The sizes of a node's result as text: comparing symbols themselves would fix them."""
    value = node.meta.get("val")
    return tuple(str(size) for size in value.shape) if isinstance(value, Tensor) else ()


def broadcast(one: Sequence[Any], other: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of what is made of tensors of these two, which fit."""
    rank = max(len(one), len(other))
    pairs = zip((*[1] * (rank - len(one)), *one), (*[1] * (rank - len(other)), *other), strict=True)
    return tuple(b if str(a) == "1" else a for a, b in pairs)


def type_of(node: Node) -> torch.dtype | None:
    """The type of a node's result, where it is known."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def constant(value: Any) -> float | None:
    """The number that an argument is: itself, or the only element of a tensor that the graph makes of constants."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node) or shape_of(value) or not _is_constant(value):
        return None
    with torch.no_grad():
        return float(_evaluated(value))


def _is_constant(node: Node) -> bool:
    if "val" not in node.meta and node.op != "get_attr":
        return False
    if any(map(graphs.is_mutable, node.users)):
        return False
    if node.op == "get_attr":
        return not isinstance(tensor_of(node), nn.Parameter)
    return node.target in _OF_CONSTANTS and all(map(_is_constant, node.all_input_nodes))


def _evaluated(node: Node) -> Tensor:
    if node.op == "get_attr":
        return tensor_of(node).clone()
    args, kwargs = fx.map_arg((node.args, node.kwargs), _evaluated)
    assert callable(node.target)
    result: Tensor = node.target(*args, **kwargs)
    return result


def factor(node: Node) -> float | None:
    """What a node multiplies its first argument by, if it does so, and by a constant other than 0."""
    if node.target not in SCALES or node.kwargs or len(node.args) != 2:
        return None
    by = constant(node.args[1])
    if by is None or not math.isfinite(by) or by == 0:
        return None
    return 1 / by if node.target in DIVIDES else by


def scores(softmax: Node) -> list[Node]:
    """The nodes from the product of queries and keys to what the softmax reads, each read by the next one only.

    Raises NotAttentionError if there is no such product, something else is done to it on the way, or others read it.
    """
    node, chain = argument(softmax, 0), list[Node]()
    reader = softmax
    while True:
        if other := next((user for user in readers(node) if user is not reader), None):
            raise NotAttentionError(f"The scores ({node.name}) {_also_read_by(other)}.")
        chain.append(node)
        if node.target in PRODUCTS:
            return chain[::-1]
        node, reader = _scores_before(node), node


def _also_read_by(node: Node) -> str:
    return "are an output of the graph" if node.op == "output" else f"are also read by {node.name}"


def _scores_before(node: Node) -> Node:
    """The scores that a node reads to make new ones."""
    if node.target in ADDS:
        if node.kwargs.get("alpha", 1) != 1:
            raise NotAttentionError(f"{node.name} adds a multiple of its second argument.")
        sides = [side for side in node.args[:2] if isinstance(side, Node)]
        found = next((side for side in sides if _product_behind(side)), None)
        if found is None or len(sides) < 2:
            raise NotAttentionError(
                f"{node.name} adds up no scores and mask: neither comes from a product of matrices."
            )
    elif node.target in WHERES:
        found = next((side for side in node.args[1:] if isinstance(side, Node) and _product_behind(side)), None)
        if found is None:
            raise NotAttentionError(f"{node.name} chooses from nothing that comes from a product of matrices.")
    elif node.target in SCALES and factor(node) is None:
        raise NotAttentionError(f"{node.name} multiplies or divides the scores by something that is no constant.")
    elif node.target in (*SCALES, *FILLS, *VIEWS, *PASSES) or is_idle_dropout(node):
        found = argument(node, 0)
    else:
        raise NotAttentionError(f"The scores come from {node.name} ({node.target}), which is no part of an attention.")
    if graphs.is_mutable(node) and found is not node.args[0]:
        raise NotAttentionError(f"{node.name} writes the scores into {node.args[0]}, which is not theirs.")
    return found


def _product_behind(node: Node) -> bool:
    """Whether a node's first arguments lead to a product of matrices, through what may be done to scores."""
    if node.target in PRODUCTS:
        return True
    if node.target in WHERES:
        sources = node.args[1:]
    elif node.target in ADDS:
        sources = node.args[:2]
    elif node.target in (*SCALES, *FILLS, *VIEWS, *PASSES, DROPOUT):
        sources = node.args[:1]
    else:
        return False
    return any(isinstance(source, Node) and _product_behind(source) for source in sources)


def probabilities(softmax: Node) -> list[Node]:
    """The nodes from the softmax to the product with the values, each read by the next one only.

    Raises NotAttentionError if something else is done to the probabilities on the way, or others read them.
    """
    chain = [softmax]
    while True:
        node = chain[-1]
        reader, *others = sorted(readers(node), key=lambda user: not _leads_to_product(user))
        if others:
            raise NotAttentionError(f"The probabilities ({node.name}) {_also_read_by(others[0])}.")
        if reader.target in PRODUCTS:
            if reader.args[0] is not node or reader.args[1] is node:
                raise NotAttentionError(f"{reader.name} has the probabilities as its second factor, not its first.")
            return [*chain, reader]
        if reader.target is DROPOUT and not is_idle_dropout(reader):
            raise NotAttentionError(f"{reader.name} drops probabilities out: it is switched on.")
        if reader.target not in (DROPOUT, *VIEWS, *PASSES):
            raise NotAttentionError(
                f"{reader.name} ({reader.target}) stands between the softmax and the product with the values."
            )
        chain.append(reader)


def is_idle_dropout(node: Node) -> bool:
    """Whether a node is a dropout that drops nothing."""
    return bool(node.target is DROPOUT and (node.args[2] is False or node.args[1] == 0))


def argument(node: Node, index: int) -> Node:
    """An argument of a node that is a node itself."""
    value = node.args[index]
    assert isinstance(value, Node)
    return value


@dataclass(frozen=True)
class Operand:
    """A factor of a product of matrices, before constants multiply it and its last two dimensions are swapped."""

    node: Node
    factor: float
    swapped: bool
    scales: tuple[Node, ...]  # the nodes that multiply it, last to first


def operand(node: Node) -> Operand:
    """What a product of matrices reads, read back."""
    scales, by, swapped = list[Node](), 1.0, False
    while True:
        if (own := factor(node)) is not None and not graphs.is_mutable(node):
            scales.append(node)
            by *= own
        elif _swaps_last_two(node):
            swapped = not swapped
        else:
            return Operand(node, by, swapped, tuple(scales))
        node = argument(node, 0)


def _swaps_last_two(node: Node) -> bool:
    rank = len(shape_of(node))
    axes: Any = node.args[1:]
    if node.target is aten.transpose.int:
        return {axis % rank for axis in axes} == {rank - 1, rank - 2}
    if node.target is aten.permute.default:
        return [axis % rank for axis in axes[0]] == [*range(rank - 2), rank - 1, rank - 2]
    return node.target is aten.mT.default


def writes_between(first: Node, last: Node, tensor: Node) -> Node | None:
    """A node after `first` and before `last` that writes into the memory of `tensor`, if there is one."""
    held = graphs.memory(tensor)
    return next((node for node in _between(first, last) if held in graphs.writes(node)), None)


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def discard(graph: GraphModule, node: Node) -> None:
    """Take out a node that nobody reads, assertions about it, and whatever only it has read."""
    waiting, gone = [node], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in gone or node.op not in ("call_function", "get_attr") or readers(node):
            continue
        if graphs.is_mutable(node) and not _writes_for_itself(node):
            continue
        sources = node.all_input_nodes
        for unread in (*node.users, node):
            graph.graph.erase_node(unread)
        gone.add(node)
        waiting.extend(sources)


def _writes_for_itself(node: Node) -> bool:
    """Whether no other node reads, in whatever view, what this one writes in place."""
    while isinstance(source := node.args[0], Node) and readers(source) == [node]:
        if graphs.memory(source) is source:
            return source.op == "call_function"
        node = source
    return False


def reshapes(node: Node) -> bool:
    """Whether a node is a view of another shape."""
    return node.target in VIEWS and shape_of(node) != shape_of(argument(node, 0))
