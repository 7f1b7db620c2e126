"""Several batches at once, each on one thread.

On a CPU this is cheaper than one batch on all threads, which wait for each other at the end of every operator.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def default_streams(device: torch.device) -> int:
    """As many as torch has threads, on a CPU; any other device works on one batch at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@dataclass
class Streams:
    """`count` workers, for a `with` block; with one, the work is done where it is asked for, on all threads.

    When the block is left by an exception, `stopped` is set and work that has not begun is given up, without waiting
    for what is going on.
    """

    count: int
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Streams":
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "stream", torch.set_num_threads, (1,)) if self.count > 1 else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            # Of MKL's threads there is one number for the whole process, which the workers have set.
            torch.set_num_threads(self._threads)

    def map(self, call: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """The results of the tasks in their order, as they come."""
        return self._pool.map(call, tasks) if self._pool is not None else map(call, tasks)
