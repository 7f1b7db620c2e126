"""How torch can multiply matrices on a device, in each precision that it has there; and which one a graph uses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn
from bert_evaluation.graph import GraphModule

aten = torch.ops.aten
Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
Call = Callable[[], Any]

FP8 = torch.float8_e4m3fn
PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    FP8: "fp8",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Way:
    """One way to multiply: `make` is given a (tokens × inputs) and a (outputs × inputs) matrix in float32.

    It casts and packs them, and returns the call that multiplies them. A way that torch or the device does not have
    raises RuntimeError or AttributeError, when it is made or called.
    """

    precision: Precision
    name: str
    make: Callable[[Tensor, Tensor], Call]


def ways(device: torch.device) -> Iterator[Way]:
    """All of them: torch's own operators, for int8 those that quantised models use (`_int_mm` is private) and ours."""
    if device.type == "cpu":
        yield Way("fp32", "linear", _linear)
        yield Way("fp32", "oneDNN, weight packed", _packed)
        yield Way("fp32", "our kernels, in slices", _in_slices)
        yield Way("bf16", "linear", lambda x, w: _linear(x.bfloat16(), w.bfloat16()))
        yield Way("bf16", "oneDNN, weight packed", lambda x, w: _packed(x.bfloat16(), w.bfloat16()))
        yield Way("int8", f"quantized.linear, {torch.backends.quantized.engine}", _quantized)
        yield Way("int8", "onednn.qlinear_pointwise", _qlinear)
        yield Way("int8", "our kernels, rows rounded too", _on_kernels)  # the only one that is right without VNNI
        return
    yield Way("fp32", f"linear{_tf32()}" if device.type == "cuda" else "linear", _linear)
    yield Way("bf16", "linear", lambda x, w: _linear(x.bfloat16(), w.bfloat16()))
    yield Way("fp16", "linear", lambda x, w: _linear(x.half(), w.half()))
    if device.type == "cuda":
        yield Way("fp8", "scaled_mm, a scale for each row", _scaled_by_row)
        yield Way("fp8", "scaled_mm, one scale", _scaled_by_tensor)


def precision(graph: GraphModule) -> Precision:
    """The precision that most of a graph's weights are multiplied in, each counted as often as it is read."""
    numbers = Counter[Precision]()
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = graphs.get_tensor(graph, str(node.target))
        if tensor is not None and tensor.dim() >= 2 and tensor.dtype in PRECISIONS:
            readers = sum(user.target is not aten.embedding.default for user in node.users)
            sliced = kernels.is_sliced(tensor)
            kind = torch.float32 if sliced else tensor.dtype
            numbers[PRECISIONS[kind]] += readers * tensor.numel() // (kernels.SLICES if sliced else 1)
    return max(numbers, key=lambda each: numbers[each], default="fp32")


def _tf32() -> str:
    """What torch makes of float32 on tensor cores: by default nothing, it multiplies 24 bits and not TF32's 11."""
    return ", without TF32" if torch.get_float32_matmul_precision() == "highest" else ", TF32 allowed"


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(x, weight)


def _packed(x: Tensor, weight: Tensor) -> Call:
    packed = onednn.pack(weight)
    return lambda: onednn.POINTWISE(x, packed, None, "none", [], "")


def _quantized(x: Tensor, weight: Tensor) -> Call:
    # A scale of the output that holds the largest result there is.
    out = 255 * 127 * x.shape[1] / 255
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    numbers = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
    return lambda: torch.ops.quantized.linear(numbers, packed, out, 0)


def _qlinear(x: Tensor, weight: Tensor) -> Call:
    numbers, packed = x.to(torch.uint8), torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), list(x.shape))
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    none: list[Any] = []
    return lambda: torch.ops.onednn.qlinear_pointwise(
        numbers, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", none, ""
    )


def _in_slices(x: Tensor, weight: Tensor) -> Call:
    if not kernels.multiplies_slices(x.device):
        raise RuntimeError("Float32 is not multiplied in slices here.")
    sliced, scales = kernels.slice_up(weight)
    return lambda: kernels.LINEAR(x, sliced, scales, None, len(weight))


def _on_kernels(x: Tensor, weight: Tensor) -> Call:
    if reason := kernels.why_not(torch.int8, x.device):
        raise RuntimeError(reason)
    packed, scales = kernels.pack(weight.to(torch.int8)), torch.ones(len(weight))
    return lambda: kernels.LINEAR(x, packed, scales, None, len(weight))


def _scaled_by_row(x: Tensor, weight: Tensor) -> Call:
    return _scaled(x, weight, x.new_ones(len(x), 1), x.new_ones(1, len(weight)), functional.ScalingType.RowWise)


def _scaled_by_tensor(x: Tensor, weight: Tensor) -> Call:
    return _scaled(x, weight, x.new_ones(1), x.new_ones(1), functional.ScalingType.TensorWise)


def _scaled(x: Tensor, weight: Tensor, of_x: Tensor, of_weight: Tensor, kind: functional.ScalingType) -> Call:
    """The product in fp8, with scales of that kind."""
    x8, weight8 = x.to(FP8), weight.to(FP8)
    return lambda: functional.scaled_mm(
        x8, weight8.t(), of_x, kind, of_weight, kind, output_dtype=torch.bfloat16, use_fast_accum=True
    )
