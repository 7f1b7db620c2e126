"""Linears on 8-bit integers."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from bert_evaluation import graph as graphs
from bert_evaluation import int8, onednn
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Approximates, ReversibleTransformation, Site
from bert_evaluation.transformations.linear import (
    free_name,
    readers,
    sites_by_weight,
    stem,
    tensor_of,
    weight_and_bias,
)
from bert_evaluation.transformations.precision import CAST, why_kept, words

aten = torch.ops.aten


class QuantizeLinears(ReversibleTransformation):
    """Linears multiply 8-bit integers: weights rounded once, what they read as it comes.

        y = linear(x, W, b)        becomes        s = max(abs(x)) / 127, of each token
                                                  t = to(x / s + 128.5, uint8)
                                                  y = b + linear_int8(t, W in int8, its scales) * s

    Symmetric, with a scale for each output of a weight and one for each token, found as the token comes: so nothing is
    calibrated, and no text's answer depends on those beside it. Sums are 32 bits wide, results float32. Linears that
    read the same tensor read the same integers. The int8 weight takes the place of the other. `keep` lists what stays
    in float32: words in the paths of layers, and "logits" for the linears that make the outputs. A processor whose
    sums overflow is refused unless `anyway`: then in plain PyTorch, slowly, to measure what the answers lose. A site is
    one weight, wherever applied.
    """

    promise = Approximates()

    def __init__(self, keep: Iterable[str] = ("embeddings", "logits"), anyway: bool = False) -> None:
        self.keep = words(keep)
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their weight together."""
        return sites_by_weight(graph)

    def why_not(self, site: Site) -> str | None:
        """Refuse what is kept, fused or packed, what others read too, and sums that would overflow."""
        if reason := next((reason for node in site.nodes if (reason := why_kept(node, self.keep))), None):
            return reason
        if fused := next((node for node in site.nodes if node.target is not aten.linear.default), None):
            return f"{fused.name} is fused or packed; quantise linears before that."
        weight = weight_and_bias(site.node)[0]
        if weight.op != "get_attr":
            return f"{site.node.name} reads {weight.name}, which the graph computes: it is no stored parameter."
        if reader := next((user for user in readers(weight) if user not in site.nodes), None):
            return f"{weight.target} is also read by {reader.name}, which would keep the old copy."
        tensor = tensor_of(weight)
        if tensor.dtype is not torch.float32:
            return f"The weight is {tensor.dtype}, not float32."
        if tensor.shape[1] > int8.LONGEST:
            return f"It adds {tensor.shape[1]} products; more than {int8.LONGEST} may not fit into 32 bits."
        for source in (node.args[0] for node in site.nodes):
            if isinstance(source, Node) and (writer := graphs.writer(source)):
                return f"{writer.name} writes into {source.name} in place."
        reason = onednn.why_not_int8(tensor)
        if reason is None or self.anyway:
            return None
        return f"{reason} anyway=True computes it in plain PyTorch, slowly."

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, Tensor]:
        """Quantise the weight, and before each of its linears what that reads."""
        weight = weight_and_bias(site.node)[0]
        tensor = tensor_of(weight)
        rounded, scales = int8.quantize_weight(tensor.detach())
        fast = onednn.why_not_int8(tensor) is None
        stored = {"weight": onednn.pack(rounded) if fast else rounded, "scales": scales}
        if fast:
            stored["zeros"] = torch.zeros(len(scales), dtype=torch.int64)
        module = free_name(graph, stem(weight) + "_int8", "weight").removesuffix(".weight")
        for leaf, each in stored.items():
            graphs.set_tensor(graph, f"{module}.{leaf}", each)
        for linear in site.nodes:
            with graph.graph.inserting_before(linear):
                _replace(graph, linear, [f"{module}.{leaf}" for leaf in stored])
        return str(weight.target), tensor

    def undo(self, graph: GraphModule, memo: tuple[str, Tensor]) -> None:
        """Put the weight itself back."""
        graphs.set_tensor(graph, *memo)


def _known(x: Node, reader: Node) -> tuple[Node, Node] | None:
    """The integers of a tensor, and their scales, that another linear reads already, if one does."""
    for steps in x.users:
        for shifted in steps.users:
            for tokens in shifted.users:
                ours = [each.target for each in (steps, shifted, tokens)] == [aten.div.Tensor, aten.add.Tensor, CAST]
                if ours and tokens.args[1] is torch.uint8 and steps.args[0] is x and tokens < reader:
                    scale = steps.args[1]
                    assert isinstance(scale, Node)
                    return tokens, scale
    return None


def _quantized(x: Node) -> tuple[Node, Node]:
    """New nodes for the integers of a tensor, and for their scales, where the graph inserts."""
    tokens, scale = int8.quantize_tokens(fx.Proxy(x, fx.proxy.GraphAppendingTracer(x.graph)))
    return tokens.node, scale.node


def _replace(graph: GraphModule, linear: Node, stored: Iterable[str]) -> None:
    """Compute what the linear does from integers; nodes go where the graph inserts."""
    x, bias = linear.args[0], weight_and_bias(linear)[1]
    assert isinstance(x, Node)
    tokens, scale = _known(x, linear) or _quantized(x)
    weight, scales, *zeros = (graph.graph.get_attr(name) for name in stored)
    if zeros:
        product = graph.graph.call_function(onednn.INT8, onednn.int8_arguments(tokens, weight, scales, *zeros))
    else:
        product = graph.graph.call_function(int8.LINEAR, (tokens, weight, scales))
    result = (
        graph.graph.call_function(aten.mul.Tensor, (product, scale))
        if bias is None
        else graph.graph.call_function(aten.addcmul.default, (bias, product, scale))
    )
    product.meta["val"] = result.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(result)
    graph.graph.erase_node(linear)
