"""Operators on packed sequences: the tokens of a batch in one row (1, tokens, width), without those of padding.

The mask says which tokens those are, wherever they stand: on the left, on the right, with holes. They are kept in the
order of the batch, so that each sequence is a slice of the row.
"""

from itertools import groupby

import torch
from torch import Tensor


@torch.library.custom_op("bert_evaluation::unpad", mutates_args=())
def unpad(x: Tensor, mask: Tensor) -> Tensor:
    """Pack x (batch, length, width): the tokens where mask (batch, length) is not 0."""
    return x[mask.bool()].unsqueeze(0)


@torch.library.custom_op("bert_evaluation::pad", mutates_args=())
def pad(packed: Tensor, mask: Tensor) -> Tensor:
    """Put packed tokens back to where they were in the batch, with zeros at padding."""
    padded = packed.new_zeros(*mask.shape, *packed.shape[2:])
    padded[mask.bool()] = packed[0]
    return padded


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, scale: float | None) -> Tensor:
    """Attention of packed tokens to those of their own sequence. Neighbours of the same length are computed at once."""
    lengths = mask.bool().sum(dim=1).tolist()
    results, start = [], 0
    for length, run in groupby(lengths):
        rows = len(list(run))
        if length == 0:
            continue
        q, k, v = (
            x[0, start : start + rows * length].view(rows, length, heads, -1).transpose(1, 2)
            for x in (query, key, value)
        )
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        results.append(found.transpose(1, 2).reshape(1, rows * length, -1))
        start += rows * length
    return torch.cat(results, dim=1) if results else value.new_empty(value.shape)


varlen_attention = torch.library.custom_op("bert_evaluation::varlen_attention", attention, mutates_args=())


@unpad.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001
    tokens = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(1, tokens, *x.shape[2:])


@pad.register_fake
def _(packed: Tensor, mask: Tensor) -> Tensor:
    return packed.new_empty(*mask.shape, *packed.shape[2:])


@varlen_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, scale: float | None) -> Tensor:  # noqa: ARG001
    return value.new_empty(value.shape)


UNPAD = torch.ops.bert_evaluation.unpad.default
PAD = torch.ops.bert_evaluation.pad.default
ATTENTION = torch.ops.bert_evaluation.varlen_attention.default
