"""What the kernels compute, in plain PyTorch: the reference that they are tested against, slow.

In float32 between rounding what is read and rounding what is returned; in float64 throughout for inputs in float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127  # steps from 0, of a weight or of a token's number
TINY = LARGEST * torch.finfo(torch.float32).tiny  # rows of zeros have a scale, too
LONGEST = (2**31 - 1) // (255 * LARGEST)  # products whose sum is sure to fit into 32 bits, one factor being unsigned
PANEL = 16  # outputs in a panel
STEP = {torch.int8: 64, torch.bfloat16: 32, torch.float32: 32}  # numbers of a row that a step multiplies
GROUP = {torch.int8: 4, torch.bfloat16: 2, torch.float32: 1}  # numbers that are multiplied together: what 32 bits hold
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def pack(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) as the kernels read it: (panels, groups, 16, numbers of a group).

    Outputs are made a multiple of 32 and inputs whole steps, with zeros.
    """
    group = GROUP[weight.dtype]
    outputs, inputs = weight.shape
    padded = functional.pad(weight, (0, -inputs % STEP[weight.dtype], 0, -outputs % (2 * PANEL)))
    return padded.view(padded.shape[0] // PANEL, PANEL, -1, group).transpose(1, 2).contiguous()


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (outputs, inputs) that was packed, bit for bit."""
    return packed.transpose(1, 2).flatten(0, 1).flatten(1)[:outputs, :inputs].contiguous()


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row (the last dimension) as whole numbers of steps, 127 at most, and what a step of the row is worth."""
    steps = rows.abs().amax(-1, keepdim=True).clamp_min(TINY) / LARGEST
    return (rows * (1 / steps)).round(), steps  # as the kernels round, to the bit


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`layer_norm(activation(x @ weight.T + bias) + residual)`, in the type of x (..., inputs): float32 or lower.

    With `scales`, one for each output, the weight is int8 and each row of x is rounded to 127 steps of its own; else
    x is rounded to the weight's type, bfloat16 or float32. Sums, bias, activation and LayerNorm (left out without
    `norm_weight`) are float32.
    """
    plain = unpack(weight, outputs, x.shape[-1])
    rows, wide = (x, torch.float64) if x.dtype is torch.float64 else (x.float(), torch.float32)
    if scales is not None:
        tokens, steps = quantize(rows)
        # float64 holds every sum of such products exactly, as 32-bit integers do.
        y = functional.linear(tokens.double(), plain.double()).to(wide) * (steps * scales)
    else:
        y = functional.linear(rows.to(weight.dtype).to(wide), plain.to(wide))
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    if residual is not None:
        y = y + residual.to(wide)
    if norm_weight is not None:
        y = functional.layer_norm(y, (outputs,), norm_weight, norm_bias, eps)
    return y.to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """Attention of tensors (batch, length, heads * width); the boolean mask spreads to (batch, heads, length, length).

    A query that sees nothing gets zeros.
    """
    q, k, v = (each.view(*each.shape[:2], heads, -1).transpose(1, 2) for each in (query, key, value))
    found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return found.transpose(1, 2).flatten(2)
