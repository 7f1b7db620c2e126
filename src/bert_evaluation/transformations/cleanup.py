"""Transformations that leave every output bit as it is."""

import operator
import types
from collections.abc import Iterable

import torch
from torch import fx

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Bitwise, ReversibleTransformation, Site
from bert_evaluation.transformations.linear import leaves
from bert_evaluation.transformations.written_attention import ASSERTION, is_idle_dropout

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


class ShareRepeated(ReversibleTransformation):
    """What is computed twice is computed once.

        a = arange(length) + 0
        b = arange(length) + 0         becomes         a = arange(length) + 0
        y = f(a, b)                                    y = f(a, a)

    Two nodes are the same if their operators and arguments are. Exports repeat what masks and positions are made of,
    in some families once a layer. Nodes that draw random numbers are no sites.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every node that computes what an earlier one does, beside that one."""
        first: dict[str, Node] = {}
        same: dict[Node, Node] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and _is_function(node)):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: same.get(source, source))
                same[node] = first.setdefault(f"{node.op} {node.target} {args} {sorted(kwargs.items())}", node)
        return [Site(node, (node, like)) for node, like in same.items() if like is not node and node.op != "get_attr"]

    def why_not(self, site: Site) -> str | None:
        """Refuse what is written into in place, and results that leave the graph."""
        node, like = site.nodes
        written = {held for each in node.graph.nodes for held in graphs.overwritten(each)}
        if held := next((each for each in (like, node) if graphs.memory(each) in written), None):
            return f"{held.name} is written into in place: it does not stay what {like.name} and {node.name} both are."
        if leaves(node):
            return f"{node.name} is an output of the graph; it would share memory with {like.name}."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the readers of the later one read the earlier one."""
        node, like = site.nodes
        for assertion in [user for user in node.users if user.target is ASSERTION]:
            graph.graph.erase_node(assertion)  # of the same type as the earlier one
        node.replace_all_uses_with(like)
        graph.graph.erase_node(node)
        self.mark_as_transformed(like)


def _is_function(node: Node) -> bool:
    """Whether a node's result depends on its arguments only, and making it has no other effect."""
    tags = getattr(node.target, "tags", None)
    if tags is not None:
        draws = torch.Tag.nondeterministic_seeded in tags and not is_idle_dropout(node)
        return not (draws or graphs.is_mutable(node) or node.target is ASSERTION)
    return isinstance(node.target, types.BuiltinFunctionType) and node.target.__module__ == operator.__name__
