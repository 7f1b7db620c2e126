"""Devices: choosing one, waiting for it, and what machine it is part of."""

import ctypes
import difflib
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from bert_evaluation.errors import BertEvaluationError, UsageError

KINDS = ("cuda", "mps", "cpu")  # best first
# What of the machine decides the bits and the speed of an answer: hardware, and software.
HARDWARE = ("processor", "device", "device_name", "threads")
VERSIONS = ("torch", "transformers", "bert_evaluation")
DECISIVE = HARDWARE + VERSIONS


def is_present(kind: str) -> bool:
    """Whether this machine and this build of torch have such a device."""
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or torch.backends.mps.is_available()


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name` (`cpu`, `mps`, `cuda`, `cuda:1`), or the best one present for `auto`.

    Raises UsageError for a name that is none, BertEvaluationError for a device that is not there.
    """
    if name == "auto":
        return torch.device(next(kind for kind in KINDS if is_present(kind)))
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdecimal()):
        near = difflib.get_close_matches(kind.lower(), ("auto", *KINDS), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are auto, {', '.join(KINDS)}."
        raise UsageError(f"There is no kind of device {name!r}; {hint}")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not is_present(kind) or int(index or 0) >= count:
        present = ", ".join(each for each in KINDS if is_present(each))
        raise BertEvaluationError(f"This machine has no device {name}; it has {present}.")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_idle(device: torch.device) -> bool:
    """Whether the device has done all that it was given on the current stream and the default one.

    Other streams have no names to ask for; `synchronize` waits for all of this process. Only CUDA can be asked: other
    devices are believed.
    """
    if device.type != "cuda":
        return True
    return all(stream(device).query() for stream in (torch.cuda.current_stream, torch.cuda.default_stream))


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device, which of several GPUs is the current one if it has no number."""
    if device.type != "cuda" or tensor.device.type != "cuda":
        return tensor.device.type == device.type
    return tensor.device.index == (torch.cuda.current_device() if device.index is None else device.index)


def occupy(device: torch.device, seconds: float = 0.1) -> None:
    """Let a CUDA device work for so long, and a little longer than this call takes: idle, it lowers its clock."""
    x, start = torch.ones(2048, 2048, device=device), time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize(device)
        for _ in range(16):  # at least a few milliseconds of work, on the fastest GPUs
            torch.mm(x, x)


def give_back_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps it, in pieces that tensors of other sizes do not fit in: over thousands of batches of different shapes
    a process would grow by as much again. Nothing is done where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cpp_compiler() -> str:
    """The C++ compiler that torch calls, whether it is there or not: that of CXX, or the system's."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", usual)


def c_compiler() -> str:
    """The C compiler that Triton calls, whether it is there or not: that of CC, or gcc, or clang."""
    usual = next((name for name in ("gcc", "clang") if shutil.which(name)), "gcc")
    return os.environ.get("CC", usual)


def machine(device: torch.device) -> dict[str, Any]:
    """What a result was measured on: processor, threads, device, versions."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "bert_evaluation": version("bert-evaluation"),
    }


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
