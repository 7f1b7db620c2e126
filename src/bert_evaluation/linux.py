"""What Linux tells of the machine in /proc and /sys. None where it does not tell; so it is on every other system."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60  # bytes; cgroup v1 writes a number about this size where there is none
CPUS = "sys/devices/system/cpu"
ALLOCATORS = {"libtcmalloc": "tcmalloc", "libjemalloc": "jemalloc", "libmimalloc": "mimalloc", "libc.so": "glibc"}


def cpu_flags(root: Path = ROOT) -> frozenset[str] | None:
    """The processor's features by the kernel's names, `hypervisor` among them in a virtual machine."""
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many CPUs' worth of time the control group may use; infinite where it has no quota."""
    return _smallest(_cgroups(root, "cpu"), _quota)


def memory_limit(root: Path = ROOT) -> float | None:
    """How many bytes the control group may use; infinite where it has no limit."""
    return _smallest(_cgroups(root, "memory"), _memory)


def held_back(root: Path = ROOT) -> float | None:
    """Seconds for which the control group has waited, since its CPU quota was used up."""
    found = list[float]()
    for folder in _cgroups(root, "cpu"):
        for line in _lines(folder / "cpu.stat"):
            name, _, value = line.partition(" ")
            if name in ("throttled_usec", "throttled_time"):
                found.append(int(value) / (1e6 if name == "throttled_usec" else 1e9))
    return sum(found) if found else None


def governor(cpus: Iterable[int], root: Path = ROOT) -> str | None:
    """What decides the clock of these CPUs, such as `performance`; several names where they differ."""
    found = {_text(root / CPUS / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus} - {None}
    return ", ".join(sorted(map(str, found))) or None


def turbo(root: Path = ROOT) -> bool | None:
    """Whether the clock may rise above its nominal value."""
    off, on = _number(root / CPUS / "intel_pstate/no_turbo"), _number(root / CPUS / "cpufreq/boost")
    if off is not None:
        return off == 0
    return None if on is None else on == 1


def cores(cpus: Iterable[int], root: Path = ROOT) -> int | None:
    """How many cores these CPUs are; fewer than there are CPUs where some are siblings that share one."""
    siblings = [_text(root / CPUS / f"cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    return None if None in siblings else len(set(siblings))


def throttles(cpus: Iterable[int], root: Path = ROOT) -> int | None:
    """How often these CPUs have lowered their clock since they were too hot."""
    counts = [_number(root / CPUS / f"cpu{cpu}/thermal_throttle/core_throttle_count") for cpu in cpus]
    told = [count for count in counts if count is not None]
    return sum(told) if told else None


def energy(root: Path = ROOT) -> float | None:
    """Joules that the processor's packages have used, of a counter that starts again at some time."""
    zones = [zone for zone in (root / "sys/class/powercap").glob("intel-rapl:*") if zone.name.count(":") == 1]
    joules = [_number(zone / "energy_uj") for zone in zones]
    told = [each / 1e6 for each in joules if each is not None]
    return sum(told) if told else None


def last_level_cache(root: Path = ROOT) -> int | None:
    """Bytes of the largest cache of a CPU."""
    sizes = [_text(file) or "" for file in (root / CPUS / "cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"\d+K", size)), default=None)


def allocator(root: Path = ROOT) -> str | None:
    """Whose malloc this process uses."""
    maps = "\n".join(_lines(root / "proc/self/maps"))
    return next((name for library, name in ALLOCATORS.items() if library in maps), None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it, which all limit it; v1, v2 or both."""
    found = list[Path]()
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for name in dict.fromkeys((controllers, controller if controllers else "unified")):
            base = root / "sys/fs/cgroup" / name
            if not base.is_dir():
                continue
            # In a container the path may be the host's, of which only the beginning is there, or nothing.
            inner = base / path.strip().lstrip("/")
            within = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
            found += [folder for folder in within if folder.is_dir() and folder not in found]
    return found


def _smallest(folders: list[Path], limit: Callable[[Path], float | None]) -> float | None:
    found = [limit(folder) for folder in folders]
    return min((each for each in found if each is not None), default=math.inf) if folders else None


def _quota(folder: Path) -> float | None:
    if (both := (_text(folder / "cpu.max") or "").split()) and both[0] != "max":
        return int(both[0]) / int(both[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _memory(folder: Path) -> float | None:
    found = [_number(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
    return next((each for each in found if each is not None and each < NO_LIMIT), None)


def _lines(file: Path) -> Iterator[str]:
    try:
        yield from file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return


def _text(file: Path) -> str | None:
    return next(_lines(file), "").strip() or None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
