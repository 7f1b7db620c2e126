"""Is a promise kept? A transformed graph against its model, on inputs chosen to break things."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn, varlen
from bert_evaluation.capturing import capture, eval_mode
from bert_evaluation.distances import distance, ulp
from bert_evaluation.errors import UsageError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.probes import Probe, default_probes, text_probes
from bert_evaluation.promise import Approximates, Bitwise, Promise
from bert_evaluation.transformation import promise_of

__all__ = [
    "SLACK",
    "Place",
    "Probe",
    "Reference",
    "Verification",
    "check",
    "default_probes",
    "judge",
    "observe",
    "parting",
    "results",
    "text_probes",
    "verify",
]

# A reassociated result may be this many times farther from the float64 result than the untransformed one is.
SLACK = 8.0
# What an operator raises for inputs that it cannot take.
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class Verification:
    """Whether a graph keeps its promise on every probe, and by how much it differs from the model.

    `tolerance` is what `error` was held against on the probe that comes nearest to it: both are distances from the
    model run in float64 (for `Bitwise`, from the model itself, and 0). A graph that fails on a probe that its model
    takes is infinitely far. `first_difference` names the first node where the graphs part. `where` is the promise's:
    outputs were compared only where that input is not 0, tolerances are those of all positions.
    """

    promise: str
    verdict: Literal["kept", "broken"]
    max_abs_error: float
    max_ulp: float
    error: float
    tolerance: float
    probes: int
    failing_probe: str | None = None
    first_difference: str | None = None
    where: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the promise held."""
        return self.verdict == "kept"

    @property
    def compared(self) -> str:
        """Where outputs were compared, in words; empty where everywhere."""
        return "" if self.where is None else f"compared where {self.where} is 1"


@dataclass(frozen=True)
class Reference:
    """What a model returns for every probe, as it is and in float64; made once for all graphs of the model.

    `tolerances` are how far a reassociated result of each may be from the float64 one.
    """

    model: nn.Module
    probes: tuple[Probe, ...]
    outputs: tuple[list[Tensor], ...]
    exact: tuple[list[Tensor], ...]
    tolerances: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """A node of a graph, the layer that it is from (empty where it is from none), and how it failed, if it did."""

    node: str
    layer: str
    failure: str = ""

    def __str__(self) -> str:
        place = f"{self.layer} ({self.node})" if self.layer else self.node
        return f"{place}, which fails: {self.failure}" if self.failure else place


OUTPUT = Place("output", "")


def observe(model: nn.Module, probes: Sequence[Probe] | None = None, precise: nn.Module | None = None) -> Reference:
    """Run the model on the probes (its own for a transformers encoder), in its type and in float64.

    `precise` is the model in float64 where that is there already.
    """
    if probes is None:
        probes = default_probes(model)
    if not probes:
        raise UsageError("There is nothing to verify with: give at least one probe.")
    precise = precise or in_double(model)
    inputs = [probe.inputs for probe in probes]
    outputs, exact = _outputs(model, inputs), _outputs(precise, map(_doubled, inputs))
    return Reference(model, tuple(probes), outputs, exact, tolerances(exact, outputs))


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a model or graph that computes in float64."""
    return _graph_in_double(model) if isinstance(model, GraphModule) else copy.deepcopy(model).double()


def _graph_in_double(graph: GraphModule) -> GraphModule:
    return kernels.in_plain_pytorch(graphs.in_double(onednn.expand(graph)))


def verify(model: nn.Module, graph: GraphModule, probes: Sequence[Probe] | None = None) -> Verification:
    """Check the promise of everything that was done to `graph`, which was captured from `model`."""
    return check(observe(model, default_probes(model, graph) if probes is None else probes), graph)


def check(reference: Reference, graph: GraphModule) -> Verification:
    """`verify` against a reference that is there already."""
    promise, model = promise_of(graph), reference.model
    found = judge(reference, results(graph, reference.probes), promise)
    if found.kept:
        return found
    inputs = next(probe.inputs for probe in reference.probes if probe.name == found.failing_probe)
    base = model if isinstance(model, GraphModule) else capture(model, None if hasattr(model, "config") else inputs)
    return replace(found, first_difference=str(parting(base, graph, inputs, promise) or OUTPUT))


def results(graph: nn.Module, probes: Iterable[Probe]) -> tuple[list[Tensor], ...]:
    """What a transformed graph returns for every probe; nothing for one that it fails on."""
    return tuple(_outputs(graph, [probe.inputs], FAILURES)[0] for probe in probes)


def judge(reference: Reference, found: Sequence[list[Tensor]], promise: Promise) -> Verification:
    """Hold what a graph returned for the reference's probes against a promise."""
    pairs, allowed = list(zip(reference.outputs, found, strict=True)), reference.tolerances
    marks = [_marks(probe.inputs, promise) for probe in reference.probes]
    distances = [distance(*pair, each) for pair, each in zip(pairs, marks, strict=True)]
    if isinstance(promise, Bitwise):
        errors, allowed = distances, (0.0,) * len(pairs)
    else:
        errors = [distance(*each) for each in zip(reference.exact, found, marks, strict=True)]
    if isinstance(promise, Approximates):
        allowed = (torch.finfo(torch.float64).max,) * len(pairs)
    else:
        errors = [error if _types(*pair) else math.inf for error, pair in zip(errors, pairs, strict=True)]
    failing = next((i for i, error in enumerate(errors) if not error <= allowed[i]), None)
    worst = max(range(len(pairs)), key=lambda i: errors[i] / allowed[i] if allowed[i] else errors[i])
    return Verification(
        promise=promise.kind,
        verdict="kept" if failing is None else "broken",
        max_abs_error=max(distances),
        max_ulp=max(ulp(*pair, each) for pair, each in zip(pairs, marks, strict=True)),
        error=errors[worst],
        tolerance=allowed[worst],
        probes=len(reference.probes),
        failing_probe=None if failing is None else reference.probes[failing].name,
        where=promise.where,
    )


