"""A graph compiled by TorchInductor: C++ of its own for this machine, one for all sizes, from any number of threads.

Inductor fuses what stands between the large operators, and calls those from C++, without Python in between. What it
would take apart for the worse stays one call: oneDNN's linears, whose packed weights it does not read, and lookups.
"""

import shutil
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config  # documented, under this name
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import onednn
from bert_evaluation.device import cpp_compiler
from bert_evaluation.errors import TransformationError
from bert_evaluation.graph import GraphModule, Node

aten = torch.ops.aten
# An index out of range is an error of theirs; in a loop that Inductor makes it would end the process.
LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
OPAQUE = (onednn.POINTWISE, onednn.BINARY, *LOOKUPS)
CHECKS = (aten._assert_tensor_metadata.default,)
# A batch of 3 for 2 threads, which no dimension divides evenly: Inductor then shares out batch and length together, and
# takes neither for a constant, nor for the other. How many threads there really are, it asks at every call.
SMALLEST, OPTIONS = 3, {"cpp.threads": 2, "cpp.dynamic_threads": True}


def why_not(graph: GraphModule) -> str | None:
    """Why a graph cannot be compiled here, if so; whether Inductor takes all of its operators, the first call tells."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and not isinstance(value, Tensor):
            return f"The graph does not know the shape of its input {node.target}."
        if node.op == "placeholder" and value.device.type not in ("cpu", "cuda"):
            return f"Compile is for cpu and cuda, and the graph is on {value.device}."
        if node.op == "placeholder" and value.device.type == "cuda" and find_spec("triton") is None:
            return "triton, which TorchInductor writes kernels for CUDA in, is not installed."
        if any(isinstance(memory, str) or memory.op == "placeholder" for memory in graphs.writes(node)):
            return f"{node.name} writes in place into what the graph is given or keeps."
    if shutil.which(compiler := cpp_compiler()) is None:
        return f"TorchInductor needs a C++ compiler, and {compiler} is not there; install it, or name another as CXX."
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "TorchInductor needs Python's headers (Python.h), which are not there; install python3-dev."
    return None


class Compiled:
    """What is called in the place of a graph's nodes; `title` says by whose will. For inference: no gradients.

    It is compiled once, by the first call or by `prepare`, which takes up to a minute (`seconds`, 0 before). Inputs
    have the types and fixed sizes that the graph was captured with, and any dynamic ones, 1 included, with one batch
    for all; others are refused with a ValueError. It reads the tensors that the graph has now, and is not told if
    those are exchanged.
    """

    def __init__(self, graph: GraphModule, title: str) -> None:
        self.seconds = 0.0
        self._title = title
        self._graph = _with_opaque_calls(graph)
        inputs = [_Input(node) for node in graph.graph.find_nodes(op="placeholder")]
        batch = {each.sizes[0] for each in inputs if 0 in each.dynamic}
        self._inputs = [each.of_one_batch(batch) for each in inputs]
        self._function: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return self._title

    def __deepcopy__(self, memo: object) -> "Compiled":
        return self

    def __call__(self, *args: Tensor, **inputs: Tensor) -> Any:
        """Return what the graph's nodes would, but for rounding."""
        named = {each.name: tensor for each, tensor in zip(self._inputs, args, strict=False)} | inputs
        sizes = dict[str, int]()
        ready = {each.name: each.checked(named, sizes) for each in self._inputs}
        if self._function is None:
            self.prepare()
        assert self._function is not None
        with torch.no_grad():
            return self._function(**ready)

    def prepare(self) -> None:
        """Compile, unless that is done. Raises TransformationError for what Inductor cannot compile."""
        with self._lock:
            if self._function is not None:
                return
            start = time.perf_counter()
            try:
                self._function = self._compile()
            except Exception as error:
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise TransformationError(f"TorchInductor cannot compile this graph: {said[0]}") from error
            self.seconds = time.perf_counter() - start

    def _compile(self) -> Callable[..., Any]:
        options: dict[str, Any] = OPTIONS | {
            # Released while it runs, Python's lock lets other threads answer other batches.
            "cpp_wrapper": all(each.device.type == "cpu" for each in self._inputs),
            # Dynamo would compile again for a size of 1, another number of threads, and in inference mode. Nothing
            # generated depends on those; what does depend on the inputs is checked in `_Input`.
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        }
        function: Callable[..., Any] = torch.compile(
            self._graph.forward, fullgraph=True, dynamic=False, options=options
        )
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        ):
            sizes = dict[str, int]()
            inputs = {each.name: each.example(sizes) for each in self._inputs}
            for each in self._inputs:
                for dimension in each.dynamic:
                    torch._dynamo.mark_dynamic(inputs[each.name], dimension)
            function(**inputs)  # it is compiled by being called
        return function


