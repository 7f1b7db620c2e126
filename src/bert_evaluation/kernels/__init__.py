"""Operators of our own for CPUs with AVX2, AVX-512 or AMX, in C++; elsewhere their equals in plain PyTorch.

`LINEAR` is a linear layer with what follows it (activation, residual, LayerNorm), on bfloat16, int8 or float32, and
`LINEARS` several in a row, each of what the one before has made;
`ATTENTION` that of sequences to themselves, in bfloat16 or float32, and on an NVIDIA GPU, in Triton, in 16 bits;
`PACKED_ATTENTION` the same of sequences without padding, on a CPU.
`reference.py` says what they compute. Each has a twin that is always plain PyTorch, for runs in float64.
"""

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import varlen
from bert_evaluation.graph import GraphModule
from bert_evaluation.kernels import reference
from bert_evaluation.kernels.build import why_not_built
from bert_evaluation.kernels.reference import (
    ACTIVATIONS,
    LONGEST,
    LONGEST_SLICED,
    OF_EACH,
    SLICES,
    is_sliced,
    pack,
    quantize,
    slice_up,
    unpack,
    unslice,
)

SCHEMAS = {
    "linear": (
        "(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, SymInt outputs, str activation='none',"
        " Tensor? residual=None, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0) -> Tensor"
    ),
    "linears": (
        "(Tensor x, Tensor?[] tensors, int[] outputs, str activations, Tensor? residual, int[] added, float[] eps)"
        " -> Tensor"
    ),
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt heads, float scale) -> Tensor",
    "packed_attention": "(Tensor query, Tensor key, Tensor value, Tensor mask, SymInt heads, float scale) -> Tensor",
}
TYPES_OF_ATTENTION = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}


def why_not(kind: torch.dtype, device: torch.device) -> str | None:
    """Why there are no kernels for weights of this type, if so. The first call compiles them, in some seconds."""
    if device.type != "cpu":
        return f"The kernels are for a CPU, and the graph is on {device}."
    able = torch.cpu.get_capabilities()
    if not able.get("avx2"):
        return "This processor has no AVX2."
    # What is compiled on AVX-512 with VNNI is for it, else it is for AVX2 (see `simd.h`).
    if kind is torch.bfloat16 and able.get("avx512_f") and able.get("avx512_vnni") and not able.get("avx512_bf16"):
        return "This processor has no AVX-512 with BF16."
    return why_not_built()


def multiplies_slices(device: torch.device) -> bool:
    """Whether there are kernels for float32 in slices: on AMX, which is fast at integers and has no float32."""
    built = why_not(torch.float32, device) is None and hasattr(torch.ops.bert_evaluation, "has_amx")
    return built and bool(torch.ops.bert_evaluation.has_amx())


def why_no_attention(kind: torch.dtype, width: int, device: torch.device) -> str | None:
    """Why there is no kernel for attention in this type with heads of this width, if so."""
    types = TYPES_OF_ATTENTION["cuda" if device.type == "cuda" else "cpu"]
    if kind not in types:
        return f"It computes in {kind}; the kernels are for {' and '.join(str(each)[6:] for each in types)}."
    if device.type == "cuda":
        if width > varlen.WIDEST:
            return f"Its heads are {width} wide; the kernel is for widths up to {varlen.WIDEST}."
        return "triton, which the kernel is written in, is not installed." if find_spec("triton") is None else None
    if width % 2:
        return "A head's width is odd."
    return why_not(kind, device)


def prepare(graph: GraphModule) -> GraphModule:
    """Load the kernels that a graph calls, such as one that was read from a file, if this machine can have them.

    Weights in slices, which it may not be able to multiply, are then numbers of float32 again.
    """
    device = torch.device("cpu")
    if any(node.target in TWINS for node in graph.graph.nodes):
        able = why_not(torch.float32, device) is None
        if able and not multiplies_slices(device):
            _in_one_piece(graph)
    return graph


