"""Matrix products in float8 (e4m3: 3 bits behind the point, 448 at most) with a scale for each row of either matrix.

An NVIDIA GPU multiplies such numbers twice as fast as bfloat16 (Micikevicius et al., 2022, arXiv:2209.05433). `ROWS`
rounds what a linear reads, `LINEAR` multiplies it. Elsewhere, and in float64, both are plain PyTorch that rounds alike.
"""

import torch
from torch import Tensor
from torch.nn import functional

from bert_evaluation.kernels.reference import ACTIVATIONS

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
TINY = 1e-12  # rows of zeros have a scale, too
MULTIPLE = 16  # the GPU's product takes inputs and outputs by so many
CAPABILITY = (8, 9)  # the first NVIDIA GPUs that multiply float8


def why_not(device: torch.device) -> str | None:
    """Why there are no products in float8 on a device, if so."""
    if device.type != "cuda":
        return f"Only an NVIDIA GPU multiplies float8, and the graph is on {device}."
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} does not multiply float8: its compute capability is {capability[0]}.{capability[1]}, not 8.9."
    return None


def quantize(x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    """Each row (the last dimension) of activation(x) in float8, and the float32 scale (..., 1) that it is to be times.

    For x in float64 scales are, too.
    """
    if activation == "gelu" and x.is_cuda and x.dtype is not torch.float64:
        rounded, scales = torch.ops.bert_evaluation.float8_gelu_rows(x)
        return rounded, scales
    numbers = ACTIVATIONS[activation](x if x.dtype is torch.float64 else x.float())
    scales = numbers.abs().amax(-1, keepdim=True).clamp_min(TINY) / LARGEST
    return (numbers / scales).to(FLOAT8), scales


def linear(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x * scales) @ (weight * weight_scales).T + bias` in `dtype`, for x (..., inputs) and weight (outputs, inputs).

    Sums are float32 (float64 in float64). scales (..., 1) and weight_scales (outputs, 1).
    """
    if not x.numel():
        return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)
    if x.is_cuda and dtype is torch.bfloat16:
        by_rows = functional.ScalingType.RowWise
        found: Tensor = functional.scaled_mm(
            x.flatten(0, -2).contiguous(),
            weight.t(),
            scales.flatten(0, -2).contiguous(),
            by_rows,
            weight_scales.t(),
            by_rows,
            bias=bias,
            output_dtype=dtype,
            use_fast_accum=True,
        )
        return found.view(*x.shape[:-1], -1)
    wide = scales.dtype
    y = functional.linear(x.to(wide), weight.to(wide)) * (scales * weight_scales.to(wide).squeeze(-1))
    return (y if bias is None else y + bias).to(dtype)


def _gelu_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from bert_evaluation import triton_kernels  # there is Triton only where there is a GPU

    return triton_kernels.gelu_rows(x)


def _fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FLOAT8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_linear(x: Tensor, _: Tensor, weight: Tensor, __: Tensor, ___: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("float8_rows(Tensor x, str activation='none') -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
# A compiler sees through it, and rounds in one loop with what comes before.
_LIBRARY.impl("float8_rows", quantize, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.define("float8_gelu_rows(Tensor x) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.impl("float8_gelu_rows", _gelu_rows, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("bert_evaluation::float8_gelu_rows", _fake_rows, lib=_LIBRARY)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "float8_linear(Tensor x, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.impl("float8_linear", linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("bert_evaluation::float8_linear", _fake_linear, lib=_LIBRARY)
ROWS = torch.ops.bert_evaluation.float8_rows.default
LINEAR = torch.ops.bert_evaluation.float8_linear.default
