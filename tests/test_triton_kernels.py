"""The kernels in Triton, held against plain PyTorch in float64 on the same inputs."""

import pytest
import torch
from torch.nn import functional as F

from bert_evaluation import float8, kernels, varlen
from bert_evaluation.kernels import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (4, 16, 24, 64, 128)


def thirds(batch, length, width, dtype):
    """Query, key and value as a merged linear returns them."""
    return torch.randn(batch, length, 3 * width, device="cuda", dtype=dtype).split(width, dim=-1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [*WIDTHS, 136])  # of the last there is no kernel
@pytest.mark.parametrize("longest", [1, 63, 64, 65, 512])
def test_packed_attention(dtype, width, longest):
    torch.manual_seed(longest)
    real = torch.rand(6, longest, device="cuda") < torch.rand(6, 1, device="cuda")
    real[0], real[1], real[2, 0] = False, True, True
    query, key, value = thirds(1, int(real.sum()), 2 * width, dtype)
    found = varlen.ATTENTION(query, key, value, varlen.offsets(real), longest, 2, 0.3)
    exact = varlen.attention(query.double(), key.double(), value.double(), real, 2, 0.3)
    assert found.dtype is dtype
    assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [None, (3, 1, 1, 0), (1, 1, 0, 0), (3, 2, 0, 0), (3, 1, 0, 0)])
@pytest.mark.parametrize("length", [1, 33, 64, 300])
def test_attention_with_a_mask(dtype, width, shape, length):
    torch.manual_seed(length)
    query, key, value = thirds(3, length, 2 * width, dtype)
    mask = None
    if shape is not None:
        mask = torch.rand([each or length for each in shape], device="cuda") < 0.5
        mask[-1, :, :1] = False  # a query that sees nothing
    found = kernels.ATTENTION(query, key, value, mask, 2, 0.3)
    exact = reference.attention(query.double(), key.double(), value.double(), mask, 2, 0.3)
    assert found.dtype is dtype
    assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("width", [16, 100, 4096])
def test_rows_of_gelu(width):
    x = 3 * torch.randn(3, 7, width, device="cuda", dtype=torch.bfloat16)
    x[0, 0], x[0, 1, 3], x[1, 2] = 0, 1000, -20
    found, scales = float8.ROWS(x, "gelu")
    exact = F.gelu(x.double())
    largest = exact.abs().amax(-1, keepdim=True)
    near = 1e-3  # tanh in place of the error function, by an instruction that rounds
    assert bool(((scales.double() * float8.LARGEST - largest).abs() <= near).all())
    # Each is rounded to a sixteenth of itself, or to half of the least step.
    step = torch.maximum(exact.abs() / 16, scales.double() * 2.0**-10)
    assert bool(((found.double() * scales.double() - exact).abs() <= 1.01 * step + near).all())


@pytest.mark.skipif(
    torch.cuda.is_available() and float8.why_not(torch.device("cuda")) is not None, reason="no products in float8 here"
)
@pytest.mark.parametrize("shape", [(2, 5), (1, 0), (1, 1)])
def test_linear(shape):
    x, weight = torch.randn(*shape, 64, device="cuda"), torch.randn(48, 64, device="cuda")
    bias = torch.randn(48, device="cuda", dtype=torch.bfloat16)
    arguments = (*float8.quantize(x), *float8.quantize(weight), bias)
    found = float8.LINEAR(*arguments, torch.bfloat16)
    exact = float8.linear(*(each.cpu() for each in arguments), torch.float32)
    assert found.shape == (*shape, 48)
    assert torch.allclose(found.cpu().float(), exact, rtol=2**-7, atol=2**-5)
