"""An attention that is written out becomes one operator."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.keeping import KeepsTensors, Kept
from bert_evaluation.transformations.score_masks import Mask, bias_of, floored, mask_of, why_not_mask
from bert_evaluation.transformations.written_attention import (
    VIEWS,
    NotAttentionError,
    Operand,
    argument,
    before_products,
    discard,
    factor,
    operand,
    probabilities,
    readers,
    reshapes,
    scores,
    shape_of,
    type_of,
    writes_between,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Written:
    """An attention as it is written out: what it reads, and the nodes that go."""

    query: Operand
    key: Operand
    value: Node
    scores: tuple[Node, ...]
    probabilities: tuple[Node, ...]
    masks: tuple[Mask, ...]

    @property
    def product(self) -> Node:
        """The product of queries and keys."""
        return self.scores[0]

    @property
    def result(self) -> Node:
        """The product with the values."""
        return self.probabilities[-1]

    @property
    def split(self) -> Node | None:
        """The view of the scores that takes batch and heads apart, if there is one."""
        return next(filter(reshapes, self.scores), None)

    @property
    def scale(self) -> float:
        """What queries times keys are multiplied by, be it before or after something is added."""
        return math.prod([self.query.factor, self.key.factor, *(factor(node) or 1.0 for node in self.scores)])


class FuseAttention(KeepsTensors):
    """An attention written out as products and a softmax becomes one operator, which never holds all the scores.

        s = matmul(q, transpose(k, 2, 3))
        s = s * c + mask                       becomes     y = scaled_dot_product_attention(q, k, v, mask, scale=c)
        y = matmul(softmax(s, -1), v)

    Any number of masks and biases may be added to the scores or filled in: they are added up beforehand in the same
    order, so a mask stays what it was (a finite one gives a fully masked row equal weights, as before). Constants may
    stand at the query, the key or the scores, as factor or divisor. Every softmax before a product is a site. A mask
    that is filled with -inf is refused, since the operator returns 0 where the softmax of a fully masked row is NaN;
    one that an input of the graph brings in cannot be seen.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every softmax whose result reaches a product."""
        return [Site(softmax) for softmax in before_products(graph)]

    def why_not(self, site: Site) -> str | None:
        """Refuse what is no attention, others read, writes in between, and shapes and types that do not fit."""
        try:
            written = _read(site.node)
        except NotAttentionError as reason:
            return str(reason)
        return _why_not_fitting(written) or _why_not_masks(written) or _why_not_in_time(written)

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Put the one operator where the product with the values was."""
        written = _read(site.node)
        stored, read = graphs.tensors(graph), graphs.read_names(graph)
        replaced, split = written.result, written.split
        with graph.graph.inserting_before(replaced):
            like = written.query.node.meta["val"]
            bias = floored(graph, bias_of(graph, written.scores, written.masks, like), replaced)
            query = _oriented(graph, written.query, swapped=False)
            key = _oriented(graph, written.key, swapped=True)
            value = written.value
            if split is not None:
                query, key, value = (
                    _split(graph, split, tensor, length) for tensor, length in ((query, -2), (key, -1), (value, -1))
                )
            arguments = (query, key, value) if bias is None else (query, key, value, bias)
            fused = graph.graph.call_function(
                aten.scaled_dot_product_attention.default, arguments, {"scale": written.scale}
            )
            sizes = (*query.meta["val"].shape[:-1], value.meta["val"].shape[-1])
            fused.meta["val"] = replaced.meta["val"].new_empty(sizes)
            found = fused
            if split is not None:
                after = readers(replaced)
                if len(after) == 1 and after[0].target in VIEWS and shape_of(after[0]) == shape_of(fused):
                    replaced = after[0]  # batch and heads are joined and taken apart again: neither is needed
                else:
                    found = _joined(graph, fused, written)
        replaced.replace_all_uses_with(found)
        discard(graph, replaced)
        return {name: stored[name] for name in read - graphs.read_names(graph)}  # what a scale was computed of


def _read(softmax: Node) -> _Written:
    """The attention around a softmax. Raises NotAttentionError where there is none."""
    rank, dimension = len(shape_of(softmax)), softmax.args[1]
    if not rank or not isinstance(dimension, int):
        raise NotAttentionError(f"The shape of {softmax.name} is unknown.")
    if dimension % rank != rank - 1:
        raise NotAttentionError(f"{softmax.name} is over dimension {dimension}, not over the last one, the keys.")
    after, before = probabilities(softmax), scores(softmax)
    query, key = (operand(argument(before[0], index)) for index in (0, 1))
    masks = [mask_of(node, read) for read, node in itertools.pairwise(before)]
    return _Written(
        query,
        key,
        argument(after[-1], 1),
        tuple(before),
        tuple(after),
        tuple(mask for mask in masks if mask is not None),
    )


