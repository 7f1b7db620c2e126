"""Padding goes: what is computed for each token is computed for real tokens only."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from bert_evaluation import varlen
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.signature import MASK
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.heads import Attention, RefusedError, attentions, call, drop, heads_at
from bert_evaluation.transformations.lookups import flat, packed
from bert_evaluation.transformations.padding_mask import why_not_padding_mask
from bert_evaluation.transformations.positions import closing, is_position_wise, shape, shapes, why_not_position_wise

aten = torch.ops.aten


class RemovePadding(ReversibleTransformation):
    """Tokens of padding are left out of every operator, and each sequence attends to itself.

        e = embedding(W, ids)                            p = places(attention_mask)
        ...                                              o = offsets(attention_mask)
        x = layer_norm(e, ...)                           e = embedding(W, unpad(ids, p))
        ...                                              x = layer_norm(e, ...)
        a = attention(heads(q), ..., mask)   becomes     a = varlen_attention(q, k, v, o, length, heads, scale)
        ...                                              ...
        y = linear(z, W, b)                              y = pad(linear(z, W, b), attention_mask)

    Inputs and outputs keep their shapes. Outputs at padding, which mean nothing, are zeros, so the promise is about the
    others. The site is the whole graph from the input of the first attention on: all that depends on it has to treat
    each position by itself, or to be attention with the padding mask and no other.
    """

    promise = Reassociates(where=MASK)

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """The first attention, as one operator or written out."""
        return [Site(node) for node in attentions(graph.graph)][:1]

    def why_not(self, site: Site) -> str | None:
        """Refuse whatever mixes positions in another way; the sentence names it."""
        try:
            _plan(site.node.graph)
        except RefusedError as refusal:
            return str(refusal)
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Unpad in front, exchange the attentions, pad behind."""
        plan = _plan(site.node.graph)
        entry, inside = plan.entry, {*plan.packed, *(node for each in plan.attentions for node in each.inner)}
        with graph.graph.inserting_before(min(entry.users)):
            marks = plan.mask.meta["val"]
            one = marks.new_empty((*marks.shape, 1), dtype=torch.int64)
            places = call(varlen.PLACES, (plan.mask,), entry, flat(one))
            unpadded = packed(entry, places, plan.mask)
            offsets = call(varlen.OFFSETS, (plan.mask,), entry, varlen.OFFSETS(marks))
            length = call(aten.sym_size.int, (plan.mask, 1), entry, marks.shape[1])
        entry.replace_all_uses_with(unpadded, delete_user_cb=inside.__contains__)
        for node in plan.packed:
            if leaving := {user for user in node.users if user in plan.closing or user.op == "output"}:
                with graph.graph.inserting_after(node):
                    padded = call(varlen.PAD, (node, plan.mask), node, node.meta["val"])
                node.replace_all_uses_with(padded, delete_user_cb=leaving.__contains__)
            node.meta["val"] = flat(node.meta.get("val"))
        for each in plan.attentions:
            with graph.graph.inserting_before(each.result):
                arguments = (*(split.args[0] for split in each.splits), offsets, length, each.heads, each.scale)
                attended = call(varlen.ATTENTION, arguments, each.node, each.result.meta["val"])
            each.result.replace_all_uses_with(attended)
        drop(graph.graph, {node for each in plan.attentions for node in (*each.inner, each.result)})


@dataclass(frozen=True)
class _Plan:
    """What is to be packed: all that depends on `entry`, but for the `closing` nodes, which read padded results."""

    entry: Node
    mask: Node
    attentions: tuple[Attention, ...]
    packed: tuple[Node, ...]
    closing: frozenset[Node]


def _plan(graph: fx.Graph) -> _Plan:
    """What to pack. Raises RefusedError."""
    mask = next((node for node in graph.find_nodes(op="placeholder") if node.target == MASK), None)
    if mask is None:
        raise RefusedError(f"The graph has no input {MASK} that says what is padding.")
    found = tuple(map(_padded_attention, attentions(graph)))
    for reason in map(why_not_padding_mask, dict.fromkeys(each.mask for each in found if each.mask is not None)):
        if reason is not None:
            raise RefusedError(reason)
    entry = _entry(found[0])
    after = _dependents(entry)
    last, inner = closing(after), frozenset[Node]().union(*(each.inner for each in found))
    inside = [node for node in after if node not in last and node not in inner]
    _hold_packable(entry, inside, found, inner)
    return _Plan(entry, mask, found, tuple(inside), frozenset(last))


def _hold_packable(entry: Node, packed: list[Node], attentions: tuple[Attention, ...], inner: frozenset[Node]) -> None:
    known, results = {entry, *packed}, {each.result for each in attentions}
    for node in packed:
        if node not in results and (reason := why_not_position_wise(node, known)) is not None:
            raise RefusedError(reason)
        if any(len(each) != 3 or each[:2] != shape(entry)[:2] for each in shapes(node)):
            raise RefusedError(f"{node.name} has another shape than (batch, length, width).")
    for each in attentions:
        if stray := next((split for split in each.splits if split.args[0] not in known), None):
            raise RefusedError(f"{each.node.name} attends to {stray.args[0]}, which does not depend on {entry.name}.")
    for node in inner:
        if reader := next((user for user in node.users if user not in inner and user not in results), None):
            raise RefusedError(f"{node.name}, a part of attention, is also read by {reader.name}.")


def _padded_attention(node: Node) -> Attention:
    found = heads_at(node)
    if found.mask is None:
        raise RefusedError(f"{node.name} attends to padding too: it has no mask.")
    return found


def _entry(first: Attention) -> Node:
    """Where packing begins: as far in front of the first attention as each node is computed of one tensor alone."""
    entry = first.splits[0].args[0]
    assert isinstance(entry, Node)
    while is_position_wise(entry):
        # Two parts of what one node returns are one source.
        whole = {
            each: each.all_input_nodes[0] if each.target is operator.getitem else each for each in entry.all_input_nodes
        }
        sources = list(dict.fromkeys(each for each in whole.values() if each.op != "get_attr"))
        if len(sources) != 1 or shapes(sources[0])[0][:2] != shapes(entry)[0][:2]:
            break
        entry = sources[0]
    if len(shape(entry)) != 3:
        raise RefusedError(f"{entry.name}, where packing would begin, is not of shape (batch, length, width).")
    return entry


def _dependents(entry: Node) -> list[Node]:
    """Every node but the output that depends on this one, in program order."""
    found = {entry: None}
    for node in entry.graph.nodes:
        if node.op != "output" and any(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)[1:]
