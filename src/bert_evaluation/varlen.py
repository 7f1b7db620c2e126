"""Operators on packed sequences: the tokens of a batch in one row (1, tokens, width), without those of padding.

The mask says which tokens those are, wherever they stand: on the left, on the right, with holes. They are kept in the
order of the batch, so that each sequence is a slice of the row.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WIDEST = 128  # head that our own kernel is for


@torch.library.custom_op("bert_evaluation::places", mutates_args=())
def places(mask: Tensor) -> Tensor:
    """Which tokens are real, as their numbers in the batch: (1, tokens, 1). A GPU is waited for: how many are there?"""
    return mask.flatten().nonzero().unsqueeze(0)


def unpad(x: Tensor, places: Tensor) -> Tensor:
    """Pack x (batch, length, ...): the tokens in those places, (1, tokens, ...)."""
    return x.flatten(0, 1).index_select(0, places.flatten()).unsqueeze(0)


@torch.library.custom_op("bert_evaluation::pad", mutates_args=())
def pad(packed: Tensor, mask: Tensor) -> Tensor:
    """Put packed tokens back to where they were in the batch, with zeros at padding."""
    real = mask.bool()
    if packed.shape[1] == 0:
        return packed.new_zeros(*mask.shape, *packed.shape[2:])
    # Without asking which tokens are real: a GPU would have to be waited for, once more.
    places = (real.flatten().cumsum(0) - 1).clamp_min(0).view(mask.shape)
    return packed[0, places].masked_fill(~real.view(*mask.shape, *[1] * (packed.dim() - 2)), 0)


@torch.library.custom_op("bert_evaluation::offsets", mutates_args=())
def offsets(mask: Tensor) -> Tensor:
    """Where each sequence begins among the packed tokens, and where the last one ends: (batch + 1), int32."""
    return functional.pad(mask.bool().sum(1).cumsum(0), (1, 0)).int()


@torch.library.custom_op("bert_evaluation::varlen_attention", mutates_args=())
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, heads: int, scale: float | None
) -> Tensor:
    """Attention of packed tokens to those of their own sequence, none of which is longer than `longest`."""
    width = query.shape[2] // heads
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or width > WIDEST:
        return _by_length(query, key, value, offsets.diff().tolist(), heads, scale)
    from bert_evaluation import triton_kernels  # there is Triton only where there is a GPU

    factor = width**-0.5 if scale is None else scale
    return triton_kernels.packed_attention(query, key, value, offsets, longest, heads, factor)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, scale: float | None) -> Tensor:
    """The same in torch's own attention, from a mask (batch, length)."""
    return _by_length(query, key, value, mask.bool().sum(dim=1).tolist(), heads, scale)


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], heads: int, scale: float | None
) -> Tensor:
    """Neighbours of the same length are computed at once."""
    results, start = [], 0
    for length, run in groupby(lengths):
        rows = len(list(run))
        if length == 0:
            continue
        q, k, v = (
            x[0, start : start + rows * length].view(rows, length, heads, -1).transpose(1, 2)
            for x in (query, key, value)
        )
        found = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        results.append(found.transpose(1, 2).reshape(1, rows * length, -1))
        start += rows * length
    return torch.cat(results, dim=1) if results else value.new_empty(value.shape)


@places.register_fake
def _(mask: Tensor) -> Tensor:
    tokens = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty((1, tokens, 1), dtype=torch.int64)


@pad.register_fake
def _(packed: Tensor, mask: Tensor) -> Tensor:
    return packed.new_empty(*mask.shape, *packed.shape[2:])


@offsets.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


@varlen_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return value.new_empty(value.shape)


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("unpad(Tensor x, Tensor places) -> Tensor")  # type: ignore[no-untyped-call]
# A compiler sees through it, and looks up with what comes behind.
_LIBRARY.impl("unpad", unpad, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
PLACES = torch.ops.bert_evaluation.places.default
UNPAD = torch.ops.bert_evaluation.unpad.default
PAD = torch.ops.bert_evaluation.pad.default
OFFSETS = torch.ops.bert_evaluation.offsets.default
ATTENTION = torch.ops.bert_evaluation.varlen_attention.default
