"""Whether the same work takes the same time: what neighbours on a core do shows in nothing else that a guest is told.

Nor does it show when the host lets two of the guest's CPUs share a core, which is told as two.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from time import perf_counter

import torch

# Numbers that stay in a core's second cache, and are for one thread; how long threads work, and at how many at once
# Python's lock, which they need between their calls, does not yet keep them waiting.
NUMBERS, CALLS, TURN, MOST = 32_000, 10, 0.02, 4


@dataclass(frozen=True)
class Pace:
    """How many times as long the same work took: on one thread at times, and on several as on one, if that was tried.

    The first is the time of the slowest tenth's fastest over that of the fastest tenth's slowest.
    """

    at_times: float
    at_once: float | None = None

    def __str__(self) -> str:
        at_once = "" if self.at_once is None else f", and {self.at_once:.2f} times as long on several CPUs at once"
        return f"the same work took {self.at_times:.2f} times as long at times{at_once}"


def measured(seconds: float, threads: int) -> Pace:
    """Work for so long, in turns on one thread and on all of them, 4 at most."""
    threads, end = min(threads, MOST), perf_counter() + seconds
    alone, slower = list[float](), list[float]()
    with ThreadPoolExecutor(threads) as pool:
        while len(alone) < 2 or perf_counter() < end:
            turn = _work()
            alone += turn
            if threads > 1:
                at_once = [pool.submit(_work) for _ in range(threads)]
                slower.append(fmean(median(each.result()) for each in at_once) / median(turn))
    tenths = quantiles(alone, n=10)
    return Pace(tenths[-1] / tenths[0], median(slower) if slower else None)


def _work() -> list[float]:
    """Times of the same few calls, again and again for a turn."""
    x, times, end = torch.linspace(-1, 1, NUMBERS), list[float](), perf_counter() + TURN
    y = torch.empty_like(x)
    while not times or perf_counter() < end:
        start = perf_counter()
        for _ in range(CALLS):
            torch.exp(x, out=y)
        times.append(perf_counter() - start)
    return times
