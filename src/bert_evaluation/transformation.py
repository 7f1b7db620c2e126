"""What a transformation is: sites, reasons why not, a rewrite, an undo, and the frame that is the same for all.

The names and call forms are those of `optimum.fx.optimization`, so its users change one import line.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from bert_evaluation import graph as graphs
from bert_evaluation import hashes
from bert_evaluation.errors import TransformationError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Approximates, Promise, Reassociates, weakest

HISTORY = "bert_evaluation.history"  # key in GraphModule.meta: a tuple of Applied
MARKS = "bert_evaluation.transformed_by"  # key in Node.meta: a frozenset of signatures


@dataclass(frozen=True)
class Site:
    """One place that a transformation considers: the node where it acts, and every node that it reads or replaces."""

    node: Node
    nodes: tuple[Node, ...] = ()

    def __str__(self) -> str:
        path = graphs.layer(self.node)
        return f"{path} ({self.node.name})" if path else self.node.name


@dataclass(frozen=True)
class Refusal:
    """A site that was left as it was, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What one application did: the sites it applied, and those it refused."""

    transformation: str
    applied: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()

    @property
    def found(self) -> int:
        """How many sites there were."""
        return len(self.applied) + len(self.refused)


@dataclass(frozen=True)
class Applied:
    """One step of a graph's history, with all that undoing it needs."""

    transformation: "Transformation"
    report: Report
    memos: tuple[Any, ...]
    before: fx.Graph | None  # the nodes as they were; None where nothing was changed
    hash_after: str


def history(graph: GraphModule) -> tuple[Applied, ...]:
    """The transformations that made this graph, first to last."""
    steps: tuple[Applied, ...] = graph.meta.get(HISTORY, ())
    return steps


def promise_of(graph: GraphModule) -> Promise:
    """The promise of everything that was done to this graph."""
    return weakest(step.transformation.promise for step in history(graph) if step.report.applied)


@contextmanager
def unchanged_on_error(graph: GraphModule) -> Iterator[None]:
    """Leave the graph exactly as it was if the block raises."""
    nodes, held, meta = copy.deepcopy(graph.graph), graphs.tensors(graph), dict(graph.meta)
    call = graphs.stand_in(graph)
    try:
        yield
    except BaseException:
        for name, tensor in held.items():
            if graphs.get_tensor(graph, name) is not tensor:
                graphs.set_tensor(graph, name, tensor)
        graphs.drop(graph, set(graphs.tensors(graph)) - set(held))
        graph.graph, graph.meta = nodes, meta
        graphs.set_stand_in(graph, call)
        raise


