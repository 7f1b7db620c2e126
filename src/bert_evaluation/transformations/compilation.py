"""The graph as machine code, made by torch's own compiler."""

from collections.abc import Iterable

from bert_evaluation import compiled
from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule
from bert_evaluation.transformation import Reassociates, ReversibleTransformation, Site


class Compile(ReversibleTransformation):
    """TorchInductor compiles the whole graph: what stands between large operators becomes loops in C++, without Python.

        y = linear(x, W, b)                           y = linear(x, W, b)
        z = gelu(y)                     becomes       for (...) v[i] = gelu(y[i]) + x[i]
        v = z + x

    The nodes stay as they were, for all that reads them: listing, float64, memory (which is at most what they take).
    A call alone goes to the compiled code, which the first one makes, in up to a minute, once for all sizes of inputs.
    So it is the last step: others raise TransformationError behind it. What is saved is the graph before it.

    The promise holds in bfloat16 and float16 too: Inductor keeps float32 between the operators that it fuses, so it
    rounds less often, and a result is allowed to be as far from float64 as the graph's own. Outputs have no gradients.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """The whole graph."""
        return [_WholeGraph(graph.graph.output_node())]

    def why_not(self, site: Site) -> str | None:
        """Refuse what TorchInductor has no back end or no compiler for, and a graph that writes into inputs."""
        graph = site.node.graph.owning_module
        assert graph is not None
        return compiled.why_not(graph)

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let calls go to the compiled graph."""
        graphs.set_stand_in(graph, compiled.Compiled(graph, repr(self)))
        self.mark_as_transformed(site.node)

    def undo(self, graph: GraphModule, memo: None) -> None:  # noqa: ARG002
        """Let calls go to the nodes again."""
        graphs.set_stand_in(graph, None)


class _WholeGraph(Site):
    """The site that is all nodes."""

    def __str__(self) -> str:
        return "the whole graph"
