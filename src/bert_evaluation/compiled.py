"""A graph compiled by TorchInductor: code of its own for this machine, one for all sizes, from any number of threads.

Inductor fuses what stands between the large operators, and calls those from C++, without Python in between. What it
would take apart for the worse stays one call: oneDNN's linears, whose packed weights it does not read, and lookups.
On a CPU the code is a shared library; on CUDA it is what torch.compile makes of it, whose launches can be recorded, and
so it is on a CPU with a torch before 2.13, or with weights that oneDNN has packed.
"""

import shutil
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config  # documented, under this name
from torch import Tensor, fx

from bert_evaluation import aot_inductor, onednn, varlen
from bert_evaluation import graph as graphs
from bert_evaluation.buckets import bucket, paddable
from bert_evaluation.cuda_graphs import Recorder, Replayed
from bert_evaluation.cutting import cut
from bert_evaluation.device import c_compiler, cpp_compiler
from bert_evaluation.errors import TransformationError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.signature import LENGTH, MASK, UNLIMITED, Signature

aten = torch.ops.aten
# An index out of range is an error of theirs; in a loop in C++ that Inductor makes it would end the process. A kernel
# in Triton ends the CUDA context, as theirs does, so there Inductor may have them.
LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
OPAQUE = (onednn.POINTWISE, onednn.BINARY, *LOOKUPS)
CHECKS = (aten._assert_tensor_metadata.default,)
# A batch of 3 for 2 threads, which no dimension divides evenly: Inductor then shares out batch and length together, and
# takes neither for a constant, nor for the other. How many threads there really are, it asks at every call.
SMALLEST, ON_CPU = 3, {"cpp.threads": 2, "cpp.dynamic_threads": True}
# On CUDA it chooses tiles for the sizes of the example. This length is a usual one, and no multiple of 4: a mask of any
# length has to be copied to where kernels for attention can read it, and what is made for a multiple would not do that.
USUAL, ON_CUDA = 130, {"triton.cudagraphs": False}
# Inductor numbers what is in a tensor with 32 bits on CUDA, since it is little in the example.
COUNTABLE = 2**31 - 1


def why_not(graph: GraphModule) -> str | None:
    """Why a graph cannot be compiled here, if so; whether Inductor takes all of its operators, the first call tells."""
    kinds = set[str]()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                return f"The graph does not know the shape of its input {node.target}."
            if value.device.type not in ("cpu", "cuda"):
                return f"Compile is for cpu and cuda, and the graph is on {value.device}."
            kinds.add(value.device.type)
        if any(isinstance(memory, str) or memory.op == "placeholder" for memory in graphs.writes(node)):
            return f"{node.name} writes in place into what the graph is given or keeps."
    return _why_no_compiler("cuda" in kinds)


def _why_no_compiler(on_cuda: bool) -> str | None:
    if on_cuda and find_spec("triton") is None:
        return "triton, which TorchInductor writes kernels for CUDA in, is not installed."
    # Triton compiles what launches its kernels.
    who, compiler, language, name = (
        ("Triton", c_compiler(), "C", "CC") if on_cuda else ("TorchInductor", cpp_compiler(), "C++", "CXX")
    )
    if shutil.which(compiler) is None:
        return f"{who} needs a {language} compiler, and {compiler} is not there; install it, or name another as {name}."
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"{who} needs Python's headers (Python.h), which are not there; install python3-dev."
    return None


