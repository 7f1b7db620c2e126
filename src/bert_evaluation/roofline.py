"""What a machine reaches at most, measured: matrix products in each precision, and memory. A row's share of it.

The name is that of Williams, Waterman and Patterson (2009). All comes from torch as it is here, with its threads.
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bert_evaluation import conditions, linux
from bert_evaluation.capturing import capture, longest_input, text_inputs
from bert_evaluation.device import machine
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import timed
from bert_evaluation.products import Call, Precision, Way, ways
from bert_evaluation.stats import Interval, median
from bert_evaluation.store import Store

aten = torch.ops.aten
Shape = tuple[int, int, int]  # tokens, inputs, outputs

# The linears of BERT-base, on one short text up to eight long ones.
SHAPES: tuple[Shape, ...] = tuple(
    (tokens, inputs, outputs)
    for tokens in (128, 512, 1024, 3072)
    for inputs, outputs in ((768, 768), (768, 3072), (3072, 768))
)
# Less leaves much of a large GPU idle: at those above, an H200 reached 364 TFLOP/s in bf16, at the last one here 785.
CUDA_SHAPES: tuple[Shape, ...] = (
    (16384, 1024, 1024),
    (16384, 1024, 4096),
    (16384, 4096, 1024),
    (65536, 1024, 4096),
    (65536, 4096, 1024),
    (8192, 8192, 8192),
)
TEXTS, CUDA_TEXTS = ((1, 128), (8, 128), (8, 384)), ((1, 128), (8, 384), (64, 384))  # batch and tokens
TRY, TIME = 1.0, 0.6  # seconds a way for finding its best shape, and for timing that
FEWEST, MOST = 6, 50  # calls timed
BEYOND, UNKNOWN_CACHE = 4, 32 << 20  # an array of STREAM is four times as large as the last cache; if that is not told
CUDA_ARRAY = 1 << 30  # bytes at least: through less, a GPU goes in no time beside what a call takes to begin
WRONG = 0.01  # a relative error that rounding cannot explain
# What decides the figures.
DECISIVE = ("processor", "device", "device_name", "threads", "torch")


@dataclass(frozen=True)
class Peak:
    """The most that one way to multiply matrices reached, and at which shape (tokens, inputs, outputs).

    `error` is the relative error at the largest values that the precision has, for integers, which should have none.
    """

    precision: Precision
    way: str
    gflops: Interval
    shape: Shape
    error: float | None = None

    @property
    def is_safe(self) -> bool:
        """Whether its results are right."""
        return self.error is None or self.error < WRONG


@dataclass(frozen=True)
class Bandwidth:
    """What one way to go through memory reached, over arrays of so many bytes; counted as STREAM counts."""

    way: str
    gigabytes: Interval
    array_bytes: int


@dataclass(frozen=True)
class Roofline:
    """All that was measured on a device; `remarks` say what disturbed that, `measured` when it was."""

    device: str
    threads: int
    peaks: tuple[Peak, ...]
    bandwidths: tuple[Bandwidth, ...]
    remarks: tuple[str, ...] = ()
    measured: str = ""

    def peak(self, precision: Precision) -> Peak | None:
        """The best way in a precision; None where torch has none here."""
        ways = [each for each in self.peaks if each.precision == precision]
        return max(ways, key=lambda each: each.gflops.estimate, default=None)


@dataclass(frozen=True)
class Reached:
    """How long a model takes for texts without padding, the operations that takes, and their share of the peak."""

    batch: int
    length: int
    milliseconds: Interval
    flops: int
    share: float


_ROOFLINE = TypeAdapter(Roofline)


def flops(graph: GraphModule, inputs: Mapping[str, Tensor]) -> int:
    """The floating-point operations of the matrix products in one run, a multiplication and an addition being two.

    To compare rows, count Base's graph on inputs without padding: that is the work that is of use, however a row does
    it. Operators that torch cannot count, such as packed or quantised ones, count nothing.
    """
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        graph(**inputs)
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# torch knows attention's formula under the names of CUDA's kernels, but not of these.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_attention_math_for_mps: _attention,
}


def share(flops: float, seconds: float, peak: Peak) -> float:
    """The share of a peak that so many operations in so many seconds are."""
    return flops / seconds / (1e9 * peak.gflops.estimate)


def reached(model: nn.Module, found: Roofline, texts: Sequence[tuple[int, int]] = ()) -> Iterator[Reached]:
    """The share of the fp32 peak that a text encoder in float32 reaches, on batches of so many texts and tokens."""
    graph, peak, device = capture(model), found.peak("fp32"), next(model.parameters()).device
    assert peak is not None  # every device multiplies those
    for batch, wanted in texts or (CUDA_TEXTS if device.type == "cuda" else TEXTS):
        length = min(wanted, longest_input(model))
        inputs = text_inputs(model, batch, length)
        count = flops(graph, inputs)  # the first call, which may pack
        with torch.inference_mode():
            latency = median([1000 * each for each in _seconds(partial(graph, **inputs), device)])
        yield Reached(batch, length, latency, count, share(count, latency.estimate / 1000, peak))


def known(store: Store, device: torch.device, fresh: bool = False) -> Roofline:
    """The roofline of this machine, measured once and then kept in the store, or anew with `fresh`."""
    return _read(store.measured(_key(device), lambda: _ROOFLINE.dump_json(measure(device)).decode(), fresh))


def kept(store: Store, device: torch.device) -> Roofline | None:
    """The roofline of this machine if it was measured before and nothing disturbed that."""
    found = store.kept(_key(device))
    if found is None or (roofline := _read(found)).remarks:
        return None
    return roofline


def _key(device: torch.device) -> str:
    about = machine(device)
    tried = [[way.name for way in ways(device)], _shapes(device)]
    return json.dumps(["roofline", {name: about[name] for name in DECISIVE}, tried])


def _read(found: tuple[str, str]) -> Roofline:
    text, measured = found
    return replace(_ROOFLINE.validate_json(text), measured=measured)


def measure(device: torch.device, shapes: Sequence[Shape] = (), array_bytes: int | None = None) -> Roofline:
    """Measure it, in less than a quarter of a minute; at shapes that fit the kind of device if none are given."""
    before, shapes = conditions.snapshot(device), shapes or _fitting(_shapes(device), _free(device))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors say that their Python interface will go
        peaks = [_peak(way, device, shapes) for way in ways(device)]
        bandwidths = tuple(_bandwidths(device, array_bytes or _array_bytes(device)))
    return Roofline(
        device=str(device),
        threads=torch.get_num_threads(),
        peaks=tuple(peak for peak in peaks if peak is not None),
        bandwidths=bandwidths,
        remarks=tuple(conditions.remarks(before, conditions.snapshot(device))),
    )


def _shapes(device: torch.device) -> tuple[Shape, ...]:
    return CUDA_SHAPES if device.type == "cuda" else SHAPES


def _fitting(shapes: Sequence[Shape], free: int) -> list[Shape]:
    """Those of which a quarter of the memory holds two, each in float32 and in a copy; the first one in any case."""

    def needs(tokens: int, inputs: int, outputs: int) -> int:
        return 4 * 2 * 2 * (tokens * inputs + inputs * outputs + tokens * outputs)

    return [shape for shape in shapes if shape == shapes[0] or needs(*shape) <= free // 4]


def _peak(way: Way, device: torch.device, shapes: Sequence[Shape]) -> Peak | None:
    """The best shape of one way, timed; None where torch has no such way here."""
    best, fastest, start = None, 0.0, time.perf_counter()
    for shape in shapes:
        left, work = TRY - (time.perf_counter() - start), _work(shape)
        # Three calls each, but none that would take longer than there is time left.
        if best is not None and 3 * work / fastest > left:
            continue
        try:
            call = way.make(*_values(shape, way.precision, device))
            timed(call, device)
        except (RuntimeError, AttributeError):  # the device has no such instructions, this torch no such operator
            return None
        rate = work / min(timed(call, device)[0] for _ in range(2))
        if best is None or rate > fastest:
            best, fastest = (call, shape), rate
    assert best is not None
    call, shape = best
    error = _error(way, device) if way.precision == "int8" else None
    return Peak(way.precision, way.name, _rate(call, _work(shape), device), shape, error)


def _work(shape: Shape) -> float:
    tokens, inputs, outputs = shape
    return 2.0 * tokens * inputs * outputs


def _values(shape: Shape, precision: Precision, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers to multiply, whole ones for integers: what they are is nothing to the time."""
    tokens, inputs, outputs = shape
    x, weight = torch.rand(tokens, inputs, device=device), torch.rand(outputs, inputs, device=device)
    return (x, weight) if precision != "int8" else ((255 * x).floor(), (254 * weight).floor() - 127)


