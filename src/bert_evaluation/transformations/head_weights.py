"""Attention by heads: the linears that make them and read them, and which axis has the heads on the way."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bert_evaluation import graph as graphs
from bert_evaluation import onednn
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias, why_not_ours
from bert_evaluation.transformations.written_attention import (
    ADDS,
    DROPOUT,
    FILLS,
    PASSES,
    SCALES,
    VIEWS,
    WHERES,
    NotAttentionError,
    argument,
    before_products,
    factor,
    is_idle_dropout,
    probabilities,
    readers,
    scores,
    shape_of,
)

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_MOVES = (*VIEWS, *PASSES, *SCALES, DROPOUT, aten.transpose.int, aten.permute.default)
_MERGED = (operator.getitem, aten.split_with_sizes.default)
_NO_MOVE = "{0.name} ({0.target}) does more than split, move or join heads."
AXIS = 1  # of (batch, heads, length, width), as attention has them


@dataclass(frozen=True)
class Heads:
    """One attention of `count` heads, as the operator or (`node` is its softmax) written out.

    `made_by` are the linears of query, key and value, `read_by` that of the result. `axes` has, for each node between
    them, the axis with the heads, None where they lie side by side in the last one. `biases` are the tensors that
    have something of their own for each head, with the axis of that and the node that reads them.
    """

    node: Node
    count: int
    made_by: tuple[Node, Node, Node]
    read_by: Node
    axes: dict[Node, int | None]
    biases: tuple[tuple[Node, Node, int], ...]

    @property
    def widths(self) -> tuple[int, int, int]:
        """The rows of the weights of query, key and value that make one head."""
        query, key, value = (tensor_of(weight_and_bias(each)[0]).shape[0] // self.count for each in self.made_by)
        return query, key, value


def attentions(graph: GraphModule) -> list[Node]:
    """Every attention: the operator, or the softmax of one that is written out."""
    found = {*graphs.calls(graph, SDPA), *before_products(graph)}
    return [node for node in graph.graph.nodes if node in found]


def read_heads(attention: Node) -> Heads:
    """The heads of an attention. Raises NotAttentionError where they cannot be told apart from linear to linear."""
    if attention.target is SDPA:
        query, key, value = (argument(attention, index) for index in range(3))
        sources, inner, result = (query, key, value), [attention], attention
        masks = [(attention, each) for each in (*attention.args[3:4], attention.kwargs.get("attn_mask"))]
    else:
        before, after = scores(attention), probabilities(attention)
        sources = (argument(before[0], 0), argument(before[0], 1), argument(after[-1], 1))
        inner, result = [*before, *after], after[-1]
        masks = [(node, each) for node in before if node.target in (*ADDS, *FILLS, *WHERES) for each in node.args]
    if odd := next((node for node in inner if len(shape_of(node)) != 4), None):
        raise NotAttentionError(f"{odd.name} is not of shape (batch, heads, length, width).")
    count = attention.meta["val"].shape[AXIS]
    if not isinstance(count, int):
        raise NotAttentionError(f"The number of heads of {attention.name} is not fixed.")
    if other := next((each for each in sources if shape_of(each)[AXIS] != str(count)), None):
        raise NotAttentionError(f"{other.name} has another number of heads than {attention.name}.")
    axes: dict[Node, int | None] = dict.fromkeys(inner, AXIS)
    query, key, value = (_made_by(source, attention, axes) for source in sources)
    read_by = _read_by(result, axes)
    biases = tuple(
        (mask, reader, axis)
        for reader, mask in masks
        if isinstance(mask, Node) and mask not in axes and (axis := _axis_of_bias(mask, count)) is not None
    )
    return Heads(attention, count, (query, key, value), read_by, axes, biases)


def why_not_shared(found: Sequence[Heads]) -> str | None:
    """Why heads cannot be taken out of these attentions, which have the weights of their queries in common."""
    first, *others = found
    linears = [linear for each in (first, *others) for linear in (*each.made_by, each.read_by)]
    weights = [[weight_and_bias(linear)[0].target for linear in (*each.made_by, each.read_by)] for each in found]
    if reason := why_not_ours(linears):
        return reason
    if any(each.count != first.count for each in others) or any(each != weights[0] for each in weights):
        return f"{first.made_by[0].name} and {others[0].made_by[0].name} share weights, but not as whole attentions."
    if len(set(weights[0])) < len(weights[0]):
        return "Some of query, key, value and output have one weight between them."
    return None


def _made_by(source: Node, attention: Node, axes: dict[Node, int | None]) -> Node:
    """The linear that makes a query, key or value; the nodes from there on are entered into `axes`."""
    chain = [source]
    while (node := chain[-1]).target is not aten.linear.default:
        if node.target in _MERGED or node.target in onednn.FUSED:
            raise NotAttentionError(f"{node.name} makes a merged, fused or packed linear's result; prune before that.")
        if node.target not in _MOVES:
            raise NotAttentionError(_NO_MOVE.format(node))
        chain.append(argument(node, 0))
    axis: int | None = None
    axes[chain[-1]] = axis
    for after, node in reversed(list(itertools.pairwise(chain))):
        axis = axes[after] = _step(node, after, axis)
    if shared := next((node for node in chain if len(readers(node)) > 1), None):
        raise NotAttentionError(f"{shared.name} is also read by others than {attention.name}.")
    if axis != AXIS:
        raise NotAttentionError(f"{source.name} has no heads where {attention.name} expects them.")
    return chain[-1]


def _read_by(result: Node, axes: dict[Node, int | None]) -> Node:
    """The linear that reads the joined heads; the nodes on the way there are entered into `axes`."""
    node, axis = result, axes[result]
    while True:
        after = readers(node)
        if len(after) != 1 or after[0].op == "output":
            raise NotAttentionError(f"{node.name} is read otherwise than by one linear.")
        if after[0].target is aten.linear.default and after[0].args[0] is node and axis is None:
            return after[0]
        axis = _step(node, after[0], axis)
        node = after[0]
        axes[node] = axis


def _step(source: Node, node: Node, axis: int | None) -> int | None:
    """Where a node that reads the heads has them, if its source has them at `axis`. Raises NotAttentionError."""
    before, after = shape_of(source), shape_of(node)
    arguments: Any = node.args[1:]
    if node.target in VIEWS and before != after:
        if axis is None and after[:-2] == before[:-1]:
            return len(after) - 2
        if axis is not None and after[:-1] == before[:-2] and axis == len(before) - 2:
            return None
    elif node.target in (*VIEWS, *PASSES) or is_idle_dropout(node) or factor(node) is not None:
        return axis
    elif axis is not None and node.target is aten.transpose.int:
        one, other = (each % len(before) for each in arguments)
        swapped: dict[int, int] = {one: other, other: one}
        return swapped.get(axis, axis)
    elif axis is not None and node.target is aten.permute.default:
        order: list[int] = [each % len(before) for each in arguments[0]]
        return order.index(axis)
    raise NotAttentionError(_NO_MOVE.format(node))


def _axis_of_bias(mask: Node, count: int) -> int | None:
    """The axis of a mask that has the heads; None where it is the same for all."""
    shape = shape_of(mask)
    if len(shape) < 3 or shape[-3] == "1":
        return None
    if shape[-3] != str(count):
        raise NotAttentionError(f"{mask.name} is of shape ({', '.join(shape)}), not of one size a head.")
    return len(shape) - 3