def _why_not_fitting(written: _Written) -> str | None:
    """Why shapes or types do not fit those of the operator."""
    query, key = (_shape(each.node, swapped=each.swapped) for each in (written.query, written.key))
    value, product = shape_of(written.value), shape_of(written.product)
    if not (query[:-2] == key[:-2] == value[:-2] and (*query[:-1], key[-1]) == product and key[-1] == value[-2]):
        return (
            f"The shapes of query {_said(query)}, transposed key {_said(key)} and value {_said(value)}"
            " do not fit one attention."
        )
    split, joined = list(filter(reshapes, written.scores)), list(filter(reshapes, written.probabilities))
    if len(split) != len(joined) or len(split) > 1 or (joined and shape_of(joined[0]) != product):
        return f"The scores of {written.product.name} are reshaped, and the probabilities not back in the same way."
    shape = product
    for node in written.scores[1:]:
        if node in split:
            if shape_of(node)[-2:] != shape[-2:] or not isinstance(written.query.node.meta["val"].shape[-1], int):
                return f"{node.name} reshapes more than batch and heads."
            shape = shape_of(node)
        if shape_of(node) != shape:
            return f"{node.name} widens the scores from {_said(shape)} to {_said(shape_of(node))}."
    kinds = {type_of(node) for node in (written.query.node, written.key.node, written.value, written.result)}
    if len(kinds) > 1:
        return f"Query, key, value and result of {written.result.name} differ in type."
    return None


def _why_not_masks(written: _Written) -> str | None:
    """Why the masks cannot be added up beforehand."""
    kind = type_of(written.query.node)
    assert kind is not None
    before_split = written.scores.index(written.split) if written.split is not None else 0
    for mask in written.masks:
        if reason := why_not_mask(mask, kind):
            return reason
        if written.scores.index(mask.by) < before_split and shape_of(mask.tensor) != shape_of(written.product):
            return f"The mask {mask.tensor.name} is spread over the scores before they are reshaped."
    return None


def _why_not_in_time(written: _Written) -> str | None:
    """Why what the operator reads, later than it was read before, would not be the same."""
    first = [((each.scales or (written.product,))[-1], each.node) for each in (written.query, written.key)]
    for reader, tensor in (*first, *((mask.by, mask.tensor) for mask in written.masks)):
        if writer := writes_between(reader, written.result, tensor):
            return f"{writer.name} writes into {tensor.name} in place before the product with the values."
    return None


def _said(shape: Sequence[str]) -> str:
    return f"({', '.join(shape)})"


def _shape(node: Node, swapped: bool) -> tuple[str, ...]:
    *batch, rows, columns = shape_of(node)
    return (*batch, columns, rows) if swapped else (*batch, rows, columns)


def _oriented(graph: GraphModule, tensor: Operand, swapped: bool) -> Node:
    """Query or key as the operator takes it, given whether the product took it with its last dimensions swapped."""
    if tensor.swapped == swapped:
        return tensor.node
    node = graph.graph.call_function(aten.transpose.int, (tensor.node, -2, -1))
    node.meta["val"] = tensor.node.meta["val"].transpose(-2, -1)
    return node


def _split(graph: GraphModule, split: Node, tensor: Node, length: int) -> Node:
    """Query, key or value with batch and heads apart, as the scores have them; `length` says where their length is."""
    sizes: Any = split.args[1]
    width = tensor.meta["val"].shape[-1]
    node = graph.graph.call_function(aten.reshape.default, (tensor, [*sizes[:-2], sizes[length], width]))
    shape = split.meta["val"].shape
    node.meta["val"] = tensor.meta["val"].new_empty((*shape[:-2], shape[length], width))
    return node


def _joined(graph: GraphModule, fused: Node, written: _Written) -> Node:
    """The result with batch and heads joined again, as the probabilities were."""
    sizes: Any = next(filter(reshapes, written.probabilities)).args[1]
    width = fused.meta["val"].shape[-1]
    node = graph.graph.call_function(aten.reshape.default, (fused, [*sizes[:-1], width]))
    node.meta["val"] = written.result.meta["val"]
    return node
