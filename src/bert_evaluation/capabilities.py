"""What this machine has and can do, as far as torch and the system tell."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bert_evaluation import conditions, kernels, linux
from bert_evaluation.conditions import told
from bert_evaluation.device import KINDS, cpp_compiler, is_present, machine
from bert_evaluation.products import PRECISIONS

NOT_TOLD = "not told by this system"
OWN = (torch.float32, torch.bfloat16, torch.int8)  # what kernels of our own multiply
# The field's names of instruction sets, and torch's.
INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "FMA": ("fma3",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "bf16"),
    "AMX": ("amx_tile",),
    "NEON": ("neon",),
    "I8MM": ("i8mm",),
    "SVE": ("sve",),
}


@dataclass(frozen=True)
class Fact:
    """Something that the machine has or can do; `found` is None where the system does not tell."""

    what: str
    found: str | None


def facts(device: torch.device, root: Path = linux.ROOT) -> Iterator[Fact]:
    """What this machine has and can do."""
    about, memory, cpus = machine(device), psutil.virtual_memory(), conditions.usable_cpus()
    yield Fact("Processor", about["processor"])
    yield Fact("Instructions", instructions(getattr(torch.cpu, "get_capabilities", dict)()))
    yield Fact("torch uses", torch.backends.cpu.get_cpu_capability())
    physical = told(lambda: psutil.cpu_count(logical=False))
    yield Fact("CPUs", f"{psutil.cpu_count()} on {physical or 'an untold number of'} cores, {len(cpus)} usable")
    yield Fact("CPU quota", _limit(linux.cpu_quota(root), lambda quota: f"{quota:g} CPUs"))
    yield Fact("Threads", f"{torch.get_num_threads()} in an operator, {torch.get_num_interop_threads()} between them")
    cache = linux.last_level_cache(root)
    yield Fact("Last cache", None if cache is None else size(cache))
    yield Fact("Memory", f"{size(memory.total)}, {size(memory.available)} available")
    yield Fact("Memory limit", _limit(linux.memory_limit(root), size))
    present = [kind for kind in KINDS if is_present(kind)]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Fact("Devices", ", ".join(present) + (f" ({', '.join(gpus)})" if gpus else ""))
    yield Fact("torch", f"{about['torch']}, {libraries()}")
    yield Fact("transformers", about["transformers"])
    compiler = cpp_compiler()
    yield Fact("Compiler", f"{compiler}, {'there' if shutil.which(compiler) else 'missing'} for torch.compile")
    yield Fact("Kernels", own_kernels(device))


def instructions(capabilities: Mapping[str, Any]) -> str | None:
    """Which instruction sets for matrices there are, and which of this architecture's there are not."""
    known = {name: keys for name, keys in INSTRUCTIONS.items() if any(key in capabilities for key in keys)}
    there = [name for name, keys in known.items() if any(capabilities.get(key) for key in keys)]
    missing = [name for name in known if name not in there]
    return ", ".join(there) + (f"; not {', '.join(missing)}" if missing else "") if known else None


def own_kernels(device: torch.device) -> str:
    """In which precisions there are kernels of our own for a device, and why there are none in others."""
    reasons = {PRECISIONS[kind]: kernels.why_not(kind, device) for kind in OWN}
    there = [precision for precision, reason in reasons.items() if reason is None]
    missing = dict[str, list[str]]()
    for precision, reason in reasons.items():
        if reason is not None:
            missing.setdefault(reason.removesuffix("."), []).append(precision)
    if not there and len(missing) == 1:
        return f"none: {next(iter(missing))}"
    return "; ".join([", ".join(there) or "none", *(f"not {', '.join(of)}: {why}" for why, of in missing.items())])


def libraries(built: str | None = None) -> str:
    """The libraries for matrices that torch was built with, from what it tells of that."""
    settings = (torch.__config__.show() if built is None else built).replace("\n", ",").replace(" ", "").split(",")
    blas = next((each.partition("=")[2] for each in settings if "BLAS_INFO=" in each), NOT_TOLD)
    parts = {"oneDNN": "USE_MKLDNN=ON" in settings, "OpenMP": "USE_OPENMP=ON" in settings}
    return f"BLAS {blas}, " + ", ".join(name if there else f"no {name}" for name, there in parts.items())


def size(count: float) -> str:
    """So many bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _limit(limit: float | None, shown: Callable[[float], str]) -> str | None:
    return None if limit is None else "none" if math.isinf(limit) else shown(limit)
