"""Products of matrices in parts, each over a slice of what is summed, so that they can be computed at the same time."""

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@torch.library.custom_op("bert_evaluation::partial_products", mutates_args=())
def partial_products(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """Multiply x (..., inputs) by weight (outputs, inputs) over each of `parts` slices: (parts, ..., outputs).

    Their sum is the product. They are float32 where x is in 16 bits, so that nothing is rounded on the way to it.
    """
    rows = x.reshape(-1, parts, x.shape[-1] // parts).transpose(0, 1)
    columns = weight.view(len(weight), parts, -1).permute(1, 2, 0)
    if x.dtype not in HALVES:
        found = torch.bmm(rows, columns)
    elif x.is_cuda:
        found = torch.bmm(rows, columns, out_dtype=torch.float32)
    else:
        found = torch.bmm(rows.float(), columns.float())
    return found.view(parts, *x.shape[:-1], len(weight))


@partial_products.register_fake
def _(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    kind = torch.float32 if x.dtype in HALVES else x.dtype
    return x.new_empty((parts, *x.shape[:-1], weight.shape[0]), dtype=kind)


PRODUCTS = torch.ops.bert_evaluation.partial_products.default
