"""Linears in float8."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from bert_evaluation import float8, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.activations import activation_at
from bert_evaluation.transformations.heads import call
from bert_evaluation.transformations.linear import free_name, sites_by_weight, stem, tensor_of, weight_and_bias
from bert_evaluation.transformations.rounding import Rounding, why_not_linears


class QuantizeToFloat8(Rounding):
    """Linears multiply float8 numbers: weights rounded once, what they read as it comes.

        y = gelu(x)                                 q, s = float8_rows(x, "gelu")
        z = linear(y, W, b)       becomes           z = float8_linear(q, s, W', scales of W', b, bfloat16)

    Each token, and each output of a weight, has a scale of its own, found as it comes: so nothing is calibrated, and no
    text's answer depends on those beside it. An activation that only linears read is computed where it is rounded;
    linears that read one tensor round it once. The weight takes the place of the other, in half of its memory. It comes
    behind `CastToBFloat16`, since products are returned in bfloat16. `keep` lists what stays as it is: words in the
    paths of layers, and "logits" for the linears that make the outputs. `leave` is the share of the others that stays
    too: those that cost most when they alone are quantised (see `sensitivity`, `calibration`), which one run for each
    finds out. A device that does not multiply float8 is refused unless `anyway`: then in plain PyTorch, slowly, to
    measure what the answers lose. A site is one weight, wherever applied.
    """

    def every_site(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their weight together."""
        return sites_by_weight(graph)

    def why_not(self, site: Site) -> str | None:
        """Refuse what is kept, left, fused or read by others, other types and sizes, and a device without float8."""
        if (reason := super().why_not(site) or why_not_linears(site)) is not None:
            return reason
        weight = tensor_of(weight_and_bias(site.node)[0])
        if any(size % float8.MULTIPLE for size in weight.shape):
            return f"Its weight is {weight.shape[0]} by {weight.shape[1]}; float8 goes by {float8.MULTIPLE}."
        reason = float8.why_not(weight.device)
        if reason is not None and not self.anyway:
            return f"{reason} anyway=True computes it in plain PyTorch, slowly."
        if weight.dtype is not torch.bfloat16 and (reason is None or weight.dtype is not torch.float32):
            return f"It computes in {weight.dtype}, and products of float8 are bfloat16; apply CastToBFloat16 before."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, Tensor]:
        """Round the weight, and let every linear read it."""
        weight = weight_and_bias(site.node)[0]
        tensor, name = tensor_of(weight), free_name(graph, stem(weight) + "_float8", "weight")
        rounded, scales = float8.quantize(tensor.detach())
        scales_name = f"{name.removesuffix('.weight')}.scales"
        graphs.set_tensor(graph, name, rounded)
        graphs.set_tensor(graph, scales_name, scales)
        for linear in site.nodes:
            x, bias = linear.args[0], weight_and_bias(linear)[1]
            assert isinstance(x, Node)
            numbers, steps = _rows(x, linear)
            with graph.graph.inserting_before(linear):
                stored = (graph.graph.get_attr(each) for each in (name, scales_name))
                arguments = (numbers, steps, *stored, bias, tensor.dtype)
                product = call(float8.LINEAR, arguments, linear, linear.meta["val"])
            linear.replace_all_uses_with(product)
            graph.graph.erase_node(linear)
        return str(weight.target), tensor

    def undo(self, graph: GraphModule, memo: tuple[str, Tensor]) -> None:
        """Put the weight itself back."""
        graphs.set_tensor(graph, *memo)


def _rows(x: Node, linear: Node) -> tuple[Node, Node]:
    """Nodes of what a linear reads, in float8, and of its scales: those that are there, or new ones in front of it."""
    source, activation = x, "none"
    found = activation_at(x)
    if found is not None and found.activation.label in kernels.ACTIVATIONS and _is_read_by(found.nodes, linear):
        source, activation = found.source, found.activation.label
    arguments = (source, activation)
    rows = next((each for each in source.users if each.target is float8.ROWS and each.args == arguments), None)
    if rows is None:
        with linear.graph.inserting_before(linear):
            value = source.meta["val"]
            rows = call(float8.ROWS, arguments, linear, float8.ROWS(value, activation))
            for place in range(2):
                call(operator.getitem, (rows, place), linear, rows.meta["val"][place])
    parts = {user.args[1]: user for user in rows.users}
    return parts[0], parts[1]


def _is_read_by(nodes: tuple[Node, ...], linear: Node) -> bool:
    """Whether nothing but this linear, and these nodes themselves, read them."""
    return all(user in (*nodes, linear) for node in nodes for user in node.users)
