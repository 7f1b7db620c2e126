"""The state of the machine before and after something is timed, and what a reader should know of it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import torch

from bert_evaluation import linux
from bert_evaluation.device import occupy

SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal")  # names of those within processors
FELL = 0.03  # the share of its clock that a processor has to lose to be told of
OTHERS, STEAL, HELD_BACK = 0.05, 0.01, 0.01  # the shares of the time from which on they are told of
HOT = 85.0  # °C from where on GPUs lower their clock, or are about to


@dataclass(frozen=True)
class Conditions:
    """One moment. What the system does not tell is None. Seconds, throttles and joules are counters that only rise.

    `busy` are the seconds that all processes had of the `cpus` that this one may use, `own` those of this process,
    `steal` those that a virtual machine's host gave to others, `held_back` those lost to a CPU quota. The clock is that
    of the fastest CPU. Clock, temperature and power of a device are those at work.
    """

    seconds: float
    cpus: int
    threads: int
    busy: float
    own: float
    steal: float | None = None
    held_back: float | None = None
    load: float | None = None
    clock_ghz: float | None = None
    clock_max_ghz: float | None = None
    temperature_c: float | None = None
    throttles: int | None = None
    governor: str | None = None
    energy_j: float | None = None
    device_clock_mhz: float | None = None
    device_temperature_c: float | None = None
    device_power_w: float | None = None


def snapshot(device: torch.device, root: Path = linux.ROOT) -> Conditions:
    """The conditions now. `root` is where /proc and /sys are looked for."""
    cpus = usable_cpus()
    times = [each for cpu, each in enumerate(psutil.cpu_times(percpu=True)) if cpu in cpus]
    own, clock = psutil.Process().cpu_times(), _clock(root)
    load = told(lambda: psutil.getloadavg())  # each a lambda: not every system has the function
    return Conditions(
        seconds=monotonic(),
        cpus=len(cpus),
        threads=torch.get_num_threads(),
        busy=sum(getattr(each, of, 0.0) for each in times for of in ("user", "nice", "system", "irq", "softirq")),
        own=own.user + own.system,
        steal=sum(each.steal for each in times) if all(hasattr(each, "steal") for each in times) else None,
        held_back=linux.held_back(root),
        load=load[0] if load else None,
        clock_ghz=clock[0],
        clock_max_ghz=clock[1],
        temperature_c=temperature()[0],
        throttles=linux.throttles(cpus, root),
        governor=linux.governor(cpus, root),
        energy_j=linux.energy(root),
        **_device(device),
    )


def usable_cpus() -> Sequence[int]:
    """The numbers of the CPUs that this process may run on."""
    return told(lambda: psutil.Process().cpu_affinity()) or range(psutil.cpu_count() or 1)


def temperature() -> tuple[float | None, float | None]:
    """The temperature of the hottest sensor in the processor, and from where on that is called high."""
    sensors = told(lambda: psutil.sensors_temperatures()) or {}
    found = [each for name in SENSORS for each in sensors.get(name, ())]
    hottest = max(found, key=lambda each: each.current, default=None)
    return (None, None) if hottest is None else (hottest.current, hottest.high)


def others_seconds() -> dict[tuple[int, str], float]:
    """Seconds of CPU that each other process had so far."""
    found = dict[tuple[int, str], float]()
    for process in psutil.process_iter(["name", "cpu_times"]):
        times, name = process.info["cpu_times"], process.info["name"] or "?"
        if times is not None and process.pid != os.getpid():
            clean = "".join(sign if sign.isprintable() else "?" for sign in name)
            found[process.pid, clean] = times.user + times.system
    return found


def others_share(before: Conditions, after: Conditions) -> float:
    """The share of the usable CPUs' time that other processes had."""
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / _available(before, after))


def steal_share(before: Conditions, after: Conditions) -> float | None:
    """The share of the usable CPUs' time that a virtual machine's host gave to others."""
    steal = _gained(before.steal, after.steal)
    return None if steal is None else steal / _available(before, after)


