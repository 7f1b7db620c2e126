"""Timing that compares fairly: variants take turns in random order, so that what slows the machine slows them all."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert_evaluation.device import synchronize
from bert_evaluation.errors import UsageError
from bert_evaluation.stats import Interval, Ratio, median, speedup

ROUNDS, WARM_UP = 40, 5


@dataclass(frozen=True)
class Measurement:
    """Seconds of each call, by variant; the first variant is what the others are compared with."""

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def base(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    def latency(self, name: str) -> Interval:
        """The median time of one call in milliseconds."""
        return median([1000 * second for second in self.seconds[name]])

    def speedup(self, name: str) -> Ratio:
        """How many times faster than the base, from paired rounds, with interval and verdict."""
        return speedup(self.seconds[self.base], self.seconds[name])

    @property
    def ratios(self) -> dict[str, Ratio]:
        """The speed-up of every variant but the base."""
        return {name: self.speedup(name) for name in self.seconds if name != self.base}


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes until the device has done its work, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def measure(
    variants: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> Measurement:
    """Time `variants`, the first of them the base, on the same inputs, by keyword.

    After `warm_up` calls of each, every round calls each once in a new random order. `on_round` is told of each round.
    Raises UsageError if there is nothing to time.
    """
    if not variants or rounds < 1:
        raise UsageError("There is nothing to time: name at least one variant and one round.")
    device = next(iter(inputs.values())).device
    order, seconds = random.Random(seed), {name: list[float]() for name in variants}  # noqa: S311
    with torch.inference_mode(), _no_garbage_collection():
        for variant in variants.values():
            for _ in range(warm_up):
                variant(**inputs)
        for _ in range(rounds):
            for name in order.sample(list(variants), len(variants)):
                seconds[name].append(timed(lambda name=name: variants[name](**inputs), device)[0])  # type: ignore[misc]
            on_round()
    return Measurement({name: tuple(samples) for name, samples in seconds.items()})


class _no_garbage_collection(nullcontext[None]):  # noqa: N801
    """Keep a collection from falling into one variant's time."""

    def __enter__(self) -> None:
        self.was_on = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            gc.enable()
