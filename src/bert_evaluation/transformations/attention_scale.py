"""The factor of an attention goes into the weights of its query."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.keeping import KeepsTensors, Kept
from bert_evaluation.transformations.linear import parameters, tensor_of, weight_and_bias, why_not_ours
from bert_evaluation.transformations.written_attention import (
    PASSES,
    SCALES,
    VIEWS,
    NotAttentionError,
    argument,
    before_products,
    discard,
    factor,
    is_idle_dropout,
    operand,
    readers,
    scores,
)

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
# What puts numbers elsewhere and changes none.
_MOVES = (
    *(*VIEWS, *PASSES, aten.transpose.int, aten.permute.default, aten.mT.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
)


@dataclass(frozen=True)
class _Scaled:
    """A scaled attention: its factor, the nodes that multiply by it, the query's linear and the rows that make it."""

    attention: Node  # the operator, or the softmax of one that is written out
    factor: float
    scales: tuple[Node, ...]
    linear: Node
    rows: slice


class FoldAttentionScale(KeepsTensors):
    """The factor of an attention goes into the weights of its query.

        q = view(linear(x, W, b))                                q = view(linear(x, c·W, c·b))
        y = scaled_dot_product_attention(q, k, v,     becomes    y = scaled_dot_product_attention(q, k, v,
                mask, scale=c)                                           mask, scale=1.0)
        --------------------------------------------------------------------------------------------------
        s = matmul(q, transpose(k, 2, 3)) * c         becomes    s = matmul(q, transpose(k, 2, 3))

    Of linears that were merged, only the query's rows are multiplied. A site is one query's weights, wherever they are
    applied: layers that share them share the new ones.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every attention whose factor is not 1, those whose queries have the same weights together."""
        sites: dict[object, list[Node]] = {}
        for attention in (*graphs.calls(graph, SDPA), *before_products(graph)):
            try:
                by, _, query = _factor(attention)
                if by != 1:
                    weight = weight_and_bias(_linear(query)[0])[0]
                    sites.setdefault(weight.target, []).append(attention)
            except NotAttentionError:
                sites[attention] = [attention]
        return [Site(attentions[0], tuple(attentions)) for attentions in sites.values()]

    def why_not(self, site: Site) -> str | None:
        """Refuse a query that others read, that no linear makes, or whose weights are others' too."""
        try:
            first, *others = found = [_read(attention) for attention in site.nodes]
        except NotAttentionError as reason:
            return str(reason)
        if odd := next((each for each in others if (each.factor, each.rows) != (first.factor, first.rows)), None):
            return f"{odd.linear.name} has the same weights as {first.linear.name}, but another factor or other rows."
        return why_not_ours(each.linear for each in found)

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Multiply the query's rows, and take the factor out."""
        found = [_read(attention) for attention in site.nodes]
        stored, read = graphs.tensors(graph), graphs.read_names(graph)
        kept = {str(node.target): tensor_of(node) for node in parameters(found[0].linear)}
        for name, tensor in kept.items():
            rows = tensor.detach().clone()
            rows[found[0].rows] = (rows[found[0].rows].double() * found[0].factor).to(rows.dtype)
            graphs.set_tensor(graph, name, graphs.like(rows, tensor))
        for each in found:
            self.mark_as_transformed(each.linear)
            if each.attention.target is SDPA:
                each.attention.update_kwarg("scale", 1.0)
                self.mark_as_transformed(each.attention)
            for scale in each.scales:
                source, *constants = scale.all_input_nodes
                scale.replace_all_uses_with(source)
                graph.graph.erase_node(scale)
                for constant in constants:
                    discard(graph, constant)
        return kept | {name: stored[name] for name in read - graphs.read_names(graph)}


def _read(attention: Node) -> _Scaled:
    """A scaled attention. Raises NotAttentionError where the factor cannot be moved."""
    by, scales, query = _factor(attention)
    for scale in scales:
        _refuse_others("The result of", scale)
    return _Scaled(attention, by, scales, *_linear(query))


def _factor(attention: Node) -> tuple[float, tuple[Node, ...], Node]:
    """What queries times keys are multiplied by, the nodes that do so, and the query before that."""
    if attention.target is SDPA:
        query: Any = attention.args[0]
        scale: Any = attention.kwargs.get("scale")
        return 1 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else scale, (), query
    product, *after = scores(attention)
    query, key = (operand(argument(product, index)) for index in (0, 1))
    scales = [*query.scales, *key.scales]
    for node in after:
        if node.target in SCALES:
            scales.append(node)
        elif node.target not in (*VIEWS, *PASSES) and not is_idle_dropout(node):
            break  # what comes in here would be multiplied too
    return math.prod(factor(node) or 1.0 for node in scales), tuple(scales), query.node


def _linear(query: Node) -> tuple[Node, slice]:
    """The linear that makes a query which nobody else reads, and the rows of its weight that do."""
    node, rows = query, slice(None)
    while node.target is not aten.linear.default:
        _refuse_others("The query", node)
        if node.target is operator.getitem and argument(node, 0).target is aten.split_with_sizes.default:
            parts = argument(node, 0)
            node, rows = _part(parts, node)
        elif node.target in _MOVES or is_idle_dropout(node):
            node = argument(node, 0)
        else:
            raise NotAttentionError(
                f"The query comes from {node.name} ({node.target}), through which no factor moves into a linear."
            )
    if rows == slice(None):
        _refuse_others("The query", node)
    return node, rows


def _part(parts: Node, query: Node) -> tuple[Node, slice]:
    """The merged linear of which a query is one part, and the rows that make it."""
    linear, index = argument(parts, 0), query.args[1]
    sizes: Any = parts.args[1]
    last = len(linear.meta["val"].shape) - 1
    if linear.target is not aten.linear.default or parts.args[2:] not in ((-1,), (last,)) or readers(linear) != [parts]:
        raise NotAttentionError(f"The query is a part ({query.name}) of what is not simply a linear's rows.")
    if len([part for part in parts.users if part.args[1] == index]) > 1:
        raise NotAttentionError(f"The query ({query.name}) is also read by others, as the same part.")
    assert isinstance(index, int)
    start = sum(sizes[:index])
    return linear, slice(start, start + sizes[index])


def _refuse_others(what: str, node: Node) -> None:
    if len(found := readers(node)) > 1:
        names = " and ".join(user.name for user in found)
        raise NotAttentionError(f"{what} {node.name} is read by more than one: {names}.")
