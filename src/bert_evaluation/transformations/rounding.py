"""Rounding: what transformations to numbers of fewer bits share; what they keep, and the worst, which they leave."""

import copy
from collections.abc import Iterable

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.keep_list import why_kept, words
from bert_evaluation.transformations.linear import readers, weight_and_bias
from bert_evaluation.transformations.sensitivity import Left, share_to_leave, with_worst_left


class Rounding(ReversibleTransformation):
    """Sites compute in numbers of fewer bits, but for those that are kept or left.

    `keep` lists what stays as it is: words in the paths of layers, and "logits" for the linears that make the outputs.
    `leave` is the share of the others that stays too: those that cost most when they alone are rounded (see
    `sensitivity`, `calibration`), which one run for each finds out. `anyway` rounds where that is no faster. A subclass
    writes `every_site` and `rewrite`, and says in `why_not` what else speaks against a site.
    """

    promise = Approximates()

    def __init__(
        self, keep: Iterable[str] = ("embeddings", "logits"), anyway: bool = False, leave: float = 0.0
    ) -> None:
        self.keep = words(keep)
        self.anyway = anyway
        self.leave = share_to_leave(leave)

    @property
    def calibrates(self) -> bool:  # type: ignore[override]  # where some are left
        """Whether what it does depends on calibration inputs."""
        return self.leave > 0

    def every_site(self, graph: GraphModule) -> Iterable[Site]:
        """Every candidate in the graph, legal or not, whatever it costs."""
        raise NotImplementedError(f"{self.name} has no sites")

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every candidate in the graph; those to be left are `Left`."""
        if not self.leave:
            return self.every_site(graph)
        whole = copy.copy(self)
        whole.leave = 0.0
        return with_worst_left(graph, whole, self.leave)

    def why_not(self, site: Site) -> str | None:
        """Refuse what is left, and what is kept."""
        if isinstance(site, Left):
            return site.reason
        return next((reason for node in (site.node, *site.nodes) if (reason := why_kept(node, self.keep))), None)


def why_not_linears(site: Site) -> str | None:
    """Why the linears of a site cannot read a weight in other numbers, whatever those are, if so."""
    if fused := next((node for node in site.nodes if node.target is not torch.ops.aten.linear.default), None):
        return f"{fused.name} is fused or packed; quantise linears before that."
    weight = weight_and_bias(site.node)[0]
    if weight.op != "get_attr":
        return f"{site.node.name} reads {weight.name}, which the graph computes: it is no stored parameter."
    if reader := next((user for user in readers(weight) if user not in site.nodes), None):
        return f"{weight.target} is also read by {reader.name}, which would keep the old copy."
    for source in (node.args[0] for node in site.nodes):
        if isinstance(source, Node) and (writer := graphs.writer(source)):
            return f"{writer.name} writes into {source.name} in place."
    return None
