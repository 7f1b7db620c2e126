"""What the kernels compute, in plain PyTorch: the reference that they are tested against, slow.

In float32 between rounding what is read and rounding what is returned; in float64 throughout for inputs in float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127  # steps from 0, of a weight or of a token's number
TINY = LARGEST * torch.finfo(torch.float32).tiny  # rows of zeros have a scale, too
LONGEST = (2**31 - 1) // (255 * LARGEST)  # products whose sum is sure to fit into 32 bits, one factor being unsigned
SLICES, SLICE = 3, 256  # of a number in fixed point; and into how many steps the next slice divides one
LONGEST_SLICED = (2**31 - 1) // (SLICES * (SLICE // 2) ** 2)  # up to three products of slices are added to one sum
PANEL = 16  # outputs in a panel
STEP = {torch.int8: 64, torch.bfloat16: 32, torch.float32: 32}  # numbers of a row that a step multiplies
GROUP = {torch.int8: 4, torch.bfloat16: 2, torch.float32: 1}  # numbers that are multiplied together: what 32 bits hold
OF_EACH = 5  # tensors of each linear of several in a row
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
    steps = _steps(rows)
    return (rows * (1 / steps)).round(), steps  # as the kernels round, to the bit


def slice_up(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (outputs, inputs) in float32 in fixed point of 24 bits, and what a step of each output's is worth.

    It is packed, in int8: (panels, steps, slices, 16, 16, 4). A step holds 64 inputs, as groups of 4, for each of 16
    outputs; the first slice is whole steps, the second 256ths of one, the third 256ths of those.
    """
    fixed, worth = _fixed(weight)
    whole, middle = (fixed * SLICE ** (SLICES - 1)).to(torch.int32), sum(SLICE // 2 * SLICE**i for i in range(SLICES))
    # With half of 256 added to each slice none borrows from the next; they are the bytes, from the lowest up.
    bytes_of = ((whole + middle) ^ middle).view(torch.int8).view(*weight.shape, 4)
    packed = [pack(bytes_of[..., i].contiguous()) for i in reversed(range(SLICES))]
    return torch.stack([each.view(len(each), -1, 16, PANEL, 4) for each in packed], dim=2), worth.squeeze(-1)


def is_sliced(weight: Tensor) -> bool:
    """Whether a packed weight is one of float32 in slices."""
    return weight.dtype is torch.int8 and weight.dim() == 6


def unslice(sliced: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (outputs, inputs) in steps, in float32, which holds all its bits."""
    slices = [unpack(sliced[:, :, i].flatten(1, 2), outputs, inputs).float() for i in range(SLICES)]
    return slices[0] + (slices[1] + slices[2] / SLICE) / SLICE


def _fixed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 65536ths of a step (see `quantize`), and what a step is worth. Those in float64 stay as they are."""
    if rows.dtype is torch.float64:
        return rows, rows.new_ones(1)
    steps, finest = _steps(rows), SLICE ** (SLICES - 1)
    return (rows * (1 / steps) * finest).round() / finest, steps


def _steps(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True).clamp_min(TINY) / LARGEST


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

    With `scales`, one for each output, the weight is int8 and each row of x is rounded to 127 steps of its own; or it
    is float32 in slices, and each row is rounded to as many bits. Else x is rounded to the weight's type, bfloat16 or
    float32. Sums, bias, activation and LayerNorm (left out without `norm_weight`) are float32.
    """
    rows, wide = (x, torch.float64) if x.dtype is torch.float64 else (x.float(), torch.float32)
    if scales is None:
        y = functional.linear(rows.to(weight.dtype).to(wide), unpack(weight, outputs, x.shape[-1]).to(wide))
    else:
        # float64 holds every sum of such products, as 32-bit integers do: of whole numbers exactly.
        plain = (unslice if is_sliced(weight) else unpack)(weight, outputs, x.shape[-1]).double()
        tokens, steps = (_fixed if is_sliced(weight) else quantize)(rows)
        y = functional.linear(tokens.double(), plain).to(wide) * (steps * scales)
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    if residual is not None:
        y = y + residual.to(wide)
    if norm_weight is not None:
        y = functional.layer_norm(y, (outputs,), norm_weight, norm_bias, eps)
    return y.to(x.dtype)


def linears(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    outputs: Sequence[int],
    activations: str,
    residual: Tensor | None,
    added: Sequence[int],
    eps: Sequence[float],
) -> Tensor:
    """One `linear` after the other, each of what the one before has made.

    Of each: five `tensors` (weight, scales, bias, weight and bias of LayerNorm), its outputs, one of the `activations`,
    which are apart by spaces, and what it adds: nothing (-1), the `residual` (0), or the result of the first (1)...
    """
    made: list[Tensor | None] = [residual]
    for number, (size, activation) in enumerate(zip(outputs, activations.split(" "), strict=True)):
        weight, scales, bias, norm_weight, norm_bias = tensors[OF_EACH * number : OF_EACH * (number + 1)]
        assert weight is not None
        more = made[added[number]] if added[number] >= 0 else None
        x = linear(x, weight, scales, bias, size, activation, more, norm_weight, norm_bias, eps[number])
        made.append(x)
    return x


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """Attention of tensors (batch, length, heads * width); the boolean mask spreads to (batch, heads, length, length).

    A query that sees nothing gets zeros.
    """
    q, k, v = (each.view(*each.shape[:2], heads, -1).transpose(1, 2) for each in (query, key, value))
    found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return found.transpose(1, 2).flatten(2)
