"""Timing that compares fairly: variants take turns in random order, so that what slows the machine slows them all."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_evaluation import compiled
from bert_evaluation.device import is_idle, is_on, synchronize
from bert_evaluation.errors import BertEvaluationError, UsageError
from bert_evaluation.graph import output_tensors
from bert_evaluation.stats import Interval, Ratio, beyond_noise, drift, median, outliers, speedup

PRECISION, TIME_LIMIT = 0.01, 60.0  # of a ratio; seconds
LEAST, BETWEEN = 12, 4  # rounds before the interval is looked at, and between two looks
AGAIN = "Base again"  # the first variant under another name: what a difference looks like where there is none


@dataclass(frozen=True)
class Plan:
    """When to stop: once every ratio's interval is within ± `precision`, or `time_limit` seconds after the warm-up.

    `rounds` stands for exactly so many instead. `warm_up` calls of each come first, or None for as many as it takes
    for the median to settle.
    """

    precision: float = PRECISION
    time_limit: float = TIME_LIMIT
    rounds: int | None = None
    warm_up: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise UsageError("There is nothing to time: give at least one round.")
        if self.precision <= 0 or self.time_limit <= 0:
            raise UsageError("A precision and a time limit are above 0.")


@dataclass(frozen=True)
class Measurement:
    """Seconds of each call, by variant; the first variant is what the others are compared with.

    `again` are the first variant's, timed as if it were another one. `first_calls` are seconds of the very first call
    of each, which may compile or pack; what was compiled before counts as if it were compiled then.
    """

    seconds: Mapping[str, tuple[float, ...]]
    again: tuple[float, ...] = ()
    first_calls: Mapping[str, float] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    @property
    def noise(self) -> Ratio | None:
        """The first variant against itself, in the same rounds."""
        return speedup(self.seconds[self.base], self.again) if self.again else None

    def latency(self, name: str) -> Interval:
        """The median time of one call in milliseconds."""
        return median([1000 * second for second in self.seconds[name]])

    def percentiles(self, name: str) -> tuple[float, float, float]:
        """The 50th, 90th and 99th percentile of one call's milliseconds."""
        p50, p90, p99 = np.percentile(self.seconds[name], (50, 90, 99)) * 1000
        return float(p50), float(p90), float(p99)

    def speedup(self, name: str) -> Ratio:
        """How many times faster than the base, from paired rounds, with interval and verdict.

        No verdict where the machine makes as much of a difference between the base and itself.
        """
        return self.ratio(self.base, name)

    def ratio(self, slow: str, fast: str) -> Ratio:
        """`speedup` of one variant over any other."""
        return beyond_noise(speedup(self.seconds[slow], self.seconds[fast]), self.noise)

    def pays_after(self, name: str) -> float | None:
        """Calls after which what the first call takes longer than Base's is won back; None if it never is."""
        base, own = (self.latency(each).estimate / 1000 for each in (self.base, name))
        extra = (self.first_calls[name] - own) - (self.first_calls[self.base] - base)
        if extra <= 0:
            return 0.0
        return extra / (base - own) if self.speedup(name).verdict == "faster" else None

    @property
    def ratios(self) -> dict[str, Ratio]:
        """The speed-up of every variant but the base."""
        return {name: self.speedup(name) for name in self.seconds if name != self.base}

    @property
    def remarks(self) -> list[str]:
        """What a reader should know of the samples: drift and outliers of the base's, and a difference from itself."""
        samples, found = self.seconds[self.base], []
        if (change := drift(samples)) is not None:
            found.append(f"Base's time drifted by {change:+.0%} from the first rounds to the last.")
        if count := outliers(samples):
            found.append(f"{count} of Base's {len(samples)} samples lie far from the others.")
        if self.noise is not None and self.noise.verdict != "cannot tell":
            found.append(
                f"Base differs from itself here by {abs(self.noise.estimate - 1):.1%}: the machine is not quiet."
            )
        return found


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes until the device has done its work, and what it returns.

    Raises BertEvaluationError if the clock was read before that: the device is still at work, or is another one.
    """
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    if not is_idle(device):
        raise BertEvaluationError(f"{device} was still at work when the clock was read; end what else uses it.")
    for tensor in output_tensors(result):
        if not is_on(tensor, device):
            raise BertEvaluationError(
                f"Outputs are on {tensor.device} and inputs on {device}, which alone is waited for; put both on one."
            )
    return seconds, result


def measure(
    variants: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    rounds: int | None = None,
    warm_up: int | None = None,
    precision: float = PRECISION,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> Measurement:
    """Time `variants`, the first of them the base, on the same inputs, by keyword.

    See `Plan` for when it stops. `on_round` is told of each round. Raises UsageError if there is nothing to time.
    """
    if not variants:
        raise UsageError("There is nothing to time: name at least one variant.")
    device = next(iter(inputs.values())).device

    def call(name: str) -> float:
        return timed(lambda: variants[name](**inputs), device)[0]

    compiling = {name: compiled.seconds(variant) for name, variant in variants.items()}
    with torch.inference_mode(), _no_garbage_collection():
        found = sample(call, list(variants), Plan(precision, time_limit, rounds, warm_up), seed, on_round)
    return replace(found, first_calls={name: found.first_calls[name] + compiling[name] for name in variants})


def sample(
    call: Callable[[str], float],
    names: Sequence[str],
    plan: Plan,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Rounds of calls, each of every name and of the first one again, in random order; `call` returns seconds."""
    order = random.Random(seed)  # noqa: S311
    first_calls = {name: call(name) for name in names}
    _warm_up(call, names, plan)
    start = clock()
    turns = {AGAIN: names[0], **{name: name for name in names}}
    seconds = {turn: list[float]() for turn in turns}
    while True:
        for turn in order.sample(list(turns), len(turns)):
            seconds[turn].append(call(turns[turn]))
        on_round()
        done = len(seconds[AGAIN])
        again, samples = seconds[AGAIN], {name: seconds[name] for name in names}
        if plan.rounds is not None:
            finished = done >= plan.rounds
        else:
            look = done >= LEAST and done % BETWEEN == 0
            finished = (look and _is_precise(samples, again, plan.precision)) or clock() - start >= plan.time_limit
        if finished:
            return Measurement({name: tuple(each) for name, each in samples.items()}, tuple(again), first_calls)


def _warm_up(call: Callable[[str], float], names: Sequence[str], plan: Plan) -> None:
    """Call each until its running median changes by less than 2 %, at most 20 times, or `plan.warm_up` times."""
    for name in names:
        samples = list[float]()
        while len(samples) < (20 if plan.warm_up is None else plan.warm_up):
            samples.append(call(name))
            if plan.warm_up is None and len(samples) >= 6:
                before, now = statistics.median(samples[-6:-3]), statistics.median(samples[-3:])
                if abs(now - before) <= 0.02 * before:
                    break


def _is_precise(samples: Mapping[str, Sequence[float]], again: Sequence[float], precision: float) -> bool:
    base, *others = samples.values()
    ratios = [speedup(base, other) for other in (*others, again)]
    return all((ratio.high - ratio.low) / 2 <= precision for ratio in ratios)


class _no_garbage_collection(nullcontext[None]):  # noqa: N801
    """Keep a collection from falling into one variant's time."""

    def __enter__(self) -> None:
        self.was_on = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            gc.enable()
