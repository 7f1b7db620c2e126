"""The masks of attentions are made once for all layers, and no wider than they have to be."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.attention_scale import SDPA
from bert_evaluation.transformations.written_attention import (
    ADDS,
    CASTS,
    SCALES,
    WHERES,
    NotAttentionError,
    before_products,
    broadcast,
    discard,
    scores,
    shape_of,
    type_of,
)

aten = torch.ops.aten

_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONE_BY_ONE = (*CASTS, *WHERES, *_ANDS, *SCALES, *ADDS, aten.bitwise_not.default, aten.logical_not.default)
_ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
# What spreads or cuts a tensor: each number of the result is one of the tensor's.
_SELECTS = (aten.unsqueeze.default, aten.slice.Tensor, aten.view.default, aten.expand.default, *CASTS)


@dataclass(frozen=True)
class _Again:
    """A node to be computed again, of narrower arguments; what its shape will be."""

    node: Node
    args: "tuple[_Narrow | Any, ...]"
    sizes: tuple[Any, ...]


_Narrow = Node | _Again


class HoistMask(ReversibleTransformation):
    """A mask is made once for all layers, and no wider than it has to be.

        m = expand(all_true & keep, [n, 1, l, l])              m = where(keep, 0, -inf)          # [n, 1, 1, l]
        y = scaled_dot_product_attention(.., m)    becomes     y = scaled_dot_product_attention(.., m)
        --------------------------------------------------------------------------------------------------------
        m = where(expand(keep, [n, 1, l, l]), 0, c)            m = where(keep, 0, c)             # [n, 1, 1, l]
        s = scores + m                             becomes     s = scores + m

    A mask that is the same for every query keeps one row for them all, which its readers spread. A boolean one that
    several operators read is made additive once, as each of them does by itself, with the same numbers. A site is a
    mask that attentions read, the operator or ones that are written out.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every mask that attentions read."""
        masks: dict[Node, list[Node]] = {}
        for mask, reader in _masks(graph):
            masks.setdefault(mask, []).append(reader)
        return [Site(mask, tuple(readers)) for mask, readers in masks.items()]

    def why_not(self, site: Site) -> str | None:
        """Refuse a mask that is narrow and additive already, or differs from query to query."""
        mask = site.node
        if _narrowed(mask) is not mask:
            return None
        if type_of(mask) is not torch.bool:
            return f"{mask.name} is additive already, and nothing says that it is wider than it has to be."
        if len(site.nodes) == 1:
            return f"{mask.name} is read by {site.nodes[0].name} only, which makes it additive by itself."
        if graphs.memory(mask) in _written(mask.graph):
            return f"{mask.name} is written into in place."
        if len({type_of(reader) for reader in site.nodes}) > 1:
            return f"The attentions that read {mask.name} differ in type."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Make the mask anew right after it, and let the attentions read that."""
        mask = site.node
        with graph.graph.inserting_before(mask.next):
            made = _built(graph, _narrowed(mask))
            if type_of(mask) is torch.bool and len(site.nodes) > 1:
                made = _additive(graph, made, site.nodes[0].meta["val"])
        for reader in site.nodes:
            reader.replace_input_with(mask, made)
            self.mark_as_transformed(reader)
        self.mark_as_transformed(made)
        discard(graph, mask)


