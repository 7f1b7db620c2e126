"""Kernels in Triton, for what neither torch's operators nor TorchInductor do well on an NVIDIA GPU.

Imported only where Triton is and where it is needed. What they compute is written in plain PyTorch where they are
called from (`varlen.py`, `kernels/reference.py`, `float8.py`), which tests hold them against.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST: tl.constexpr = tl.constexpr(448.0)  # of float8 e4m3
TINY: tl.constexpr = tl.constexpr(1e-12)  # the least that the largest number of a row counts as
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below all scores
LOG2_E = 1.4426950408889634
SMALLEST = 1e-30  # factor of scores: what is not seen has a score of -inf, which times 0 would be no number
# Queries and keys that a program computes at a time. Sequences of some hundred tokens leave less unused of small tiles.
QUERIES, KEYS, WARPS, STAGES = 64, 32, 4, 3
NARROWEST = 16  # rows and columns that a product of tiles has at least


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, heads: int, scale: float
) -> Tensor:
    """Attention of packed sequences, tensors (1, tokens, heads * width) in float16 or bfloat16.

    Sequence i is the tokens from offsets[i] up to offsets[i + 1] (int32), none longer than `longest`.
    """
    return _launch(query, key, value, heads, scale, longest, len(offsets) - 1, offsets, None)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """Attention of tensors (batch, length, heads * width); the boolean mask spreads to (batch, heads, length, length).

    A query that sees nothing gets zeros.
    """
    batch, length = query.shape[:2]
    if mask is not None:
        mask = mask.expand(batch, heads, length, length)
    return _launch(query, key, value, heads, scale, length, batch, None, mask)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, longest: int, sequences: int,
    offsets: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    # Sequences follow each other: all rows are as far apart as those of one.
    query, key, value = (each if _is_even(each) else each.contiguous() for each in (query, key, value))
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    if not result.numel():
        return result
    width = query.shape[2] // heads
    if scale < 0:
        query, scale = -query, -scale
    # With few programs each had better be short: then the rest of the GPU would wait for them.
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    queries = QUERIES if triton.cdiv(longest, QUERIES) * sequences * heads >= processors else NARROWEST
    _attention[triton.cdiv(longest, queries), sequences, heads](
        query, key, value, result, offsets, mask,
        query.stride(1), key.stride(1), value.stride(1), result.stride(1),
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        longest, max(scale * LOG2_E, SMALLEST), width, max(NARROWEST, triton.next_power_of_2(width)), queries, KEYS,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return result


def _is_even(x: Tensor) -> bool:
    return x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))


@triton.jit
def _attention(
    query, key, value, result, offsets, mask,
    query_stride, key_stride, value_stride, result_stride,
    mask_sequence, mask_head, mask_query, mask_key,
    length, scale, width: tl.constexpr, block: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """As in FlashAttention (Dao et al., 2022, arXiv:2205.14135) no score leaves the chip."""
    sequence, head = tl.program_id(1), tl.program_id(2)
    first = sequence * length
    if offsets is not None:
        first = tl.load(offsets + sequence)
        length = tl.load(offsets + sequence + 1) - first
    begin = tl.program_id(0) * queries
    if begin < length:
        origin = first.to(tl.int64)  # what follows counts within the sequence, in 32 bits
        columns = head * width + tl.arange(0, block)
        rows = begin + tl.arange(0, queries)
        places = tl.arange(0, keys)
        theirs = _within(rows < length, width, block)
        q = tl.load(query + origin * query_stride + rows[:, None] * query_stride + columns[None, :], theirs, other=0.0)
        key_rows = key + origin * key_stride + places[:, None] * key_stride + columns[None, :]
        value_rows = value + origin * value_stride + places[:, None] * value_stride + columns[None, :]
        largest = tl.full((queries,), float("-inf"), tl.float32)
        total = tl.zeros((queries,), tl.float32)
        found = tl.zeros((queries, block), tl.float32)
        full = 0
        if mask is None:
            full = length // keys * keys
            for start in range(0, full, keys):
                k = _tile(key_rows + start * key_stride, None, width, block)
                v = _tile(value_rows + start * value_stride, None, width, block)
                found, total, largest = _seen(q, k, v, None, found, total, largest, scale)
        for start in range(full, length, keys):
            inside = start + places < length
            seen = inside[None, :]
            if mask is not None:
                marks = mask + sequence.to(tl.int64) * mask_sequence + head.to(tl.int64) * mask_head
                marks += rows[:, None] * mask_query + (start + places)[None, :] * mask_key
                seen = seen & tl.load(marks, seen & (rows[:, None] < length), other=0).to(tl.int1)
            k = _tile(key_rows + start * key_stride, inside, width, block)
            v = _tile(value_rows + start * value_stride, inside, width, block)
            found, total, largest = _seen(q, k, v, seen, found, total, largest, scale)
        if mask is not None:
            total = tl.where(total == 0.0, 1.0, total)
        place = result + origin * result_stride + rows[:, None] * result_stride + columns[None, :]
        tl.store(place, (found / total[:, None]).to(result.dtype.element_ty), theirs)


@triton.jit
def _seen(q, k, v, seen, found, total, largest, scale):
    """What queries have found, with weights of that total and scores up to the largest, and these keys' values, too."""
    scores = tl.dot(q, k.T)
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, 1))
    if seen is not None:
        higher = tl.maximum(higher, LOWEST)  # where nothing was seen yet
    weights = tl.exp2(scores * scale - (higher * scale)[:, None])
    fading = tl.exp2((largest - higher) * scale)
    found = tl.dot(weights.to(v.dtype), v, found * fading[:, None])
    return found, total * fading + tl.sum(weights, 1), higher


@triton.jit
def _tile(pointers, inside, width: tl.constexpr, block: tl.constexpr):
    """Rows of keys or values: those that are inside, all if that is None."""
    if inside is not None:
        tile = tl.load(pointers, _within(inside, width, block), other=0.0)
    elif block > width:
        tile = tl.load(pointers, (tl.arange(0, block) < width)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _within(rows, width: tl.constexpr, block: tl.constexpr):
    """Which numbers of a tile are there, of these rows, where a head has `width` columns of the tile's `block`."""
    inside = rows[:, None]
    if block > width:
        inside = inside & (tl.arange(0, block) < width)[None, :]
    return inside


def gelu_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of gelu(x), x (..., width), in float8 with a scale of its own: (..., width) and float32 (..., 1).

    GELU is in its form with tanh, within 1e-3 of the exact one: with the error function a row takes longer to compute
    than to read and write, and TorchInductor goes through rows that long twice, and computes it both times.
    """
    width = x.shape[-1]
    x = x.contiguous()
    rounded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if scales.numel():
        _gelu_rows[(scales.numel(),)](x, rounded, scales, width, triton.next_power_of_2(width), num_warps=8)
    return rounded, scales


@triton.jit
def _gelu_rows(x, rounded, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    number = tl.load(x + row * width + columns, inside, other=0.0).to(tl.float32)
    curve = _tanh(number * (0.7978845608028654 + 0.035677408136300125 * number * number))
    found = 0.5 * number + 0.5 * number * curve
    largest = tl.maximum(tl.max(tl.abs(found), 0), TINY)
    tl.store(rounded + row * width + columns, (found * (LARGEST / largest)).to(tl.float8e4nv), inside)
    tl.store(scales + row, largest / LARGEST)


@triton.jit
def _tanh(x):
    """One instruction, within 5e-4 of what it is to be: float8 rounds by a sixteenth of a number."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
