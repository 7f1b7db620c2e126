"""The state of a GPU while it is measured, and the time that is left for that."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from bert_evaluation import conditions
from bert_evaluation.device import machine

TOLD = {"clock_mhz": "clocks.sm", "temperature_c": "temperature.gpu", "power_w": "power.draw"}


def state(device: torch.device) -> dict[str, float]:
    """Clock, temperature and power now: by torch where nvidia-ml-py is installed, else by nvidia-smi; else nothing."""
    now = conditions.snapshot(device)
    if now.device_clock_mhz is not None:
        return {name: float(getattr(now, f"device_{name}")) for name in TOLD}
    found = _nvidia_smi(device, TOLD.values())
    try:
        return dict(zip(TOLD, map(float, found), strict=True)) if found else {}
    except ValueError:  # "[N/A]"
        return {}


def about(device: torch.device) -> dict[str, Any]:
    """The machine, with the driver's version and that of triton, and the date."""
    found = machine(device) | {"date": datetime.now(UTC).date().isoformat()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": next(iter(_nvidia_smi(device, ["driver_version"])), "unknown"),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
        }
        if shutil.which("nvidia-smi"):
            found["clock_max_mhz"] = next(iter(_nvidia_smi(device, ["clocks.max.sm"])), "unknown")
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def sentence(found: dict[str, Any]) -> str:
    """The machine in a line."""
    driver = f", driver {found['driver']}, CUDA {found['cuda']}" if "driver" in found else ""
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "transformers") if name in found)
    return f"{found['date']}: {found['device_name']}{driver}; Python {found['python']}, {versions}"


class Budget:
    """So many seconds. What would not be done in them is left out beforehand, or cut off by `at_the_end`, and named."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds
        self._over = threading.Lock()  # held by the one that ends the run: the main thread, or the timer
        self.left_out = dict[str, str]()
        self.now_doing = "the start"

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - self.spent

    def allows(self, what: str, needed: float) -> bool:
        """Whether there are as many seconds left as this takes at least; if not, it is left out."""
        if self.left >= needed:
            self.now_doing = what
            return True
        self.left_out[what] = f"{max(0.0, self.left):.0f} s are left, and it takes {needed:.0f} s or more"
        return False

    def at_the_end(self, call: Callable[[], None]) -> None:
        """When the time is up, do this, whatever is being done, such as compiling, and end the process."""

        def end() -> None:
            if not self._over.acquire(blocking=False):
                return
            self.left_out[self.now_doing] = f"not done within {self.seconds:.0f} s from the start"
            call()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # a compiler at work on another thread hears of nothing else

        self._timer = threading.Timer(self.left, end)
        self._timer.daemon = True
        self._timer.start()

    def is_over(self) -> None:
        """All was done in time: nothing is cut off any more. If it is just being, this never returns."""
        self._over.acquire()
        self._timer.cancel()


def _nvidia_smi(device: torch.device, names: Any) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return []
    query = [f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    which = ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    try:
        found = subprocess.run([program, *query, *which], capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [each.strip() for each in found.stdout.strip().split(",")] if found.returncode == 0 else []