def _masks(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Every mask that an attention reads, and its reader."""
    for attention in graphs.calls(graph, SDPA):
        mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
        if isinstance(mask, Node):
            yield mask, attention
    for softmax in before_products(graph):
        try:
            chain = scores(softmax)
        except NotAttentionError:
            continue  # where it cannot be told which nodes are the scores, it cannot be told which are masks
        for node in chain:
            if node.target in ADDS:
                yield from ((side, node) for side in node.all_input_nodes if side not in chain)


def _narrowed(mask: Node) -> _Narrow:
    """What spreads to a mask, as narrow as can be; the mask itself where that is no narrower."""
    found, wide = _narrow(mask, _written(mask.graph)), shape_of(mask)
    narrow = _text(_sizes(found))
    return found if len(narrow) == len(wide) and narrow[-1:] == wide[-1:] and narrow != wide else mask


def _written(graph: fx.Graph) -> set[Node | str]:
    """Whose memory is written into in place: what it holds is not what its node has made."""
    return {held for node in graph.nodes for held in graphs.writes(node)}


def _narrow(node: Node, written: set[Node | str]) -> _Narrow:
    if graphs.memory(node) in written or graphs.is_mutable(node):
        return node
    if node.target in (aten.expand.default, aten.contiguous.default, aten.clone.default):
        source = node.all_input_nodes[0]
        inner = _narrow(source, written)
        same_rank = len(_sizes(inner)) == len(_sizes(node))
        spread = node.target is aten.expand.default or inner is not source
        return inner if same_rank and spread and graphs.memory(source) not in written else node
    if node.target in _ANDS:
        one, other = node.args
        for kept, all_true in ((one, other), (other, one)):
            if isinstance(kept, Node) and isinstance(all_true, Node) and _is_true(all_true, written):
                inner = _narrow(kept, written)
                if len(_sizes(inner)) == len(_sizes(node)):
                    return inner
    if node.target in _ONE_BY_ONE:
        args = tuple(_narrow(value, written) if isinstance(value, Node) else value for value in node.args)
        sizes: tuple[Any, ...] = ()
        for value in args:
            if isinstance(value, _Narrow):
                sizes = broadcast(sizes, _sizes(value))
        return node if _text(sizes) == shape_of(node) else _Again(node, args, sizes)
    return node


def _sizes(narrow: _Narrow) -> tuple[Any, ...]:
    return narrow.sizes if isinstance(narrow, _Again) else tuple(getattr(narrow.meta.get("val"), "shape", ()))


def _text(sizes: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(str, sizes))


def _is_true(node: Node, written: set[Node | str]) -> bool:
    """Whether a condition is true everywhere."""
    if type_of(node) is not torch.bool or graphs.memory(node) in written:
        return False
    if node.target is aten.ge.Scalar:
        count, least = node.args
        return isinstance(count, Node) and isinstance(least, (int, float)) and least <= 0 and _counts(count, written)
    if node.target in _ANDS:
        return len(node.all_input_nodes) == len(node.args) and all(_is_true(n, written) for n in node.all_input_nodes)
    if node.target in _SELECTS and type_of(node.all_input_nodes[0]) is torch.bool:
        return _is_true(node.all_input_nodes[0], written)
    return node.target in _ONES


def _counts(node: Node, written: set[Node | str]) -> bool:
    """Whether a tensor counts upwards from 0 or more."""
    if graphs.memory(node) in written:
        return False
    if node.target is aten.add.Tensor and not node.kwargs:
        more = node.args[1]
        return isinstance(more, int) and more >= 0 and _counts(node.all_input_nodes[0], written)
    if node.target in _SELECTS:
        return _counts(node.all_input_nodes[0], written)
    return bool(node.target is aten.arange.default)


def _built(graph: GraphModule, narrow: _Narrow) -> Node:
    if isinstance(narrow, Node):
        return narrow
    args = tuple(_built(graph, value) if isinstance(value, _Narrow) else value for value in narrow.args)
    node = graph.graph.call_function(narrow.node.target, args, dict(narrow.node.kwargs))  # type: ignore[arg-type]
    node.meta["val"] = narrow.node.meta["val"].new_empty(narrow.sizes)
    return node


def _additive(graph: GraphModule, keep: Node, like: torch.Tensor) -> Node:
    """0 where a boolean mask is true and -inf elsewhere, of the type of what is masked."""
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    zero = graph.graph.call_function(aten.zeros.default, ([],), kind)
    zero.meta["val"] = like.new_empty(())
    node = graph.graph.call_function(aten.where.ScalarOther, (keep, zero, -math.inf))
    node.meta["val"] = like.new_empty(keep.meta["val"].shape)
    return node
