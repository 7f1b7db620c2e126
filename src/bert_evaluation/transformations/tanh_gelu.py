"""GELU at the end of a product, for an NVIDIA GPU."""

from collections.abc import Iterable

import torch

from bert_evaluation.graph import GraphModule
from bert_evaluation.partial_products import HALVES
from bert_evaluation.promise import Approximates
from bert_evaluation.tanh_gelu import LINEAR_GELU
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.activations import activation_at, activations
from bert_evaluation.transformations.heads import call
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias, written_between

aten = torch.ops.aten
DEVICE = "cuda"


class FuseTanhGelu(ReversibleTransformation):
    """A linear and the GELU that alone reads it become one product, which ends with GELU's form with tanh.

        y = linear(x, W, b)          becomes          z = linear_gelu(x, W, b)
        z = gelu(y)

    0.5 x (1 + tanh(0.798 (x + 0.0447 x³))) is nowhere 5e-4 away from the exact form (Hendrycks and Gimpel, 2016,
    arXiv:1606.08415), and bfloat16 rounds numbers around 1 by up to 4e-3. cuBLAS computes it before the sums are
    written, so that the largest tensor of a layer is written once, and not read and written again. It comes behind
    `CastToBFloat16` or `CastToFloat16` and `RemovePadding`. A CPU, and float32, are refused unless `anyway`.
    """

    promise = Approximates()

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every GELU, however it is written."""
        found = activations(graph.graph.nodes)
        return [Site(each.nodes[-1], each.nodes) for each in found if each.activation.name == "gelu"]

    def why_not(self, site: Site) -> str | None:
        """Refuse a GELU of what is no linear, or of one that others read too, and where no product ends with it."""
        found = activation_at(site.node)
        assert found is not None
        linear = found.source
        if linear.target is not aten.linear.default:
            return f"{linear.name} is no plain linear, but {linear.target}."
        for node in (linear, *found.nodes[:-1]):
            if outside := next((user for user in node.users if user not in found.nodes), None):
                return f"{node.name} is also read by {outside.name}."
        weight, bias = weight_and_bias(linear)
        if weight.op != "get_attr" or bias is None:
            return f"{linear.name} has no bias, or reads a weight that the graph computes."
        if writer := written_between(linear, site.node):
            return f"{writer.name} writes in place between them."
        tensor, result = tensor_of(weight), site.node.meta["val"]
        if result.dtype is not tensor.dtype:
            return f"Its weight is {tensor.dtype} and its result {result.dtype}."
        if self.anyway:
            return None
        if tensor.device.type != DEVICE:
            return f"It is for an NVIDIA GPU, and the graph is on {tensor.device}."
        return None if tensor.dtype in HALVES else f"It is for 16 bits, and {linear.name} computes in {tensor.dtype}."

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Put the product where the GELU was."""
        found = activation_at(site.node)
        assert found is not None
        linear = found.source
        arguments = (linear.args[0], *weight_and_bias(linear))
        with graph.graph.inserting_before(site.node):
            fused = call(LINEAR_GELU, arguments, linear, site.node.meta["val"])
        site.node.replace_all_uses_with(fused)
        for node in (*reversed(found.nodes), linear):
            graph.graph.erase_node(node)