class _Input:
    """What is known of an input: name, type, device, and each size: a number, or a symbol where it is dynamic."""

    def __init__(self, node: Node) -> None:
        value = node.meta["val"]
        self.name, self.dtype, self.device = str(node.target), value.dtype, value.device
        self.sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)

    def of_one_batch(self, symbols: set[int | str]) -> "_Input":
        """The input with one symbol for the batch: export may leave it open whether those of two inputs are equal."""
        self.sizes = tuple("batch" if size in symbols else size for size in self.sizes)
        return self

    @property
    def dynamic(self) -> Iterable[int]:
        """The dimensions that are."""
        return [dimension for dimension, size in enumerate(self.sizes) if isinstance(size, str)]

    def example(self, known: dict[str, int]) -> Tensor:
        """Zeros, each dynamic size 3 more than the one before; `known` are those of the inputs before."""
        shape = [
            known.setdefault(size, SMALLEST + 3 * len(known)) if isinstance(size, str) else size for size in self.sizes
        ]
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def checked(self, inputs: Mapping[str, Tensor], known: dict[str, int]) -> Tensor:
        """The input as the compiled code reads it; `known` are the sizes that symbols have in this call.

        Raises ValueError for one that is missing or does not fit.
        """
        tensor = inputs.get(self.name)
        if tensor is None:
            raise ValueError(f"The compiled graph is called without {self.name}.")
        if tensor.dtype is not self.dtype or tensor.device.type != self.device.type:
            raise ValueError(
                f"{self.name} is {tensor.dtype} on {tensor.device}; compiled was for {self.dtype} on {self.device}."
            )
        fits = len(tensor.shape) == len(self.sizes) and all(
            (known.setdefault(expected, size) if isinstance(expected, str) else expected) == size
            for size, expected in zip(tensor.shape, self.sizes, strict=True)
        )
        if not fits:
            taken = ", ".join(str(known.get(size, "any") if isinstance(size, str) else size) for size in self.sizes)
            raise ValueError(
                f"{self.name} has the shape {tuple(tensor.shape)}; beside the others it is to be ({taken})."
            )
        return tensor.contiguous()


def is_pending(graph: GraphModule) -> bool:
    """Whether the next call of a graph will compile it first."""
    call = graphs.stand_in(graph)
    return isinstance(call, Compiled) and call.seconds == 0


def prepare(several: Iterable[GraphModule]) -> None:
    """Compile those of these graphs whose next call would."""
    for graph in several:
        if isinstance(call := graphs.stand_in(graph), Compiled):
            call.prepare()


def seconds(module: torch.nn.Module) -> float:
    """How long it took to compile a graph; 0 if it is not compiled, or not yet."""
    call = graphs.stand_in(module) if isinstance(module, GraphModule) else None
    return call.seconds if isinstance(call, Compiled) else 0.0


def _with_opaque_calls(graph: GraphModule) -> GraphModule:
    """A fork of the graph without checks of types, which are done, and with operators that Inductor leaves alone."""
    twin = graphs.fork(graph)
    for node in list(twin.graph.nodes):
        if node.target in CHECKS:
            twin.graph.erase_node(node)
        elif node.target in OPAQUE and node.op == "call_function":
            node.target = _opaque(node.target)
    twin.recompile()
    return twin


@cache
def _opaque(operator: Any) -> Any:
    """An operator of another name that calls this one: Inductor knows nothing about it, so it calls it as it is."""
    signature = str(operator._schema)
    name = f"opaque_{signature[: signature.index('(')].replace('::', '_').replace('.', '_')}"
    _LIBRARY.define(name + signature[signature.index("(") :])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    fake = {onednn.POINTWISE: _fake_pointwise, onednn.BINARY: _fake_binary}.get(operator, operator)
    torch.library.register_fake(f"bert_evaluation::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.bert_evaluation, name).default


def _fake_pointwise(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_binary(x: Tensor, other: Tensor, *_: Any) -> Tensor:
    return x.new_empty(other.shape)


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
