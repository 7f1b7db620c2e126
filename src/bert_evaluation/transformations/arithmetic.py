"""Transformations of single arithmetic operators."""

import math
from collections.abc import Iterable

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site

aten = torch.ops.aten


class ChangeTrueDivToMulByInverse(ReversibleTransformation):
    """A division by a constant becomes a multiplication by its inverse.

        y = x / k          becomes          y = x * (1 / k)

    The undone graph divides by k itself: it is kept, not recomputed, as 1 / (1 / 49) is not 49.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every division."""
        kinds = (aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.div_.Tensor)
        return [Site(node) for node in graphs.calls(graph, *kinds, aten.true_divide.Tensor, aten.div_.Scalar)]

    def why_not(self, site: Site) -> str | None:
        """Refuse what is no true division by a constant, or whose inverse the result's type cannot hold."""
        node = site.node
        divisor = node.args[1]
        if node.kwargs.get("rounding_mode") is not None or graphs.is_mutable(node):
            return f"{node.name} rounds its quotient or writes in place: it is no plain true division."
        if isinstance(divisor, Node):
            return f"The divisor of {node.name}, {divisor.name}, is no constant of the graph."
        if not isinstance(divisor, (int, float)) or divisor == 0 or not math.isfinite(divisor):
            return f"The divisor of {node.name}, {divisor}, has no inverse."
        value = node.meta.get("val")
        if value is None:
            return f"The type of {node.name} is unknown."
        limits = torch.finfo(value.dtype)
        if not limits.smallest_normal <= abs(1 / divisor) <= limits.max:
            return f"The inverse of {divisor} is out of the range of {value.dtype}."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Multiply instead."""
        node = site.node
        dividend, divisor = node.args[:2]
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(aten.mul.Tensor, (dividend, 1 / divisor))  # type: ignore[operator]
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