class Transformation:
    """Something that can list where it could act on a graph, say for each place why it may not, and rewrite it.

    A subclass names its `promise` and writes `sites`, `why_not` and `rewrite`. (One that overrides `transform`
    instead, as `optimum.fx` had it, works too.) Arguments are public attributes that `__init__` sets; they are part
    of its text form and signature. The frame here walks the sites, collects refusals, gives new nodes their
    provenance and shapes, removes what is dead, checks that no output gained an alias, lints, recompiles and keeps
    the history. If anything raises, the graph is as it was.
    """

    promise: Promise = Approximates()
    calibrates: bool = False  # whether what it does depends on calibration inputs
    is_last: bool = False  # whether nothing can act behind it

    def __init_subclass__(cls) -> None:
        """Take `preserves_computation = True`, optimum.fx's way to say it, for a promise."""
        if cls.__dict__.get("preserves_computation") is True and "promise" not in cls.__dict__:
            cls.promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:  # noqa: ARG002
        """Every candidate in the graph, legal or not."""
        return ()

    def why_not(self, site: Site) -> str | None:  # noqa: ARG002
        """The first reason, as a sentence, why this site must stay as it is; None if it may be rewritten."""
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> Any:
        """Act on one site, never writing into a tensor; return what `undo` needs to restore the parameters."""
        raise NotImplementedError(f"{self.name} has sites but no rewrite")

    def transform(self, graph_module: GraphModule) -> GraphModule:
        """Rewrite every site that nothing speaks against."""
        applied, refused, memos = [], [], []
        for site in list(self.sites(graph_module)):
            alive = set(graph_module.graph.nodes)
            name = str(site)
            gone = not alive.issuperset((site.node, *site.nodes))
            if reason := "An earlier site has replaced part of it." if gone else self.why_not(site):
                refused.append(Refusal(name, reason))
                continue
            memos.append(self.rewrite(graph_module, site))
            applied.append(name)
            self._adopt([node for node in graph_module.graph.nodes if node not in alive], site)
        self._report = Report(repr(self), tuple(applied), tuple(refused))
        self._memos = tuple(memos)
        return graph_module

    def __call__(self, graph_module: GraphModule, lint_and_recompile: bool = True) -> GraphModule:
        """Transform the graph in place and return it. Tensors it shares with a model or another graph stay untouched.

        Raises TransformationError, with the graph as it was, if the rewritten graph is not sound.
        """
        self._report, self._memos = None, ()
        if graphs.stand_in(graph_module) is not None:
            raise TransformationError(f"{self.name} cannot act on a compiled graph; Compile has to be the last step.")
        hash_before, before = hashes.graph_hash(graph_module), copy.deepcopy(graph_module.graph)
        read, shared = graphs.read_names(graph_module), graphs.shared_outputs(graph_module)
        with unchanged_on_error(graph_module):
            graph_module = self.transform(graph_module)
            report = self._report or self._whole_graph_report(hashes.graph_hash(graph_module) != hash_before)
            if report.applied:
                graph_module.graph.eliminate_dead_code()
                graphs.drop(graph_module, read - graphs.read_names(graph_module))
                if gained := graphs.shared_outputs(graph_module) - shared:
                    output, other = min(gained)
                    raise TransformationError(f"{self.name} would make output {output} share memory with {other}.")
            if lint_and_recompile:
                graph_module.graph.lint()
                graph_module.recompile()
            step = Applied(
                copy.copy(self),
                report,
                self._memos,
                before if report.applied else None,
                hashes.graph_hash(graph_module),
            )
            graph_module.meta[HISTORY] = (*history(graph_module), step)
        self._report = report
        return graph_module

    def _whole_graph_report(self, changed: bool) -> Report:
        return Report(repr(self), ("the whole graph",) if changed else ())

    def _adopt(self, nodes: Iterable[Node], site: Site) -> None:
        """Give the nodes that replaced a site its provenance, their shapes and the mark of this transformation."""
        for node in nodes:
            for key in ("nn_module_stack", "stack_trace"):
                if key in site.node.meta:
                    node.meta.setdefault(key, site.node.meta[key])
            if "val" not in node.meta:
                graphs.propagate(node)
            self.mark_as_transformed(node)

    _report: Report | None = None
    _memos: tuple[Any, ...] = ()

    @property
    def report(self) -> Report:
        """Sites applied and refused in the last call of this object."""
        return self._report or Report(repr(self))

    @property
    def preserves_computation(self) -> bool:
        """Whether the outputs stay the same but for rounding."""
        return self.promise.rank < Approximates.rank

    @property
    def name(self) -> str:
        """The class's name, as in `Base+MergeLinears`."""
        return type(self).__name__

    def __repr__(self) -> str:
        arguments = {key: value for key, value in sorted(vars(self).items()) if not key.startswith("_")}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    @property
    def signature(self) -> str:
        """A hash of what this transformation is, the same in every process."""
        return hashlib.sha256(f"{type(self).__module__}.{self!r}".encode()).hexdigest()

    def mark_as_transformed(self, node: Node) -> None:
        """Mark a node as the work of this transformation."""
        node.meta[MARKS] = node.meta.get(MARKS, frozenset()) | {self.signature}

    def transformed(self, node: Node) -> bool:
        """Whether the node is the work of this transformation."""
        return self.signature in node.meta.get(MARKS, frozenset())

    def get_transformed_nodes(self, graph_module: GraphModule) -> list[Node]:
        """The nodes that are the work of this transformation."""
        return [node for node in graph_module.graph.nodes if self.transformed(node)]


class ReversibleTransformation(Transformation):
    """A transformation that can be undone: `t(graph, reverse=True)`.

    The frame puts the nodes back as they were, to the name; `undo` puts the parameters back.
    """

    def undo(self, graph: GraphModule, memo: Any) -> None:
        """Restore, bit for bit, the parameters that one `rewrite` replaced; `memo` is what that returned."""

    def reverse(self, graph_module: GraphModule) -> GraphModule:
        """Undo the last application of this transformation; nothing, if there is none.

        What was applied after it is undone first and applied again after. Raises TransformationError, with the
        graph as it was, if one of those cannot be undone or the graph was edited by hand since.
        """
        steps = history(graph_module)
        mine = [index for index, step in enumerate(steps) if step.transformation.signature == self.signature]
        if not mine:
            return graph_module
        with unchanged_on_error(graph_module):
            for step in reversed(steps[mine[-1] :]):
                _undo(graph_module, step)
            for step in steps[mine[-1] + 1 :]:
                step.transformation(graph_module)
        return graph_module

    def __call__(
        self, graph_module: GraphModule, lint_and_recompile: bool = True, reverse: bool = False
    ) -> GraphModule:
        """Transform the graph in place, or with `reverse=True` undo that, and return it."""
        if not reverse:
            return super().__call__(graph_module, lint_and_recompile)
        graph_module = self.reverse(graph_module)
        if lint_and_recompile:
            graph_module.graph.lint()
            graph_module.recompile()
        return graph_module

    def mark_as_restored(self, node: Node) -> None:
        """Take the mark of this transformation off a node. Raises ValueError if it has none."""
        if not self.transformed(node):
            raise ValueError(f"{node.name} was not transformed by {self!r}.")
        node.meta[MARKS] -= {self.signature}


def _undo(graph: GraphModule, step: Applied) -> None:
    """Take the last step of the graph's history back."""
    transformation = step.transformation
    if step.before is not None:
        if not isinstance(transformation, ReversibleTransformation):
            raise TransformationError(f"{transformation!r} was applied and cannot be undone; capture the model again.")
        if hashes.graph_hash(graph) != step.hash_after:
            raise TransformationError(f"The graph was edited after {transformation!r}; undo those edits first.")
        read = graphs.read_names(graph)
        for memo in reversed(step.memos):
            transformation.undo(graph, memo)
        graph.graph = copy.deepcopy(step.before)
        graphs.drop(graph, read - graphs.read_names(graph))
    graph.meta[HISTORY] = history(graph)[:-1]
