"""Whether the same work takes the same time: a neighbour on a core shows in nothing else that a guest is told."""

from time import perf_counter

import torch

# Numbers that stay in a core's first cache, and are for one thread; calls that take longer than a clock's tick.
NUMBERS, CALLS = 2048, 50


def unevenness(seconds: float) -> float:
    """Work for so long; return the time of the slowest tenth's fastest over that of the fastest tenth's slowest.

    1 where all takes as long. The same few calls are timed again and again, on one thread, from the caches.
    """
    x, end, times = torch.linspace(-1, 1, NUMBERS), perf_counter() + seconds, list[float]()
    y = torch.empty_like(x)
    while not times or perf_counter() < end:
        start = perf_counter()
        for _ in range(CALLS):
            torch.exp(x, out=y)
        times.append(perf_counter() - start)
    fast, slow = torch.tensor(times).quantile(torch.tensor([0.1, 0.9])).tolist()
    return float(slow / fast)
