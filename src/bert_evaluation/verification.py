"""Is a promise kept? A transformed graph against its model, on inputs chosen to break things."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from bert_evaluation import graph as graphs
from bert_evaluation.capturing import capture, eval_mode, example_inputs, longest_input, text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Approximates, Bitwise, promise_of

# A reassociated result may be this many times farther from the float64 result than the untransformed one is.
SLACK = 8.0


@dataclass(frozen=True)
class Probe:
    """An input, and what it is."""

    name: str
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """Whether a graph keeps its promise on every probe, and by how much it differs from the model.

    `tolerance` is what `error` was held against: both are largest distances from the model run in float64 (for
    `Bitwise`, from the model itself, and 0). `first_difference` names the first node where the graphs part.
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

    @property
    def kept(self) -> bool:
        """Whether the promise held."""
        return self.verdict == "kept"


@dataclass(frozen=True)
class Reference:
    """What a model returns for every probe, as it is and in float64; made once for all graphs of the model."""

    model: nn.Module
    probes: tuple[Probe, ...]
    outputs: tuple[list[Tensor], ...]
    exact: tuple[list[Tensor], ...]


def text_probes(model: nn.Module) -> tuple[Probe, ...]:
    """Batches and lengths from 1 to the checkpoint's limit, padding on either side, a row with all of it masked."""
    longest = min(512, longest_input(model))
    shapes = [(1, 1), (1, 2), (2, 7), (3, 31), (8, 16), (1, longest)]
    probes = [Probe(f"batch {batch}, length {length}", text_inputs(model, batch, length)) for batch, length in shapes]
    for name, masked in (
        ("padding on the right", (slice(0, 1), slice(9, None))),
        ("padding on the left", (slice(0, 1), slice(None, 9))),
        ("a fully masked row", (slice(1, 2), slice(None))),
    ):
        inputs = text_inputs(model, 3, 19)
        inputs["attention_mask"][masked] = 0
        probes.append(Probe(name, inputs))
    return tuple(probes)


def default_probes(model: nn.Module, graph: GraphModule | None = None) -> tuple[Probe, ...]:
    """Those of a text encoder; for any other module, batches of 1, 2 and 7 of what its graph takes."""
    if hasattr(model, "config"):
        return text_probes(model)
    if graph is None and isinstance(model, GraphModule):
        graph = model
    if graph is None:
        raise UsageError(f"{type(model).__name__} is no text encoder: give probes to verify it with.")
    return tuple(Probe(f"batch {size}", example_inputs(graph, size)) for size in (1, 2, 7))


def observe(model: nn.Module, probes: Sequence[Probe] | None = None) -> Reference:
    """Run the model on the probes (its own for a transformers encoder), in its type and in float64."""
    if probes is None:
        probes = default_probes(model)
    if not probes:
        raise UsageError("There is nothing to verify with: give at least one probe.")
    precise = graphs.in_double(model) if isinstance(model, GraphModule) else copy.deepcopy(model).double()
    doubled = [
        {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in probe.inputs.items()}
        for probe in probes
    ]
    outputs = _outputs(model, [probe.inputs for probe in probes])
    return Reference(model, tuple(probes), outputs, _outputs(precise, doubled))


def verify(model: nn.Module, graph: GraphModule, probes: Sequence[Probe] | None = None) -> Verification:
    """Check the promise of everything that was done to `graph`, which was captured from `model`."""
    return check(observe(model, default_probes(model, graph) if probes is None else probes), graph)


def check(reference: Reference, graph: GraphModule) -> Verification:
    """`verify` against a reference that is there already."""
    promise = promise_of(graph)
    results = _outputs(graph, [probe.inputs for probe in reference.probes])
    pairs = list(zip(reference.outputs, results, strict=True))
    distances = [_distance(base, result) for base, result in pairs]
    if isinstance(promise, Bitwise):
        errors, tolerance = distances, 0.0
    else:
        errors = [_distance(exact, result) for exact, result in zip(reference.exact, results, strict=True)]
        tolerance = _tolerance(reference) if not isinstance(promise, Approximates) else torch.finfo(torch.float64).max
    failing = next((i for i, error in enumerate(errors) if not error <= tolerance), None)
    return Verification(
        promise=promise.kind,
        verdict="kept" if failing is None else "broken",
        max_abs_error=max(distances),
        max_ulp=max(_ulp(base, result) for base, result in pairs),
        error=max(errors),
        tolerance=tolerance,
        probes=len(reference.probes),
        failing_probe=None if failing is None else reference.probes[failing].name,
        first_difference=None if failing is None else _first_difference(reference, graph, failing),
    )


def _tolerance(reference: Reference) -> float:
    pairs = zip(reference.exact, reference.outputs, strict=True)
    rounding = max(_distance(exact, output) for exact, output in pairs)
    leaves = [leaf for output in reference.outputs for leaf in output if leaf.is_floating_point()]
    unit = max((torch.finfo(leaf.dtype).eps * _largest(leaf) for leaf in leaves), default=0.0)
    return SLACK * max(rounding, unit)


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _outputs(model: nn.Module, inputs: Iterable[Mapping[str, Tensor]]) -> tuple[list[Tensor], ...]:
    with torch.inference_mode(), eval_mode(model):
        return tuple(graphs.output_tensors(model(**each)) for each in inputs)


def _distance(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where shapes, or what is not finite, differ."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        a, b = one.detach().double(), other.detach().double()
        odd = ~(a.isfinite() & b.isfinite())
        if not torch.equal(a[odd].nan_to_num(1.0, 2.0, 3.0), b[odd].nan_to_num(1.0, 2.0, 3.0)):
            return float("inf")
        if not bool(odd.all()):
            worst = max(worst, float((a - b)[~odd].abs().max()))
    return worst


def _ulp(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference in units of the last place of the expected value."""
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        if one.is_floating_point() and one.shape == other.shape and one.numel():
            size = one.abs()
            unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
            steps = ((one - other).abs() / unit)[one.isfinite() & other.isfinite()]
            worst = max(worst, float(steps.max()) if steps.numel() else 0.0)
    return worst


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node returned."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, tuple[Node, Any]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = (n, result)
        return result


def _record(graph: GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, tuple[Node, Any]]:
    recorder = _Recorder(graph)
    with torch.inference_mode():
        recorder.run(*(inputs[name] for name in graphs.input_names(graph)), enable_io_processing=False)
    return recorder.values


def _first_difference(reference: Reference, graph: GraphModule, index: int) -> str | None:
    """The first node of the untransformed graph whose namesake in the transformed one returns something else."""
    probe, model = reference.probes[index], reference.model
    base = (
        model
        if isinstance(model, GraphModule)
        else capture(model, probe.inputs if not hasattr(model, "config") else None)
    )
    before, after = _record(base, probe.inputs), _record(graph, probe.inputs)
    scale = 0.0 if isinstance(promise_of(graph), Bitwise) else 1e-4
    for name, (node, value) in before.items():
        other = after.get(name, (None, None))[1]
        if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
            continue
        if _distance([value], [other]) > scale * _largest(value.double()):
            return f"{graphs.layer(node)} ({name})" if graphs.layer(node) else name
    return None
