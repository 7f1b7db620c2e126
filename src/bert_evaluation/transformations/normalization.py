"""LayerNorm, as the end of the linear whose sum with a residual it reads."""

from collections.abc import Iterable

import torch

from bert_evaluation import kernels
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.linear import tensor_of
from bert_evaluation.transformations.tiles import why_not_ended, with_ending

aten = torch.ops.aten
NORM = aten.layer_norm.default


class FuseSkipLayerNorm(ReversibleTransformation):
    """A linear in tiles, with the residual added to it, and the LayerNorm that alone reads it become one operator.

        y = bert_evaluation.linear(x, W, s, b, n, "none", r)
        z = layer_norm(y, [n], g, c, eps)
                becomes          z = bert_evaluation.linear(x, W, s, b, n, "none", r, g, c, eps)

    The sum stays in float32 and in the cache, where before it was rounded and written. For `TileLinears` and
    `QuantizeLinears`, behind `FuseResidual`.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every LayerNorm."""
        return [Site(node) for node in graph.graph.nodes if node.target is NORM]

    def why_not(self, site: Site) -> str | None:
        """Refuse a LayerNorm of anything else, over more than the last dimension, or without weights of its own."""
        source, sizes, weight, bias, _ = _arguments(site.node)
        if source.target is not kernels.LINEAR:
            return f"It reads {source.name}, which is no linear in tiles (TileLinears, QuantizeLinears)."
        if list(sizes) != [source.args[4]]:
            return "It is over more than the last dimension."
        stored = [each for each in (weight, bias) if each is not None]
        if weight is None or any(
            each.op != "get_attr" or tensor_of(each).dtype is not torch.float32 for each in stored
        ):
            return "Its weights are not stored in float32."
        if site.node.meta["val"].dtype is not source.meta["val"].dtype:
            return "It returns another type than the linear."
        return why_not_ended(source, (site.node,), "norm_weight")

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the linear end with the LayerNorm."""
        node = site.node
        source, _, weight, bias, eps = _arguments(node)
        with graph.graph.inserting_before(node):
            arguments = with_ending(source, norm_weight=weight, norm_bias=bias, eps=eps)
            fused = graph.graph.call_function(kernels.LINEAR, arguments)
        fused.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
        graph.graph.erase_node(source)


def _arguments(node: Node) -> tuple[Node, list[int], Node | None, Node | None, float]:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    found = {"weight": None, "bias": None, "eps": 1e-5} | dict(zip(names, node.args, strict=False)) | node.kwargs
    return tuple(found[name] for name in names)  # type: ignore[return-value]
