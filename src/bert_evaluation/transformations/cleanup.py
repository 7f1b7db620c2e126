"""Transformations that leave every output bit as it is."""

from collections.abc import Iterable

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation, Site

aten = torch.ops.aten


class LintAndRecompile(ReversibleTransformation):
    """Check that the graph is well formed and make its code anew. It has no sites: the graph stays the same."""

    promise = Bitwise()


class DeepCopy(ReversibleTransformation):
    """Return a graph of its own; it shares tensors, since no transformation ever writes into one."""

    promise = Bitwise()

    def __call__(
        self,
        graph_module: GraphModule,
        lint_and_recompile: bool = True,  # noqa: ARG002  # a fork is always compiled
        reverse: bool = False,  # noqa: ARG002  # the reverse of a copy is a copy, as in optimum.fx
    ) -> GraphModule:
        """Return the copy."""
        return graphs.fork(graph_module)


class RemoveDropout(ReversibleTransformation):
    """Dropout that is switched off goes.

        a = f(x)
        b = dropout(a, 0.1, train=False)      becomes     a = f(x)
        y = g(b)                                          y = g(a)

    Exporting a model in eval mode leaves these nodes in. In eval mode the operator returns its input itself, so the
    outputs gain no alias that they did not have.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every dropout operator."""
        kinds = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
        in_place = (aten.dropout_, aten.feature_dropout_, aten.alpha_dropout_, aten.feature_alpha_dropout_)
        return [Site(node) for node in graphs.calls(graph, *(kind.default for kind in kinds + in_place))]

    def why_not(self, site: Site) -> str | None:
        """Refuse dropout that is on, or may be."""
        _, probability, train = site.node.args
        if train is False or probability == 0:
            return None
        return f"{site.node.name} is switched on (train={train}): without it the outputs would change."

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the readers of the dropout read its input."""
        source = site.node.all_input_nodes[0]
        site.node.replace_all_uses_with(source)
        graph.graph.erase_node(site.node)
        self.mark_as_transformed(source)
