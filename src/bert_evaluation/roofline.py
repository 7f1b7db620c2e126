"""What a machine reaches at most, measured: matrix products in each precision, and memory. A row's share of it.

The name is that of Williams, Waterman and Patterson (2009). All comes from torch as it is here, with its threads.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import psutil
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bert_evaluation import conditions, linux, onednn
from bert_evaluation.capturing import capture, longest_input, text_inputs
from bert_evaluation.device import machine
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import timed
from bert_evaluation.stats import Interval, median
from bert_evaluation.store import Store

aten = torch.ops.aten
Precision = Literal["fp32", "bf16", "int8"]
Call = Callable[[], Any]

# Tokens, inputs, outputs: the linears of BERT-base, on one short text up to eight long ones.
SHAPES = tuple(
    (tokens, inputs, outputs)
    for tokens in (128, 512, 1024, 3072)
    for inputs, outputs in ((768, 768), (768, 3072), (3072, 768))
)
TEXTS = ((1, 128), (8, 128), (8, 384))  # batch and tokens
TRY, TIME = 1.0, 0.6  # seconds a way for finding its best shape, and for timing that
FEWEST, MOST = 6, 50  # calls timed
BEYOND, UNKNOWN_CACHE = 4, 32 << 20  # an array of STREAM is four times as large as the last cache; if that is not told
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
    shape: tuple[int, int, int]
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


# torch knows attention's formula, but not under the name of the CPU's kernel.
FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def share(flops: float, seconds: float, peak: Peak) -> float:
    """The share of a peak that so many operations in so many seconds are."""
    return flops / seconds / (1e9 * peak.gflops.estimate)


def reached(model: nn.Module, found: Roofline, texts: Sequence[tuple[int, int]] = TEXTS) -> Iterator[Reached]:
    """The share of its precision's peak that a float32 text encoder reaches, on batches of so many texts and tokens."""
    graph, peak, device = capture(model), found.peak("fp32"), next(model.parameters()).device
    assert peak is not None  # every device multiplies those
    for batch, wanted in texts:
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
    return json.dumps(["roofline", {name: about[name] for name in DECISIVE}])


def _read(found: tuple[str, str]) -> Roofline:
    text, measured = found
    return replace(_ROOFLINE.validate_json(text), measured=measured)


def measure(
    device: torch.device, shapes: Sequence[tuple[int, int, int]] = SHAPES, array_bytes: int | None = None
) -> Roofline:
    """Measure it, in less than a quarter of a minute."""
    before = conditions.snapshot(device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors say that their Python interface will go
        peaks = [_peak(precision, way, make, device, shapes) for precision, way, make in ways(device)]
        bandwidths = tuple(_bandwidths(device, array_bytes or _array_bytes(device)))
    return Roofline(
        device=str(device),
        threads=torch.get_num_threads(),
        peaks=tuple(peak for peak in peaks if peak is not None),
        bandwidths=bandwidths,
        remarks=tuple(conditions.remarks(before, conditions.snapshot(device))),
    )


def ways(device: torch.device) -> Iterator[tuple[Precision, str, Callable[[Tensor, Tensor], Call]]]:
    """How torch can multiply a (tokens × inputs) by a (outputs × inputs) matrix: precision, name, what makes the call.

    None but torch's own operators. `torch._int_mm` is private; the two for int8 are those that quantised models use.
    """
    yield "fp32", "linear", _linear
    if device.type == "cpu":
        yield "fp32", "oneDNN, weight packed", _packed
    yield "bf16", "linear", lambda x, w: _linear(x.bfloat16(), w.bfloat16())
    if device.type == "cpu":
        yield "bf16", "oneDNN, weight packed", lambda x, w: _packed(x.bfloat16(), w.bfloat16())
        yield "int8", f"quantized.linear, {torch.backends.quantized.engine}", _quantized
        yield "int8", "onednn.qlinear_pointwise", _qlinear


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(x, weight)


def _packed(x: Tensor, weight: Tensor) -> Call:
    packed = onednn.pack(weight)
    return lambda: onednn.POINTWISE(x, packed, None, "none", [], "")


def _quantized(x: Tensor, weight: Tensor) -> Call:
    # A scale of the output that holds the largest result there is.
    out = 255 * 127 * x.shape[1] / 255
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    numbers = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
    return lambda: torch.ops.quantized.linear(numbers, packed, out, 0)


def _qlinear(x: Tensor, weight: Tensor) -> Call:
    numbers, packed = x.to(torch.uint8), torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), list(x.shape))
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    none: list[Any] = []
    return lambda: torch.ops.onednn.qlinear_pointwise(
        numbers, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", none, ""
    )


def _peak(
    precision: Precision,
    way: str,
    make: Callable[[Tensor, Tensor], Call],
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]],
) -> Peak | None:
    """The best shape of one way, timed; None where torch has no such way here."""
    calls = dict[tuple[int, int, int], Call]()
    rates, start = dict[tuple[int, int, int], float](), time.perf_counter()
    for shape in shapes:
        left, work = TRY - (time.perf_counter() - start), _work(shape)
        # Three calls each, but none that would take longer than there is time left.
        if rates and 3 * work / max(rates.values()) > left:
            continue
        try:
            calls[shape] = make(*_values(shape, precision, device))
            timed(calls[shape], device)
        except (RuntimeError, AttributeError):  # the processor has no such instructions, this torch no such operator
            return None
        rates[shape] = work / min(timed(calls[shape], device)[0] for _ in range(2))
    best = max(rates, key=lambda shape: rates[shape])
    rate = _rate(calls[best], _work(best), device)
    return Peak(precision, way, rate, best, _error(make, device) if precision == "int8" else None)


def _work(shape: tuple[int, int, int]) -> float:
    tokens, inputs, outputs = shape
    return 2.0 * tokens * inputs * outputs


def _values(shape: tuple[int, int, int], precision: Precision, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers to multiply, whole ones for integers: what they are is nothing to the time."""
    tokens, inputs, outputs = shape
    x, weight = torch.rand(tokens, inputs, device=device), torch.rand(outputs, inputs, device=device)
    return (x, weight) if precision != "int8" else ((255 * x).floor(), (254 * weight).floor() - 127)


def _error(make: Callable[[Tensor, Tensor], Call], device: torch.device) -> float:
    """The relative error at the largest values: without VNNI, sums of two products may not fit into 16 bits."""
    exact = 255.0 * 127.0 * 64
    result = make(torch.full((4, 64), 255.0, device=device), torch.full((8, 64), 127.0, device=device))()
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
        cache, free = torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]
    else:
        cache, free = linux.last_level_cache() or UNKNOWN_CACHE, psutil.virtual_memory().available
    return int(min(BEYOND * cache, free // 16))


def _rate(call: Call, work: float, device: torch.device) -> Interval:
    """Billions a second of what one call does: the median of calls, with its interval."""
    return median([work / 1e9 / each for each in _seconds(call, device)])


def _seconds(call: Call, device: torch.device) -> list[float]:
    """Seconds of each of a few calls."""
    found, start = list[float](), time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - start < TIME):
        found.append(timed(call, device)[0])
    return found