def _in_one_piece(graph: GraphModule) -> None:
    """Make weights in slices numbers of float32, in place: what they are, but for one rounding."""

    def stored(node: Any) -> Tensor:
        tensor = graphs.get_tensor(graph, str(node.target))
        assert tensor is not None
        return tensor

    read = graphs.read_names(graph)
    sliced = {str(each.target) for each in graph.graph.find_nodes(op="get_attr") if is_sliced(stored(each))}

    def made_whole(weight: Any, scales: Any, inputs: int, outputs: int) -> Any:
        """The scales that are left."""
        if str(weight.target) not in sliced:
            return scales
        if is_sliced(stored(weight)):  # which others may read too
            plain = unslice(stored(weight), outputs, inputs) * stored(scales)[:, None]
            graphs.set_tensor(graph, str(weight.target), pack(plain))
        return None

    for node in graph.graph.nodes:
        if node.target is LINEAR:
            x, weight, scales, _, outputs = node.args[:5]
            node.update_arg(2, made_whole(weight, scales, x.meta["val"].shape[-1], outputs))
        elif node.target is LINEARS:
            x, tensors, sizes = node.args[0], list(node.args[1]), node.args[2]
            for number, (inputs, outputs) in enumerate(pairwise((x.meta["val"].shape[-1], *sizes))):
                weight, scales = tensors[OF_EACH * number : OF_EACH * number + 2]
                tensors[OF_EACH * number + 1] = made_whole(weight, scales, inputs, outputs)
            node.update_arg(1, tensors)
    if sliced:
        graph.graph.eliminate_dead_code()
        graphs.drop(graph, read - graphs.read_names(graph))
        graph.recompile()


def in_plain_pytorch(graph: GraphModule) -> GraphModule:
    """Let a graph call the twins, in place: they take every type of number."""
    for node in graph.graph.nodes:
        if node.target in TWINS:
            node.target = TWINS[node.target]
    graph.recompile()
    return graph


def _fake_linear(x: Tensor, weight: Tensor, scales: Any, bias: Any, outputs: Any, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], outputs))


def _fake_linears(x: Tensor, tensors: Any, outputs: Any, *_: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], outputs[-1]))


def _fake_attention(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(query.shape)


def _attention_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float
) -> Tensor:
    if why_no_attention(query.dtype, query.shape[2] // heads, query.device) is not None:
        return reference.attention(query, key, value, mask, heads, scale)
    from bert_evaluation import triton_kernels

    return triton_kernels.attention(query, key, value, mask, heads, scale)


def _define(name: str, equal: Any, fake: Any) -> tuple[Any, Any]:
    """An operator, computed by `equal` where no kernel is loaded, and its twin."""
    for each in (name, f"{name}_in_plain_pytorch"):
        _LIBRARY.define(each + SCHEMAS[name])  # type: ignore[no-untyped-call]
        _LIBRARY.impl(each, equal, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"bert_evaluation::{each}", fake, lib=_LIBRARY)
    operators = torch.ops.bert_evaluation
    return getattr(operators, name).default, getattr(operators, f"{name}_in_plain_pytorch").default


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
LINEAR, _plain_linear = _define("linear", reference.linear, _fake_linear)
LINEARS, _plain_linears = _define("linears", reference.linears, _fake_linears)
ATTENTION, _plain_attention = _define("attention", reference.attention, _fake_attention)
PACKED_ATTENTION, _plain_packed_attention = _define("packed_attention", varlen.attention, _fake_attention)
_LIBRARY.impl("attention", _attention_on_cuda, "CUDA")  # type: ignore[no-untyped-call]
TWINS = {
    LINEAR: _plain_linear,
    LINEARS: _plain_linears,
    ATTENTION: _plain_attention,
    PACKED_ATTENTION: _plain_packed_attention,
}

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "LINEAR",
    "LINEARS",
    "LONGEST",
    "LONGEST_SLICED",
    "OF_EACH",
    "PACKED_ATTENTION",
    "SLICES",
    "in_plain_pytorch",
    "is_sliced",
    "multiplies_slices",
    "pack",
    "prepare",
    "quantize",
    "slice_up",
    "unpack",
    "why_no_attention",
    "why_not",
]
