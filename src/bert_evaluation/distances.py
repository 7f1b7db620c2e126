"""How far results are apart: by their values, and in units of the last place."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def marked(tensor: Tensor, marks: Tensor | None) -> Tensor:
    """What a tensor (batch, length, ...) has at the marked positions, and one (batch, ...) in rows with such."""
    if marks is None or tensor.shape[:1] != marks.shape[:1]:
        return tensor
    return tensor[marks if tensor.shape[:2] == marks.shape else marks.any(dim=1)]


def distance(expected: Sequence[Tensor], got: Sequence[Tensor], marks: Tensor | None = None) -> float:
    """The largest absolute difference; infinite where shapes, or what is not finite, differ."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        return math.inf
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        a, b = marked(one.detach().double(), marks), marked(other.detach().double(), marks)
        odd = ~(a.isfinite() & b.isfinite())
        if not torch.equal(a[odd].nan_to_num(1.0, 2.0, 3.0), b[odd].nan_to_num(1.0, 2.0, 3.0)):
            return math.inf
        if not bool(odd.all()):
            worst = max(worst, float((a - b)[~odd].abs().max()))
    return worst


def ulp(expected: Sequence[Tensor], got: Sequence[Tensor], marks: Tensor | None = None) -> float:
    """The largest difference in units of the last place of the expected value."""
    if len(expected) != len(got):
        return math.inf
    worst = 0.0
    for whole, result in zip(expected, got, strict=True):
        one, other = marked(whole, marks), marked(result, marks)
        if one.is_floating_point() and one.shape == other.shape and one.numel():
            size = one.abs()
            unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
            steps = ((one.double() - other).abs() / unit)[one.isfinite() & other.isfinite()]
            worst = max(worst, float(steps.max()) if steps.numel() else 0.0)
    return worst
