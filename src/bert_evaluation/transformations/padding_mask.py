"""Masks of attention, known by what they let attend to what, however they are computed."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from bert_evaluation.graph import Node
from bert_evaluation.signature import MASK
from bert_evaluation.transformations.linear import tensor_of

# The batches and lengths that a mask is computed for. The long one is for local attention, whose windows are shorter.
SIZES = ((3, 7), (1, 2048))
NOTHING = -1e4  # what is added to a score, at most, so that nothing is left of it after softmax


def why_not_padding_mask(mask: Node) -> str | None:
    """Why this is not the mask that lets every token attend to all that the input MASK marks, and to nothing else."""
    cone = _cone(mask)
    for node in cone:
        sizes_only = all(user.target is torch.ops.aten.sym_size.int for user in node.users if user in cone)
        if node.op == "placeholder" and node.target != MASK and not sizes_only:
            return f"{mask.name} is no padding mask: it depends on {node.name} too."
    random = torch.Generator().manual_seed(0)
    for batch, length in SIZES:
        real = torch.rand(batch, length, generator=random) < 0.5
        try:
            found = _computed(cone, real).broadcast_to(batch, 1, length, length)
        except (RuntimeError, IndexError):
            return f"{mask.name} is not known to be a padding mask: it could not be computed for {length} tokens."
        allowed = real.to(found.device)[:, None, None, :]
        right = found == allowed if found.dtype is torch.bool else torch.where(allowed, found == 0, found <= NOTHING)
        if not bool(right.all()):
            return f"{mask.name} is no padding mask: not every token attends to all that {MASK} marks, and to no other."
    return None


def boolean_of(mask: Node) -> Node | None:
    """The boolean mask that an additive one, 0 or -inf, was made of: attention makes the same of either."""
    if mask.target is not torch.ops.aten.where.ScalarOther or mask.args[2] != -math.inf:
        return None
    keep, zero = mask.args[:2]
    assert isinstance(keep, Node)
    is_zero = isinstance(zero, Node) and zero.target is torch.ops.aten.zeros.default
    return keep if is_zero and keep.meta["val"].dtype is torch.bool else None


def _cone(node: Node) -> list[Node]:
    """The node and all that it depends on, in program order."""
    found = {node}
    for each in reversed(node.graph.nodes):
        if each in found:
            found.update(each.all_input_nodes)
    return [each for each in node.graph.nodes if each in found]


@torch.no_grad()
def _computed(cone: list[Node], real: Tensor) -> Tensor:
    """What the last of these nodes returns where real tokens are these."""
    values: dict[Node, Any] = {}
    for node in cone:
        if node.op == "placeholder":
            like = node.meta["val"]
            values[node] = (real if node.target == MASK else torch.zeros_like(real)).to(like.device, like.dtype)
        elif node.op == "get_attr":
            values[node] = tensor_of(node)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    result = values[cone[-1]]
    assert isinstance(result, Tensor)
    return result