def _error(way: Way, device: torch.device) -> float:
    """The relative error at the largest values: without VNNI, sums of two products may not fit into 16 bits."""
    exact = 255.0 * 127.0 * 64
    result = way.make(torch.full((4, 64), 255.0, device=device), torch.full((8, 64), 127.0, device=device))()
    return float((result.dequantize() - exact).abs().max()) / exact


def _bandwidths(device: torch.device, array_bytes: int) -> Iterator[Bandwidth]:
    a, b, c = (torch.ones(array_bytes // 4, device=device) for _ in range(3))
    for way, arrays, call in (
        ("triad a = b + 3 c", 3, lambda: torch.add(b, c, alpha=3, out=a)),
        ("copy a = b", 2, lambda: a.copy_(b)),
    ):
        timed(call, device)
        yield Bandwidth(way, _rate(call, arrays * a.nbytes, device), a.nbytes)


def _array_bytes(device: torch.device) -> int:
    """An array that no cache holds, and of which memory holds many."""
    if device.type == "cuda":
        least = max(CUDA_ARRAY, BEYOND * torch.cuda.get_device_properties(device).L2_cache_size)
    else:
        least = BEYOND * (linux.last_level_cache() or UNKNOWN_CACHE)
    return min(least, _free(device) // 16)


def _free(device: torch.device) -> int:
    """Bytes of memory that are free."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _rate(call: Call, work: float, device: torch.device) -> Interval:
    """Billions a second of what one call does: the median of calls, with its interval."""
    return median([work / 1e9 / each for each in _seconds(call, device)])


def _seconds(call: Call, device: torch.device) -> list[float]:
    """Seconds of each of a few calls."""
    found, start = list[float](), time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - start < TIME):
        found.append(timed(call, device)[0])
    return found