def tolerances(exact: Iterable[Sequence[Tensor]], outputs: Iterable[Sequence[Tensor]]) -> tuple[float, ...]:
    """How far from the float64 results reassociated ones may be: a few times the outputs' own distance, or their unit.

    Each probe has its own, so that a small one is not measured by what is lost in a large one.
    """
    return tuple(_tolerance(*pair) for pair in zip(exact, outputs, strict=True))


def _tolerance(exact: Sequence[Tensor], output: Sequence[Tensor]) -> float:
    units = [torch.finfo(leaf.dtype).eps * _largest(leaf) for leaf in output if leaf.is_floating_point()]
    return SLACK * max(distance(exact, output), *units, 0.0)


def _doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _outputs(
    model: nn.Module, inputs: Iterable[Mapping[str, Tensor]], forgiven: tuple[type[Exception], ...] = ()
) -> tuple[list[Tensor], ...]:
    def run(each: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            return graphs.output_tensors(model(**each))
        except torch.OutOfMemoryError:
            raise
        except forgiven:
            return []

    with torch.inference_mode(), eval_mode(model):
        return tuple(run(each) for each in inputs)


def _types(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return [tensor.dtype for tensor in expected] == [tensor.dtype for tensor in got]


def _marks(inputs: Mapping[str, Tensor], promise: Promise) -> Tensor | None:
    """The positions (batch, length) that a promise is about; None where it is about all."""
    return None if promise.where is None else inputs[promise.where].bool()


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node returned, and where and how it failed."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, tuple[Node, list[Tensor]]] = {}
        self.failed: Place | None = None

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except FAILURES as failure:
            said = str(failure).strip().splitlines() or [type(failure).__name__]
            self.failed = Place(n.name, graphs.layer(n), said[0])
            raise
        self.values[n.name] = (n, graphs.output_tensors(value))
        return value


def _record(graph: GraphModule, inputs: Mapping[str, Tensor]) -> _Recorder:
    recorder = _Recorder(graph)
    with torch.inference_mode():
        try:
            recorder.run(*(inputs[name] for name in graphs.input_names(graph)), enable_io_processing=False)
        except FAILURES:
            if recorder.failed is None:
                raise
    return recorder


def parting(before: GraphModule, after: GraphModule, inputs: Mapping[str, Tensor], promise: Promise) -> Place | None:
    """The first node of a graph whose namesake in the transformed one returns something else, or else fails.

    A node is held against its own float64 result as outputs are; for `Bitwise` it has to be equal, for `Approximates`
    finite where its namesake is. Parameters are passed over: it is what is computed with them that counts. What is
    packed is compared as if it were padded.
    """
    expected, got, marks = _record(before, inputs), _record(after, inputs), _marks(inputs, promise)
    exact = {} if isinstance(promise, Bitwise) else _record(_graph_in_double(before), _doubled(inputs)).values
    for name, (node, values) in expected.values.items():
        if node.op == "get_attr" or name not in got.values:
            continue
        others = got.values[name][1]
        if marks is not None:
            others = [_padded(other, like, marks) for other, like in zip(others, values, strict=False)]
        if _part(values, others, exact.get(name, (node, values))[1], promise, marks):
            return Place(name, graphs.layer(node))
    return got.failed


def _part(
    values: list[Tensor], others: list[Tensor], exact: list[Tensor], promise: Promise, marks: Tensor | None
) -> bool:
    if isinstance(promise, Bitwise):
        return distance(values, others, marks) > 0
    if isinstance(promise, Approximates):
        return math.isinf(distance(values, others, marks))
    return not distance(exact, others, marks) <= _tolerance(exact, values)


def _padded(tensor: Tensor, like: Tensor, marks: Tensor) -> Tensor:
    """A packed tensor padded; any other as it is."""
    is_packed = tensor.shape[:2] == (1, int(marks.sum())) and like.shape[:2] == marks.shape
    return varlen.pad(tensor, marks) if is_packed else tensor
