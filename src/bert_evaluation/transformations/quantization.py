"""Linears on 8-bit integers."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels
from bert_evaluation.graph import GraphModule
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.linear import free_name, sites_by_weight, stem, tensor_of, weight_and_bias
from bert_evaluation.transformations.rounding import Rounding, why_not_linears


class QuantizeLinears(Rounding):
    """Linears multiply 8-bit integers: weights rounded once, what they read as it comes.

        y = linear(x, W, b)      becomes      y = bert_evaluation.linear(x, packed W in int8, its scales, b, outputs)

    Symmetric, with a scale for each output of a weight and one for each token, found as the token comes: so nothing is
    calibrated, and no text's answer depends on those beside it. Sums are 32 bits wide, results as x. What follows can
    go into the operator: `FuseLinearActivation`, `FuseResidual`, `FuseSkipLayerNorm`; and `CastToBFloat16` lets it read
    and return bfloat16, `CastToFloat16` float16. The int8 weight takes the place of the other. `keep` lists what stays
    as it is: words in the paths of layers, and "logits" for the linears that make the outputs. `leave` is the share of
    the others that stays too: those that cost most when they alone are quantised (see `sensitivity`, `calibration`),
    which one run for each finds out. Results are the same on every processor: without VNNI, where sums of int8 products
    may overflow, the kernels multiply in 16 bits. One without AVX2, or for which nothing can be compiled, is refused
    unless `anyway`: then in plain PyTorch, slowly, to measure what the answers lose. A site is one weight, wherever
    applied.
    """

    def every_site(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their weight together."""
        return sites_by_weight(graph)

    def why_not(self, site: Site) -> str | None:
        """Refuse what is kept, left, fused or packed, what others read too, and sums that would overflow."""
        if (reason := super().why_not(site) or why_not_linears(site)) is not None:
            return reason
        tensor = tensor_of(weight_and_bias(site.node)[0])
        if tensor.dtype is not torch.float32:
            return f"The weight is {tensor.dtype}, not float32."
        if tensor.shape[1] > kernels.LONGEST:
            return f"It adds {tensor.shape[1]} products; more than {kernels.LONGEST} may not fit into 32 bits."
        reason = kernels.why_not(torch.int8, tensor.device)
        if reason is None or self.anyway:
            return None
        return f"{reason} anyway=True computes it in plain PyTorch, slowly."

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, Tensor]:
        """Quantise the weight, and let every linear read it."""
        weight = weight_and_bias(site.node)[0]
        tensor, module = tensor_of(weight), free_name(graph, stem(weight) + "_int8", "weight").removesuffix(".weight")
        rounded, steps = kernels.quantize(tensor.detach())
        graphs.set_tensor(graph, f"{module}.weight", kernels.pack(rounded.to(torch.int8)))
        graphs.set_tensor(graph, f"{module}.scales", steps.squeeze(-1))
        for linear in site.nodes:
            x, bias = linear.args[0], weight_and_bias(linear)[1]
            with graph.graph.inserting_before(linear):
                stored = (graph.graph.get_attr(f"{module}.{leaf}") for leaf in ("weight", "scales"))
                quantized = graph.graph.call_function(kernels.LINEAR, (x, *stored, bias, len(tensor)))
            quantized.meta["val"] = linear.meta["val"]
            linear.replace_all_uses_with(quantized)
            graph.graph.erase_node(linear)
        return str(weight.target), tensor

    def undo(self, graph: GraphModule, memo: tuple[str, Tensor]) -> None:
        """Put the weight itself back."""
        graphs.set_tensor(graph, *memo)
