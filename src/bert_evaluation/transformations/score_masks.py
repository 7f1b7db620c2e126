"""What an attention that is written out does to its scores, by adding or filling in, and the one bias it becomes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformations.linear import tensor_of
from bert_evaluation.transformations.written_attention import (
    ADDS,
    FILLS,
    PRODUCTS,
    SCALES,
    WHERES,
    NotAttentionError,
    broadcast,
    constant,
    factor,
    reshapes,
    shape_of,
    type_of,
    writes_between,
)

aten = torch.ops.aten
FLOOR = aten.clamp_min.default


@dataclass(frozen=True)
class Mask:
    """What one node does to the scores: adds `tensor` to them, or fills `fill` in where `tensor` is `at`."""

    by: Node
    tensor: Node
    fill: float | None = None
    at: bool = True


def mask_of(node: Node, read: Node) -> Mask | None:
    """What a node that reads the scores masks them with, if it does so.

    Raises NotAttentionError for what the operator cannot be given.
    """
    tensor: Any
    fill: Any
    if node.target in ADDS:
        tensor, fill, at = next((side for side in node.args[:2] if side is not read), None), None, True
    elif node.target in FILLS:
        (_, tensor, fill), at = node.args, True
    elif node.target in WHERES:
        at = node.args[2] is read
        tensor, fill = node.args[0], node.args[1 if at else 2]
    else:
        return None
    if not isinstance(tensor, Node) or len(shape_of(tensor)) < 2:
        raise NotAttentionError(f"{node.name} masks the scores by what is no matrix, which the operator does not take.")
    if fill is None:
        return Mask(node, tensor)
    number = constant(fill)
    if number is None:
        raise NotAttentionError(f"{node.name} fills the scores with something that is no constant.")
    return Mask(node, tensor, number, at)


def why_not_mask(mask: Mask, kind: torch.dtype) -> str | None:
    """Why what a mask does to scores of this type cannot be added up beforehand."""
    if mask.fill is None:
        if type_of(mask.tensor) != kind:
            return f"The mask {mask.tensor.name} is {type_of(mask.tensor)} and the query {kind}."
        return _INFINITE.format(mask.tensor.name) if _has_infinity(mask.tensor) else None
    if mask.fill == -math.inf:
        return _INFINITE.format(mask.by.name)
    # A score added to half of the lowest number is rounded away: what was filled in and what is added are the same.
    if mask.fill > torch.finfo(kind).min / 2:
        return (
            f"{mask.by.name} fills in {mask.fill:g}; added instead, that would let the scores"
            " of a fully masked row through."
        )
    return None


_INFINITE = "{} masks with -inf: a fully masked row, which is NaN now, would be 0."


def _has_infinity(mask: Node) -> bool:
    """Whether a mask is made with -inf, as far as one can see: back to the products and inputs that it comes from."""
    waiting, seen = [mask], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node.target in (*PRODUCTS, aten.linear.default, aten.scaled_dot_product_attention.default):
            continue
        seen.add(node)
        if -math.inf in [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, float)]:
            return True
        if node.op == "get_attr" and bool((tensor_of(node) == -math.inf).any()):
            return True
        waiting.extend(node.all_input_nodes)
    return False


def bias_of(graph: GraphModule, scores: Sequence[Node], masks: Iterable[Mask], like: Tensor) -> Node | None:
    """All that is added to the scores and filled in, put together in the same order; None where there is nothing.

    `scores` are the nodes from the product on; the bias has the type and device of `like`.
    """
    bias: Node | None = None
    by_node = {mask.by: mask for mask in masks}
    for node in scores[1:]:
        if node in by_node:
            bias = _masked(graph, bias, by_node[node], like)
        elif bias is not None and reshapes(node):
            bias = graph.graph.call_function(aten.reshape.default, (bias, node.args[1]))
            bias.meta["val"] = node.meta["val"]
        elif bias is not None and node.target in SCALES:
            value = bias.meta["val"]
            bias = graph.graph.call_function(aten.mul.Tensor, (bias, factor(node)))
            bias.meta["val"] = value
    return bias


def floored(graph: GraphModule, bias: Node | None, at: Node) -> Node | None:
    """A bias that stays finite in CUDA's kernels, which multiply scores by log2(e) in float32 before their softmax.

    The lowest numbers would be -inf there, and a row that is masked with them 0 instead of the mean of all values. Half
    of the lowest is as good: what it is added to is rounded away.
    """
    if bias is None:
        return None
    value = bias.meta["val"]
    if value.device.type != "cuda" or value.dtype not in (torch.float32, torch.bfloat16):
        return bias
    arguments = bias, torch.finfo(torch.float32).min / 2
    for node in bias.users:  # the floor of another layer's attention
        if node.target is FLOOR and node.args == arguments and not writes_between(node, at, bias):
            return node
    node = graph.graph.call_function(FLOOR, arguments)
    node.meta["val"] = value
    return node


def _masked(graph: GraphModule, bias: Node | None, mask: Mask, like: Tensor) -> Node:
    """A bias with one more mask, of the type and device of `like`."""
    if mask.fill is None and bias is None:
        return mask.tensor
    if bias is None:
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        bias = graph.graph.call_function(aten.zeros.default, ([],), kind)
        bias.meta["val"] = like.new_empty(())
    if mask.fill is None:
        node = graph.graph.call_function(aten.add.Tensor, (bias, mask.tensor))
    elif mask.at:
        node = graph.graph.call_function(aten.where.ScalarSelf, (mask.tensor, mask.fill, bias))
    else:
        node = graph.graph.call_function(aten.where.ScalarOther, (mask.tensor, bias, mask.fill))
    node.meta["val"] = like.new_empty(broadcast(bias.meta["val"].shape, mask.tensor.meta["val"].shape))
    return node
