"""The graph as machine code, made by torch's own compiler."""

from collections.abc import Iterable

from bert_evaluation import compiled, cuda_graphs
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import CHECKPOINT
from bert_evaluation.graph import GraphModule
from bert_evaluation.promise import Promise, Reassociates
from bert_evaluation.signature import MASK
from bert_evaluation.transformation import ReversibleTransformation, Site


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

    On CUDA the loops are kernels in Triton; with `autotune` it tries out kernels for products of matrices too, for
    minutes. With `cuda_graphs` they are not launched one by one: a call replays what was recorded for a bucket of
    shapes, with batch and length rounded up, by less than a quarter or to 32 tokens. The mask hides the padding, but
    from rows without a real token: nothing is promised where it is 0. Where it would not hide it, shapes are recorded
    as they are. Recordings have memory of their own; there are up to 64, and none for more than 8192 tokens.
    """

    promise: Promise = Reassociates()
    is_last = True

    def __init__(self, cuda_graphs: bool = False, autotune: bool = False) -> None:
        self.cuda_graphs = cuda_graphs
        self.autotune = autotune
        if cuda_graphs:  # so much less than without, until it is known whether there will be padding
            self.promise = Reassociates(where=MASK)

    def __repr__(self) -> str:
        chosen = [f"{name}=True" for name in ("autotune", "cuda_graphs") if getattr(self, name)]
        return f"{self.name}({', '.join(chosen)})"

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """The whole graph."""
        return [_WholeGraph(graph.graph.output_node())]

    def why_not(self, site: Site) -> str | None:
        """Refuse what TorchInductor has no back end or no compiler for, and a graph that writes into inputs.

        With CUDA graphs, also what is on another device or waits for it.
        """
        graph = site.node.graph.owning_module
        assert graph is not None
        return compiled.why_not(graph) or (cuda_graphs.why_not(graph) if self.cuda_graphs else None)

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let calls go to the compiled graph."""
        inputs = graph.graph.find_nodes(op="placeholder")
        recorder = cuda_graphs.CudaRecorder(inputs[0].meta["val"].device) if self.cuda_graphs else None
        _, longest = graph.meta.get(CHECKPOINT, (None, None))
        call = compiled.Compiled(graph, repr(self), self.autotune, recorder, longest)
        self.promise = Reassociates(where=call.where)
        graphs.set_stand_in(graph, call)
        self.mark_as_transformed(site.node)

    def undo(self, graph: GraphModule, memo: None) -> None:  # noqa: ARG002
        """Let calls go to the nodes again."""
        graphs.set_stand_in(graph, None)


class _WholeGraph(Site):
    """The site that is all nodes."""

    def __str__(self) -> str:
        return "the whole graph"
