"""Linears on 8-bit integers, as plain PyTorch: what is rounded, and sums without any rounding.

What a linear reads is rounded by torch's operators, which cost less to call than one of our own in Python. The linear
is an operator of our own, so that it is one node of a graph, and a saved graph names it.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
LARGEST = 127  # of a weight; a token's numbers are as far from ZERO at most
ZERO = 128  # what stands for 0 among a token's numbers, which have no sign
TINY = 127 * torch.finfo(torch.float32).tiny  # rows of zeros have a scale, too
LONGEST = (2**31 - 1) // (255 * LARGEST)  # products whose sum is sure to fit into 32 bits


def scales(rows: Any) -> Any:
    """What one step of each row (the last dimension) is worth, its largest value being 127 steps."""
    return aten.div.Tensor(aten.clamp_min.default(aten.amax.default(aten.abs.default(rows), [-1], True), TINY), LARGEST)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8, symmetric, and the scale of each output."""
    scale = scales(weight)
    return (weight / scale).round().to(torch.int8), scale.squeeze(-1)


def quantize_tokens(x: Any) -> tuple[Any, Any]:
    """Each token (the last dimension) as uint8 around 128, and its scale; of a tensor, or as nodes of a graph.

    A scale for each token, not for the tensor: so no text's answer depends on those beside it, nor on padding.
    """
    scale = scales(x)
    # Cutting off what is half a step too large rounds in one pass less than rounding does.
    return aten.to.dtype(aten.add.Tensor(aten.div.Tensor(x, scale), ZERO + 0.5), torch.uint8), scale


@torch.library.custom_op("bert_evaluation::linear_int8", mutates_args=())
def _linear_int8(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The sums of products of quantised tokens and an int8 weight (out, in), each by the output's scale.

    float64 holds every such sum exactly, so this is what 32-bit integers give; slow, on any processor.
    """
    sums = torch.nn.functional.linear(tokens.double() - ZERO, weight.double())
    return sums.to(scale.dtype) * scale


@_linear_int8.register_fake
def _(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*tokens.shape[:-1], weight.shape[0]))


LINEAR = torch.ops.bert_evaluation.linear_int8.default
