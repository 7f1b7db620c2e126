"""oneDNN's linears, as torch has them: the one place that names its operators, which are not public.

`linear(x, W, b)` followed by a function of each element, or by the addition of another tensor, as one operator; and
weights stored beforehand in the order in which it reads them (packed). torch.compile is built on the same operators.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node

aten = torch.ops.aten


def _operator(library: str, name: str, overload: str) -> Any:
    """One of oneDNN's operators; None, which no node calls, where torch was built without it (as for some Macs)."""
    found = getattr(getattr(torch.ops, library), name, None)
    return found if found is None else getattr(found, overload)


POINTWISE = _operator("mkldnn", "_linear_pointwise", "default")
BINARY = _operator("mkldnn", "_linear_pointwise", "binary")
FUSED = (POINTWISE, BINARY)


@dataclass(frozen=True)
class Activation:
    """A function of each element that oneDNN can end a linear with: its name and variant there, and its operator."""

    name: str
    variant: str
    operator: Any

    @property
    def label(self) -> str:
        """Name and variant in one word."""
        return self.name if self.variant in ("", "none") else f"{self.name}_{self.variant}"

    @property
    def keywords(self) -> dict[str, Any]:
        """What the plain operator is called with."""
        return {"approximate": self.variant} if self.name == "gelu" else {}


ACTIVATIONS = (
    Activation("gelu", "none", aten.gelu.default),
    Activation("gelu", "tanh", aten.gelu.default),
    Activation("relu", "", aten.relu.default),
    Activation("tanh", "", aten.tanh.default),
    Activation("sigmoid", "", aten.sigmoid.default),
    Activation("swish", "", aten.silu.default),
)


def why_not(weight: Tensor) -> str | None:
    """Why a linear with this weight cannot be oneDNN's, if so."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "This build of torch has no oneDNN."
    if weight.device.type != "cpu":
        return f"oneDNN's linear is for a CPU, and the weight is on {weight.device}."
    if weight.dtype is torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "This processor computes nothing in bfloat16 (it has no AVX-512)."
    elif weight.dtype is not torch.float32:
        return f"oneDNN's linear is for float32 and bfloat16, not for {weight.dtype}."
    return None


def why_slow(activation: Activation) -> str | None:
    """Why a linear that ends with this activation takes longer than the two apart, if so.

    On an AVX2 processor (Zen 3, one thread) a linear of 2,020 × 384 by 384 × 1,536 took 49 ms with exact GELU in it and
    41 ms with it behind; tanh 59 and 50, SiLU 47 and 40; with ReLU and sigmoid in it, it was not slower.
    """
    if activation.name in ("gelu", "tanh", "swish") and not _has_avx512():
        return f"Without AVX-512 a linear with oneDNN's {activation.name} takes longer than the two apart."
    return None


def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def pack(weight: Tensor) -> Tensor:
    """The weight (out, in) in the order in which this processor's kernels read it: an opaque tensor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The weight that was packed, bit for bit."""
    return packed.to_dense()


def is_linear(node: Node) -> bool:
    """Whether the node is a linear, plain or oneDNN's."""
    return node.op == "call_function" and node.target in (aten.linear.default, POINTWISE, BINARY)


def weight_of(linear: Node) -> Node:
    """The node of a linear's weight."""
    weight = linear.args[2 if linear.target is BINARY else 1]
    assert isinstance(weight, Node)
    return weight


def is_plain(graph: GraphModule) -> bool:
    """Whether none of these operators is in the graph, nor anything else called than its nodes."""
    return graphs.stand_in(graph) is None and not any(node.target in FUSED for node in graph.graph.nodes)


def expand(graph: GraphModule) -> GraphModule:
    """A fork of the graph in plain operators and plain weights, or the graph itself if it is that already."""
    if is_plain(graph):
        return graph
    twin = graphs.fork(graph)
    graphs.set_stand_in(twin, None)
    for name in graphs.read_names(twin):
        tensor = graphs.get_tensor(twin, name)
        if tensor is not None and tensor.is_mkldnn:
            graphs.set_tensor(twin, name, unpack(tensor))
    for node in list(twin.graph.nodes):
        if node.target in FUSED:
            with twin.graph.inserting_before(node):
                _make_plain(node)
    twin.recompile()
    return twin


def _make_plain(node: Node) -> None:
    """Let the node, under its own name, compute the same of a plain linear before it; or be that linear."""
    x, *others, weight, bias, name = node.args[:5] if node.target is BINARY else node.args[:4]
    if name == "none":
        node.target, node.args = aten.linear.default, (x, weight, bias)
        return
    linear = node.graph.call_function(aten.linear.default, (x, weight, bias))
    if node.target is BINARY:
        node.target, node.args = aten.add.Tensor, (linear, *others)
    else:
        activation = next(each for each in ACTIVATIONS if (each.name, each.variant) == (name, node.args[5]))
        node.target, node.args, node.kwargs = activation.operator, (linear,), activation.keywords
