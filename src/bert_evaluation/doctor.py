"""What disturbs measurements on this machine: read once, then judged by pure functions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from bert_evaluation import conditions, linux
from bert_evaluation.capabilities import Fact, size
from bert_evaluation.conditions import Conditions, told
from bert_evaluation.pace import Pace, measured
from bert_evaluation.roofline import Reached, Roofline

Verdict = Literal["ok", "disturbs", "unknown"]
LOOK = 1.0  # seconds for which the machine is watched
UNEVEN = 1.2  # times as long that the same work takes at times, or on several CPUs at once, from where on it disturbs
BUSY_LOAD, BUSY_PROCESS = 0.5, 0.1  # cores kept busy, by all in the last minute and by one process
CONTEXT = 1 << 30  # bytes that CUDA takes at most of a GPU's memory for a process without tensors


@dataclass(frozen=True)
class Finding:
    """Something that may disturb measurements: what was found, whether it does, and what to do about it."""

    what: str
    found: str | None
    verdict: Verdict
    advice: str


@dataclass(frozen=True)
class Gpu:
    """The percent of the time for which a GPU was busy though this process was not, and bytes taken beside its tensors.

    Those are other processes' tensors, and a context of CUDA's for each process.
    """

    busy: float | None
    taken: int


@dataclass(frozen=True)
class Reading:
    """All that findings are made of: conditions at the two ends of a look, and what else was seen.

    `busiest` are other processes and how many cores each kept busy; `paged` are bytes swapped in or out while looking.
    """

    before: Conditions
    after: Conditions
    busiest: tuple[tuple[str, float], ...] = ()
    cores: int | None = None
    quota: float | None = None
    turbo: bool | None = None
    temperature_high_c: float | None = None
    virtual: bool | None = None
    swap_used: int | None = None
    paged: int | None = None
    allocator: str | None = None
    pace: Pace | None = None
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Examination:
    """All that the doctor found: facts, what disturbs, what the machine reaches, and what a model does of that."""

    machine: Mapping[str, Any]
    facts: tuple[Fact, ...]
    findings: tuple[Finding, ...]
    roofline: Roofline
    model: str | None = None
    reached: tuple[Reached, ...] = ()


def read(device: torch.device, root: Path = linux.ROOT, look: float = LOOK) -> Reading:
    """Look at the machine for a while. `root` is where /proc and /sys are looked for."""
    before, swap = conditions.snapshot(device, root), told(lambda: psutil.swap_memory())
    seconds = conditions.others_seconds()
    pace = measured(look, torch.get_num_threads())
    # The device first: a snapshot lets it work.
    gpu, seconds_after, swapped = _gpu(device), conditions.others_seconds(), told(lambda: psutil.swap_memory())
    after = conditions.snapshot(device, root)
    spent = {who: (now - seconds[who]) / look for who, now in seconds_after.items() if who in seconds}
    busiest = sorted(((name, share) for (_, name), share in spent.items()), key=lambda each: -each[1])
    cpus, flags = conditions.usable_cpus(), linux.cpu_flags(root)
    return Reading(
        before=before,
        after=after,
        busiest=tuple(each for each in busiest if each[1] >= BUSY_PROCESS),
        cores=linux.cores(cpus, root),
        quota=linux.cpu_quota(root),
        turbo=linux.turbo(root),
        temperature_high_c=conditions.temperature()[1],
        virtual=None if flags is None else "hypervisor" in flags,
        swap_used=swapped.used if swapped else None,
        paged=swapped.sin + swapped.sout - swap.sin - swap.sout if swap and swapped else None,
        allocator=linux.allocator(root),
        pace=pace,
        gpu=gpu,
    )


def findings(reading: Reading) -> tuple[Finding, ...]:
    """What disturbs measurements, what does not, and what is not known."""
    return tuple(judge(reading) for judge in (*JUDGES, *(GPU_JUDGES if reading.gpu else ())))


def _load(reading: Reading) -> Finding:
    load = reading.before.load
    return Finding(
        "Load",
        None
        if load is None
        else f"{load:.1f} threads ran or waited in the last minute, for {reading.before.cpus} CPUs",
        _verdict(load, load is not None and load > BUSY_LOAD),
        "Wait a minute, or end what else runs: variants then wait for each other's cores by chance.",
    )


def _others(reading: Reading) -> Finding:
    share = conditions.others_share(reading.before, reading.after)
    names = ", ".join(f"{name} {cores:.0%} of one" for name, cores in reading.busiest[:3])
    return Finding(
        "Other processes",
        f"{share:.0%} of the CPUs" + (f" ({names})" if names else ""),
        _verdict(share, share >= conditions.OTHERS or bool(names)),
        "End or pause them while timing.",
    )


def _threads(reading: Reading) -> Finding:
    threads, quota = reading.after.threads, reading.quota
    most = min(reading.after.cpus, math.inf if quota is None else quota)
    allowed = "" if quota is None or math.isinf(quota) else f", a quota of {quota:g}"
    fitting = max(1, int(most))
    return Finding(
        "Threads",
        f"{threads} for {reading.after.cpus} usable CPUs{allowed}",
        _verdict(threads, threads > fitting),
        f"Set OMP_NUM_THREADS={fitting}: more threads than that are halted in turn, in the middle of operators.",
    )


def _siblings(reading: Reading) -> Finding:
    cores, cpus = reading.cores, reading.after.cpus
    return Finding(
        "Shared cores (SMT)",
        None if cores is None else f"{cpus} CPUs on {cores} cores",
        _verdict(cores, cores is not None and cores < min(cpus, reading.after.threads)),
        f"Set OMP_NUM_THREADS={cores or 'the number of cores'}: two threads of one core share its multipliers.",
    )


def _governor(reading: Reading) -> Finding:
    governor = reading.after.governor
    return Finding(
        "Clock governor",
        governor,
        _verdict(governor, governor != "performance"),
        "Run `sudo cpupower frequency-set -g performance`: others let the clock follow the load.",
    )


def _turbo(reading: Reading) -> Finding:
    turbo = reading.turbo
    return Finding(
        "Turbo",
        None if turbo is None else "on" if turbo else "off",
        _verdict(turbo, turbo is True),
        "Switch it off in the firmware or under /sys/devices/system/cpu to compare times of different runs; ratios are"
        " paired and need it less.",
    )


def _temperature(reading: Reading) -> Finding:
    now, high = reading.after.temperature_c, reading.temperature_high_c
    limit = f", high from {high:.0f} on" if high is not None else ", from where on it is high is not told"
    return Finding(
        "Temperature",
        None if now is None else f"{now:.0f} °C{limit}",
        _verdict(None if now is None else high, now is not None and high is not None and now >= high),
        "Let the machine cool before timing, and see to its fans: a hot processor lowers its clock.",
    )


def _steal(reading: Reading) -> Finding:
    share = conditions.steal_share(reading.before, reading.after)
    where = {True: "virtual machine", False: "no virtual machine", None: "virtual or not"}[reading.virtual]
    return Finding(
        "Time taken by the host",
        None if share is None else f"{share:.1%} of the CPUs' time, {where}",
        _verdict(share, share is not None and share >= conditions.STEAL),
        "Time at another hour or on a machine of your own: the host gives these CPUs to others.",
    )


def _quota(reading: Reading) -> Finding:
    advice = "Use fewer threads than the quota has CPUs, or run without one (docker: no --cpus)."
    if reading.quota is not None and math.isinf(reading.quota):
        return Finding("CPU quota", "none", "ok", advice)
    before, after = reading.before.held_back, reading.after.held_back
    lost = None if before is None or after is None else after - before
    found = None if lost is None else f"held this process back for {lost:.2f} s while looking"
    return Finding("CPU quota", found, _verdict(lost, bool(lost)), advice)


def _swap(reading: Reading) -> Finding:
    used, paged = reading.swap_used, reading.paged
    return Finding(
        "Swap",
        None if used is None or paged is None else f"{size(used)} used, {size(paged)} moved while looking",
        _verdict(paged, bool(paged)),
        "Free memory until nothing is swapped: a page that comes from disk takes longer than a layer.",
    )


def _malloc(reading: Reading) -> Finding:
    # glibc takes large tensors anew from the system; whether that is felt depends on the model and its shapes.
    return Finding(
        "malloc",
        reading.allocator,
        "unknown" if reading.allocator in (None, "glibc") else "ok",
        "Compare once with LD_PRELOAD of tcmalloc or jemalloc, which keep large tensors' pages.",
    )


def _pace(reading: Reading) -> Finding:
    pace = reading.pace
    return Finding(
        "Pace",
        None if pace is None else str(pace),
        _verdict(pace, pace is not None and max(pace.at_times, pace.at_once or 0) >= UNEVEN),
        "If nothing above explains it, neighbours on the same cores may, or a host that puts two of these CPUs on one"
        " core, which a guest system is not told of: time at another hour or on a machine of your own.",
    )


def _gpu_state(reading: Reading) -> Finding:
    before, now = reading.before, reading.after
    parts = {"MHz": now.device_clock_mhz, "°C": now.device_temperature_c, "W": now.device_power_w}
    told = ", ".join(f"{value:.0f} {unit}" for unit, value in parts.items() if value is not None)
    advice = "Let it cool, and hold its clock (`sudo nvidia-smi --lock-gpu-clocks`) at one that it can keep."
    return Finding(
        "GPU",
        f"{told} at work" if told else None,
        _verdict(told or None, conditions.is_hot(now) or conditions.slowed_down(before, now)),
        advice if told else "Install nvidia-ml-py, which asks the driver.",
    )


def _gpu_others(reading: Reading) -> Finding:
    gpu = reading.gpu
    assert gpu is not None
    disturbs = (gpu.busy or 0) >= 100 * conditions.OTHERS or gpu.taken > CONTEXT
    busy = "busy or not is not told" if gpu.busy is None else f"busy {gpu.busy:.0f} % of the time"
    return Finding(
        "Others on the GPU",
        f"{busy}, {size(gpu.taken)} taken beside this process's tensors",
        "disturbs" if disturbs else _verdict(gpu.busy, False),
        "End what else uses it (`nvidia-smi` lists that): kernels of several processes take turns.",
    )


JUDGES: tuple[Callable[[Reading], Finding], ...] = (
    _load,
    _others,
    _threads,
    _siblings,
    _governor,
    _turbo,
    _temperature,
    _steal,
    _quota,
    _swap,
    _malloc,
    _pace,
)
GPU_JUDGES: tuple[Callable[[Reading], Finding], ...] = (_gpu_state, _gpu_others)


def _verdict(seen: object, disturbs: bool) -> Verdict:
    if seen is None:
        return "unknown"
    return "disturbs" if disturbs else "ok"


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    busy = conditions.of_driver(lambda: torch.cuda.utilization(device))
    return Gpu(busy, total - free - torch.cuda.memory_reserved(device))
