"""A product that ends with GELU in its form with tanh, which an NVIDIA GPU computes before a sum leaves the chip.

The one place that names torch's operator for it, which is not public.
"""

import torch
from torch import Tensor
from torch.nn import functional

from bert_evaluation.partial_products import HALVES


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(linear(x, weight, bias)) by tanh: x (..., inputs), weight (outputs, inputs), bias (outputs)."""
    if not (x.is_cuda and x.dtype in HALVES and x.numel()):
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    found = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return found.view(*x.shape[:-1], len(weight))


def _fake(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY = torch.library.Library("bert_evaluation", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("linear_gelu", linear_gelu, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("bert_evaluation::linear_gelu", _fake, lib=_LIBRARY)
LINEAR_GELU = torch.ops.bert_evaluation.linear_gelu.default
