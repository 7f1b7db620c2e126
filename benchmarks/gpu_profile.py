"""Where a GPU's time goes: kernels by what they do, and how long the GPU waits between them."""

import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bert_evaluation.measurement import timed

MATRICES, ATTENTION, QUANTISATION = "matrix products", "attention", "quantisation"
ELEMENTWISE, REST = "LayerNorm and elementwise", "the rest"
# The first that fits says what a kernel does. Those of Inductor's are named after all that is fused in them, so a
# LayerNorm that quantises what it returns counts as quantisation.
KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (ATTENTION, r"^triton_tem.*attention"),
        (MATRICES, r"^triton_tem"),
        (QUANTISATION, r"^triton_.*(amax|float8|fp8|quanti)"),
        (ELEMENTWISE, r"^triton_"),
        (ATTENTION, r"flash|fmha|attention|attn|sdpa"),
        (MATRICES, r"gemm|nvjet|cutlass|xmma|wgmma|cublas|matmul|splitk|scaled_mm|::(addmm|bmm|mm|linear)$|linear"),
        (QUANTISATION, r"float8|fp8|quanti"),
        (ELEMENTWISE, r"layer_?norm|elementwise|gelu|reduce|softmax|::(add|mul|div|tanh|erf)_?$"),
    )
)
TIMED = 3  # passes without the profiler, to know how long one takes


@dataclass(frozen=True)
class Profile:
    """Seconds of a pass, and seconds and calls of each kernel in it."""

    wall: float
    kernels: dict[str, tuple[float, int]]

    @property
    def busy(self) -> float:
        """Seconds of all kernels together."""
        return sum(seconds for seconds, _ in self.kernels.values())

    @property
    def idle(self) -> float:
        """The share of a pass in which no kernel runs; 0 where those that overlap make up for it."""
        return max(0.0, 1 - self.busy / self.wall)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the kernels' time by what they do."""
        seconds = Counter[str]()
        for name, (each, _) in self.kernels.items():
            seconds[kind(name)] += each
        return {each: total / self.busy for each, total in seconds.most_common()}

    def top(self, count: int) -> list[tuple[str, float, int]]:
        """The kernels that take longest: name, seconds, calls."""
        longest = sorted(self.kernels.items(), key=lambda item: -item[1][0])
        return [(name, *numbers) for name, numbers in longest[:count]]


def kind(kernel: str) -> str:
    """What a kernel of this name does."""
    lower = kernel.lower()
    return next((each for each, pattern in KINDS if pattern.search(lower)), REST)


@torch.inference_mode()
def profiled(call: Callable[[], Any], device: torch.device) -> Profile:
    """A call's kernels, and its seconds without the profiler. On a CPU operators stand for kernels."""
    call()
    wall = statistics.median(timed(call, device)[0] for _ in range(TIMED))
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        timed(call, device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = {
        each.key: ((each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e6, each.count)
        for each in found.key_averages()
        if each.device_type == wanted and not _is_remark(each)
    }
    return Profile(wall, kernels)


def _is_remark(event: Any) -> bool:
    """Whether an event only says what others are part of: it would count their time again."""
    return bool(getattr(event, "is_user_annotation", False)) or event.key.startswith(
        ("##", "Torch-Compiled Region", "ProfilerStep", "CompiledFxGraph")
    )
