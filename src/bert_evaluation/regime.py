"""Where a recipe pays: its speed-up over batch size, length and number of threads."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bert_evaluation.errors import UsageError
from bert_evaluation.measurement import Plan, measure
from bert_evaluation.rows import Cell

Cells = dict[str, Cell]  # of one shape, by variant


@dataclass(frozen=True, order=True)
class Shape:
    """What one cell is measured at."""

    batch: int
    length: int
    threads: int

    def __str__(self) -> str:
        return f"{self.batch}×{self.length} on {self.threads} {'thread' if self.threads == 1 else 'threads'}"


@dataclass(frozen=True)
class Grid:
    """Batch sizes, lengths and numbers of threads, each with each. Raises UsageError for a number below 1."""

    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (32, 128, 384)
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("batches", "lengths", "threads"):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < 1:
                raise UsageError(f"A map has {name} of 1 or more, not {', '.join(map(str, numbers)) or 'none'}.")

    @property
    def shapes(self) -> list[Shape]:
        """Every shape once, in order."""
        return sorted(set(itertools.starmap(Shape, itertools.product(self.batches, self.lengths, self.threads))))


def regime(
    variants: Mapping[str, nn.Module],
    inputs: Callable[[int, int], Mapping[str, Tensor]],
    grid: Grid,
    plan: Plan = Plan(),  # noqa: B008  # frozen
    kept: Callable[[Shape, Callable[[], Cells]], Cells] = lambda shape, find: find(),
    on_shape: Callable[[Shape], None] = lambda shape: None,
    seed: int = 0,
) -> dict[str, tuple[Cell, ...]]:
    """Time `variants`, the first of them the base, at every shape of the grid; cells by variant, in the grid's order.

    `inputs` makes those of a batch size and a length. Shapes come in random order, so that a machine that slows down
    does not look like a large shape; at each, variants take turns (see `measurement.measure`). `kept` is given each
    shape and what measures it, and may have its cells already. `on_shape` is told of each one done.
    """
    base, *others = variants
    found = dict[Shape, Cells]()
    for shape in random.Random(seed).sample(grid.shapes, len(grid.shapes)):  # noqa: S311

        def find(shape: Shape = shape) -> Cells:
            with _threads(shape.threads):
                timing = measure(
                    variants,
                    inputs(shape.batch, shape.length),
                    plan.rounds,
                    plan.warm_up,
                    plan.precision,
                    plan.time_limit,
                )
            base_ms = timing.latency(base).estimate
            return {
                name: Cell(
                    shape.batch,
                    shape.length,
                    shape.threads,
                    base_ms,
                    timing.latency(name).estimate,
                    timing.speedup(name),
                )
                for name in others
            }

        found[shape] = kept(shape, find)
        on_shape(shape)
    return {name: tuple(found[shape][name] for shape in grid.shapes) for name in others}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let operators use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
