"""What packed tokens are made of: embeddings are looked up for real tokens only."""

from typing import Any

import torch
from torch import Tensor

from bert_evaluation import varlen
from bert_evaluation.graph import Node
from bert_evaluation.transformations.heads import call
from bert_evaluation.transformations.positions import LINEARS, is_position_wise, shape

aten = torch.ops.aten


def packed(node: Node, places: Node, mask: Node) -> Node:
    """The real tokens of what a node returns, (1, tokens, width), called where the graph is being inserted into.

    Sums of embeddings are made again of the real tokens' numbers; anything else is packed as it is.
    """
    if not _is_looked_up(node):
        return call(varlen.UNPAD, (node, places), node, flat(node.meta["val"]))
    if node.target is aten.embedding.default:
        weight, numbers, *others = node.args
        assert isinstance(numbers, Node)
        if shape(numbers)[0] == 1:  # one row for all texts, as positions are
            texts, value = mask.meta["val"].shape[0], numbers.meta["val"]
            size = call(aten.sym_size.int, (mask, 0), node, texts)
            spread = value.new_empty((texts, value.shape[1]))
            numbers = call(aten.expand.default, (numbers, [size, -1]), node, spread)
        real = call(varlen.UNPAD, (numbers, places), node, flat(numbers.meta["val"]))
        return call(node.target, (weight, real, *others), node, flat(node.meta["val"]))
    again = {each: packed(each, places, mask) for each in node.all_input_nodes}
    copy = node.graph.node_copy(node, again.__getitem__)
    copy.meta["val"] = flat(node.meta["val"])
    return copy


def flat(value: Any) -> Any:
    """The fake value of what is packed: of batch times length tokens, which is the most that there can be.

    How many there are depends on what the mask holds. No expression of the inputs' sizes says that, and a size of which
    nothing is known would be equal to no other; this one is the same for all that is packed together.
    """
    if not isinstance(value, Tensor):
        return [flat(each) for each in value] if isinstance(value, (list, tuple)) else value
    batch, length, *width = value.shape
    return value.new_empty((1, batch * length, *width))


def _is_looked_up(node: Node) -> bool:
    """Whether a node returns what is looked up for each token alone, or is computed of such results alone."""
    if node.target is aten.embedding.default:
        return isinstance(node.args[1], Node) and len(shape(node.args[1])) == 2
    return (
        is_position_wise(node)
        and node.target not in LINEARS
        and len(shape(node)) == 3
        and bool(node.all_input_nodes)
        and all(map(_is_looked_up, node.all_input_nodes))
    )
