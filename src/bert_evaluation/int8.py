"""Linears on 8-bit integers, as plain PyTorch: what is rounded, and sums without any rounding.

Two operators of our own, so that each is one node of a graph and a saved graph names them.
"""

import torch
from torch import Tensor

LARGEST = 127  # of a weight; a token's numbers are as far from ZERO at most
ZERO = 128  # what stands for 0 among a token's numbers, which have no sign
LONGEST = (2**31 - 1) // (255 * LARGEST)  # products whose sum is sure to fit into 32 bits


def scales(rows: Tensor) -> Tensor:
    """What one step of each row (the last dimension) is worth, its largest value being 127 steps."""
    tiny = LARGEST * torch.finfo(rows.dtype).tiny  # rows of zeros have a scale, too
    return rows.abs().amax(-1, keepdim=True).clamp_min(tiny) / LARGEST


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8, symmetric, and the scale of each output."""
    scale = scales(weight)
    return (weight / scale).round().to(torch.int8), scale.squeeze(-1)


@torch.library.custom_op("bert_evaluation::quantize_tokens", mutates_args=())
def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token (the last dimension) as uint8 around 128, and its scale.

    A scale for each token, not for the tensor: so no text's answer depends on those beside it, nor on padding.
    """
    scale = scales(x)
    # Cutting off what is half a step too large rounds in one pass less than rounding does.
    return (x / scale).add_(ZERO + 0.5).to(torch.uint8), scale


@_quantize_tokens.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty((*x.shape[:-1], 1))


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


QUANTIZE = torch.ops.bert_evaluation.quantize_tokens.default
LINEAR = torch.ops.bert_evaluation.linear_int8.default