def remarks(before: Conditions, after: Conditions) -> list[str]:
    """What changed or disturbed between two moments, a sentence each; nothing where all was quiet."""
    found, seconds = list[str](), after.seconds - before.seconds
    if _fell(before.clock_ghz, after.clock_ghz):
        found.append(
            f"The processor's clock fell from {before.clock_ghz:.1f} to {after.clock_ghz:.1f} GHz while timing."
        )
    if count := _gained(before.throttles, after.throttles):
        found.append(f"The processor was too hot and throttled itself while timing ({count:.0f} times).")
    if (share := others_share(before, after)) >= OTHERS:
        found.append(f"Other processes used {share:.0%} of the cores while timing.")
    if (share := steal_share(before, after) or 0.0) >= STEAL:
        found.append(f"The host gave {share:.0%} of the cores' time to other virtual machines while timing.")
    if (lost := _gained(before.held_back, after.held_back) or 0.0) >= HELD_BACK * seconds and lost:
        found.append(f"The container's CPU quota held it back for {lost:.1f} s while timing.")
    if slowed_down(before, after):
        clocks = f"{before.device_clock_mhz:.0f} to {after.device_clock_mhz:.0f} MHz"
        found.append(f"The device's clock fell from {clocks} while timing.")
    if is_hot(after):
        found.append(f"The device is {after.device_temperature_c:.0f} °C hot after timing: it may lower its clock.")
    return found


def slowed_down(before: Conditions, after: Conditions) -> bool:
    """Whether the device's clock fell by what is worth telling of."""
    return _fell(before.device_clock_mhz, after.device_clock_mhz)


def is_hot(now: Conditions) -> bool:
    """Whether the device is too hot for its clock to last."""
    return now.device_temperature_c is not None and now.device_temperature_c >= HOT


def published(before: Conditions, after: Conditions) -> dict[str, Any]:
    """Both moments and what lies between them as plain values, None where the system does not tell."""
    seconds, joules = after.seconds - before.seconds, _gained(before.energy_j, after.energy_j)
    changing = ("load", "clock_ghz", "temperature_c", "device_clock_mhz", "device_temperature_c", "device_power_w")
    return {
        "seconds": seconds,
        "cpus": after.cpus,
        "threads": after.threads,
        "governor": after.governor,
        "clock_max_ghz": after.clock_max_ghz,
        **{f"{name}_before": getattr(before, name) for name in changing},
        **{f"{name}_after": getattr(after, name) for name in changing},
        "own_share": (after.own - before.own) / _available(before, after),
        "others_share": others_share(before, after),
        "steal_share": steal_share(before, after),
        "held_back_seconds": _gained(before.held_back, after.held_back),
        "throttles": _gained(before.throttles, after.throttles),
        "power_w": None if joules is None else joules / seconds,
    }


def told(call: Callable[[], Any]) -> Any:
    """What a call returns, or None where this system has no such thing to tell."""
    try:
        return call()
    except (AttributeError, OSError, RuntimeError, psutil.Error):
        return None


def _clock(root: Path) -> tuple[float | None, float | None]:
    """The clock now and at most, in GHz."""
    found = [each for each in told(lambda: psutil.cpu_freq(percpu=True)) or () if each.current]
    current, most = (max((getattr(each, of) for each in found), default=0.0) / 1000 for of in ("current", "max"))
    # Where there is neither, what the kernel calls the clock is the nominal one: it never changes.
    is_measured = most > 0 or "aperfmperf" in (linux.cpu_flags(root) or ())
    return (current or None) if is_measured else None, most or None


def of_driver(call: Callable[[], float]) -> float | None:
    """What the driver's library tells of a GPU; None where the library is missing, or has an error of its own."""
    try:
        return call()
    except Exception:  # noqa: BLE001  the library's errors are no class of torch's
        return None


def _device(device: torch.device) -> dict[str, float | None]:
    """Clock, temperature and power of a CUDA device at work, as far as the driver tells."""
    if device.type != "cuda":
        return {}
    told(lambda: occupy(device))
    power = of_driver(lambda: torch.cuda.power_draw(device))
    return {
        "device_clock_mhz": of_driver(lambda: torch.cuda.clock_rate(device)),
        "device_temperature_c": of_driver(lambda: torch.cuda.temperature(device)),
        "device_power_w": None if power is None else power / 1000,
    }


def _available(before: Conditions, after: Conditions) -> float:
    """Seconds of all usable CPUs."""
    return max(after.seconds - before.seconds, 1e-9) * after.cpus


def _gained(before: float | None, after: float | None) -> float | None:
    """By how much a counter rose; None where it is not told or started again."""
    return None if before is None or after is None or after < before else after - before


def _fell(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < (1 - FELL) * before
