"""Long sums of a product are computed in parts, for a GPU that has little else to do."""

from collections.abc import Iterable

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule
from bert_evaluation.partial_products import HALVES, PRODUCTS
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.heads import call
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias

aten = torch.ops.aten
# A GPU computes a product in tiles of some 64 rows and columns. Those of fewer outputs take next to no time, and those
# of more outputs than inputs are many already.
LEAST_INPUTS, LEAST_OUTPUTS = 1024, 256
DEVICE = "cuda"
TYPES = (torch.float32, torch.float64, *HALVES)


class SplitLinears(ReversibleTransformation):
    """A linear with long sums becomes several at the same time, each over some of its inputs, which are added.

        y = linear(x, W, b)          becomes          p = partial_products(x, W, 4)
                                                      y = (p[0] + p[1] + p[2] + p[3] + b).to(x.dtype)

    For the latency of a text on a GPU: a product of few rows and few outputs keeps few of its multiprocessors busy, for
    as long as the sums are. Behind it Compile adds in the kernel of what follows. Of many rows it is slower, since what
    is added is written and read, in float32. A CPU is refused unless `anyway`, which takes weights of any size, too.
    """

    promise = Reassociates()

    def __init__(self, parts: int = 4, anyway: bool = False) -> None:
        if parts < 2:
            raise ValueError(f"parts is {parts}; a linear is split in 2 or more.")
        self.parts = parts
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear."""
        return [Site(node) for node in graphs.calls(graph, aten.linear.default)]

    def why_not(self, site: Site) -> str | None:
        """Refuse other types, sums that do not come apart evenly or are short, and devices that gain nothing."""
        linear = site.node
        stored = weight_and_bias(linear)[0]
        if stored.op != "get_attr":
            return f"{linear.name} reads {stored.name}, which the graph computes: it is no stored parameter."
        weight, value = tensor_of(stored), linear.meta["val"]
        outputs, inputs = weight.shape
        if weight.dtype not in TYPES or weight.dtype is not value.dtype:
            return f"Its weight is {weight.dtype} and its result {value.dtype}."
        if inputs % self.parts:
            return f"Its {inputs} inputs do not come apart in {self.parts} equal parts."
        if self.anyway:
            return None
        if weight.device.type != DEVICE:
            return f"The cores of a CPU share the rows of a product, and the graph is on {weight.device}."
        if inputs < LEAST_INPUTS or not LEAST_OUTPUTS <= outputs <= inputs:
            return (
                f"Its weight is {outputs} by {inputs}; sums are worth it from {LEAST_INPUTS} inputs on,"
                f" with {LEAST_OUTPUTS} outputs or more, up to as many as inputs."
            )
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Put the products and their sum where the linear was; its weight is read as it is."""
        linear = site.node
        weight, bias = weight_and_bias(linear)
        value = linear.meta["val"]
        kind = torch.float32 if value.dtype in HALVES else value.dtype
        part = value.new_empty(value.shape, dtype=kind)
        with graph.graph.inserting_before(linear):
            arguments = (linear.args[0], weight, self.parts)
            products = call(PRODUCTS, arguments, linear, value.new_empty((self.parts, *value.shape), dtype=kind))
            total, *others = (call(aten.select.int, (products, 0, each), linear, part) for each in range(self.parts))
            for other in others if bias is None else [*others, bias]:
                total = call(aten.add.Tensor, (total, other), linear, part)
            if kind is not value.dtype:
                total = call(aten.to.dtype, (total, value.dtype), linear, value)
        linear.replace_all_uses_with(total)
        graph.graph.erase_node(linear)