class Compiled:
    """What is called in the place of a graph's nodes; `title` says by whose will. For inference: no gradients.

    It is compiled once, by the first call or by `prepare`, which takes up to a minute (`seconds`, 0 before), or a
    moment if the same was compiled before (see `aot_inductor`). Inputs have the types and fixed sizes that the graph
    was captured with, and any dynamic ones, 1 included, with one batch for all; others are refused with a ValueError.
    It reads the tensors that the graph has now, and is not told if those are exchanged.

    With a `recorder`, calls are recorded, once for each bucket of shapes, and replayed. `longest` is the most tokens
    that are known to be read, if the graph does not know; `where` names the input that says which positions of the
    results have nothing to do with the padding of a bucket, None if there is none. With `autotune`, more ways to
    multiply matrices are tried out on the device, for minutes.
    """

    def __init__(
        self,
        graph: GraphModule,
        title: str,
        autotune: bool = False,
        recorder: Recorder | None = None,
        longest: int | None = None,
    ) -> None:
        self.seconds = 0.0
        self._title, self._autotune, self._recorder, self._longest = title, autotune, recorder, longest
        self._signature = Signature(graph)
        self._on_cpu = all(each.device.type == "cpu" for each in self._signature.inputs)
        self._most = {} if recorder is None else paddable(graph, self._signature, longest)
        self.where = MASK if LENGTH in self._most else None
        self._graph = _plain_for_inductor(graph, OPAQUE if self._on_cpu else ())
        self._call: Callable[[dict[str, Tensor], dict[str, int]], Any] | None = None
        self._countable = set[tuple[int, ...]]()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return self._title

    def __deepcopy__(self, memo: object) -> "Compiled":
        return self

    def __call__(self, *args: Tensor, **inputs: Tensor) -> Any:
        """Return what the graph's nodes would, but for rounding."""
        ready, sizes = self._signature.checked(args, inputs)
        if not self._on_cpu:
            self._hold_countable(sizes)
        if self._call is None:
            self.prepare()
        assert self._call is not None
        with torch.no_grad():
            return self._call(ready, sizes)

    def prepare(self) -> None:
        """Compile, unless that is done. Raises TransformationError for what Inductor cannot compile."""
        with self._lock:
            if self._call is not None:
                return
            start = time.perf_counter()
            try:
                function = self._compile()
            except Exception as error:
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise TransformationError(f"TorchInductor cannot compile this graph: {said[0]}") from error
            if self._recorder is None:
                self._call = lambda inputs, sizes: function(**inputs)
            else:
                self._call = Replayed(function, self._signature, self._most, self._recorder)
            self.seconds = time.perf_counter() - start

    def _hold_countable(self, sizes: Mapping[str, int]) -> None:
        key = tuple(sizes.values())
        if key not in self._countable:
            if (count := self._signature.elements(bucket(sizes, self._most))) > COUNTABLE:
                raise ValueError(f"A tensor would have {count:,} numbers; compiled code counts to {COUNTABLE:,} only.")
            self._countable.add(key)

    def _compile(self) -> Callable[..., Any]:
        place = next(graphs.calls(self._graph, varlen.PLACES), None)
        if place is None:
            return self._compiled(self._graph, self._signature)
        # How many tokens are packed, Inductor would take for any number, and fuse little. So they are packed before it,
        # and it is given a size like others.
        first, rest = cut(self._graph, place)
        function, restore = self._compiled(rest, Signature(rest)), self._graph.graph.process_outputs
        return lambda **inputs: restore(function(**inputs, **first(**inputs)))

    def _compiled(self, graph: GraphModule, signature: Signature) -> Callable[..., Any]:
        sizes = self._example_sizes(signature.longest)
        inputs = {each.name: each.zeros(sizes) for each in signature.inputs}
        options = {**(ON_CPU if self._on_cpu else ON_CUDA), "max_autotune": self._autotune}
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            # Float16 is looked up for bfloat16 where CastEmbeddings was; the result is checked like any other.
            warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # torch's own
            way = _library if self._on_cpu and aot_inductor.takes(graph) else _in_time
            return way(graph, signature, inputs, options)

    def _example_sizes(self, longest: Mapping[str, int]) -> dict[str, int]:
        """Sizes to compile with: each 3 more than the one before, but a usual length on CUDA where that is allowed."""
        sizes = {name: SMALLEST + 3 * place for place, name in enumerate(longest)}
        if not self._on_cpu and USUAL < min(longest.get(LENGTH, 0), self._longest or UNLIMITED) < UNLIMITED:
            sizes[LENGTH] = USUAL
        return sizes


def _library(
    graph: GraphModule, signature: Signature, inputs: dict[str, Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """The graph as a shared library. That returns tensors; here they get back to where the graph returns them."""
    returned, restored = graphs.taken_apart(graph.graph.output_node().args[0])
    nodes = list(dict.fromkeys(part for part in returned if isinstance(part, Node)))
    plain, copies = fx.Graph(), dict[Node, Node]()
    plain.graph_copy(graph.graph, copies)
    plain.output(tuple(copies[node] for node in nodes))
    twin = GraphModule(graph, plain)
    for name, tensor in graphs.tensors(twin).items():  # without gradients: export refuses those of inference mode
        graphs.set_tensor(twin, name, tensor.detach())
    dynamic = {each.name: each.dynamic for each in signature.inputs}
    call = aot_inductor.library(twin, inputs, dynamic, options)

    def function(**given: Tensor) -> Any:
        results = dict(zip(nodes, call(given), strict=True))
        return graph.graph.process_outputs(restored([results.get(part, part) for part in returned]))

    return function


def _in_time(
    graph: GraphModule, signature: Signature, inputs: dict[str, Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """The graph as torch.compile calls it, compiled for these inputs, and for others in their dynamic dimensions."""
    # Dynamo would compile again for a size of 1 and in inference mode. Nothing generated depends on those; what does
    # depend on the inputs is checked at every call.
    options |= {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    function: Callable[..., Any] = torch.compile(graph.forward, fullgraph=True, dynamic=False, options=options)
    for each in signature.inputs:
        for dimension in each.dynamic:
            torch._dynamo.mark_dynamic(inputs[each.name], dimension)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        function(**inputs)  # it is compiled by being called
    return function


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


def _plain_for_inductor(graph: GraphModule, opaque: Collection[Any]) -> GraphModule:
    """A fork of the graph without checks of types, which are done, and with `opaque` operators that it leaves alone."""
    twin = graphs.fork(graph)
    for node in list(twin.graph.nodes):
        if node.target in CHECKS:
            twin.graph.erase_node(node)
        elif node.target in opaque and node.op == "call_function":
            node.target = _opaque(node.target)
    twin.recompile()
    return twin


@cache
def _opaque(operator: Any) -> Any:
    """An operator of another name that calls this one: Inductor knows nothing about it, so it calls it as it is."""
    signature = str(operator._schema)
    name = f"opaque_{signature[: signature.index('(')].replace('::', '_').replace('.', '_')}"
    _LIBRARY.define(name + signature[signature.index("(") :])  # type: ignore[no-untyped-call]
    if aot_inductor.is_there() and aot_inductor.why_not_built() is None:
        to, _, overload = operator.name().partition(".")
        torch.ops.bert_evaluation.forward(name, to, overload)
    else:
        _LIBRARY.impl(name, operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    fake = {onednn.POINTWISE: _fake_pointwise, onednn.BINARY: _fake_binary}.get(operator, operator)
    torch.library.register_fake(f"bert_evaluation::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.bert_evaluation, name).default


def _fake_pointwise(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_binary(x: Tensor, other: Tensor, *_: Any) -> Tensor:
    return x.new_empty(other.shape)


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
