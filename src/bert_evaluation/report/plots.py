"""Figures as geometry: where on an axis each number of a plot lies, in percent of its width. The template draws them.

Percent, since an SVG whose coordinates are percent fits every screen without its text growing or shrinking.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bert_evaluation.rows import Cell, Row
from bert_evaluation.stats import Interval, Ratio

APART = 9.0  # percent between two ticks, so that their labels do not touch on a phone
DRAWN = 400  # raw times drawn of one row
HEAT = 4  # shades of faster, and of slower


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A range of numbers on a line from 0 to 100 percent."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a number lies; what is out of the range lies on its edge."""
        low, high, here = (math.log(max(each, 1e-9)) if self.is_log else each for each in (self.low, self.high, value))
        return round(100 * min(1.0, max(0.0, (here - low) / (high - low))), 2)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """Round numbers within the range, far enough from each other."""
        wide = self.is_log and self.high / self.low > 5
        values = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5)] if wide else _round_numbers(self.low, self.high)
        kept: list[Tick] = []
        for value in values:
            if self.low <= value <= self.high and (not kept or self.at(value) - kept[-1].at >= APART):
                kept.append(Tick(self.at(value), f"{value:.6g}"))
        return tuple(kept)


def _round_numbers(low: float, high: float) -> list[float]:
    """Five to eight multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def ratio_axis(ratios: Iterable[Interval]) -> Axis | None:
    """An axis of ratios that holds all of these and 1, which halving and doubling are equally far from."""
    ends = [end for each in ratios for end in (each.low, each.high, each.estimate) if math.isfinite(end) and end > 0]
    if not ends:
        return None
    low, high = math.log(min(*ends, 0.98)), math.log(max(*ends, 1.02))
    margin = 0.04 * (high - low)
    return Axis(math.exp(low - margin), math.exp(high + margin), is_log=True)


@dataclass(frozen=True)
class Span:
    """An interval on an axis."""

    low: float
    estimate: float
    high: float


def span(axis: Axis, found: Interval) -> Span:
    """An interval's place."""
    return Span(axis.at(found.low), axis.at(found.estimate), axis.at(found.high))


@dataclass(frozen=True)
class Distribution:
    """Raw times of one row: a smoothed density and all times as ticks (paths in a box 100 wide, 1 high), quartiles.

    `beyond` times are off the axis, the largest of them `largest`; of more than DRAWN times every n-th is drawn.
    """

    name: str
    area: str
    rug: str
    quartiles: Span
    median: float
    count: int
    drawn: int
    beyond: int
    largest: float


@dataclass(frozen=True)
class Distributions:
    """Raw times of several rows on one axis, in milliseconds."""

    axis: Axis
    rows: tuple[Distribution, ...]


def distributions(times: Mapping[str, Sequence[float]]) -> Distributions | None:
    """How the raw times (in milliseconds) of each row are spread. The axis leaves out far outliers, and counts them."""
    columns = {name: np.sort(np.asarray(each, dtype=np.float64)) for name, each in times.items() if len(each)}
    if not columns:
        return None
    low = min(float(each[0]) for each in columns.values())
    high = max(_whisker(each) for each in columns.values())
    margin = 0.03 * (high - low) or 0.05 * high or 1.0
    axis = Axis(max(0.0, low - margin), high + margin)
    return Distributions(axis, tuple(_distribution(axis, name, each) for name, each in columns.items()))


def _whisker(ordered: NDArray[np.float64]) -> float:
    """The largest time that is no far outlier."""
    first, third = np.quantile(ordered, (0.25, 0.75))
    return float(ordered[ordered <= third + 6 * (third - first)][-1])


def _distribution(axis: Axis, name: str, ordered: NDArray[np.float64]) -> Distribution:
    within = ordered[ordered <= axis.high]
    every = math.ceil(len(within) / DRAWN)
    first, middle, third = (float(each) for each in np.quantile(ordered, (0.25, 0.5, 0.75)))
    return Distribution(
        name=name,
        area=_density(axis, ordered),
        rug="".join(f"M{axis.at(float(each)):g} 0v1" for each in within[::every]),
        quartiles=Span(axis.at(first), axis.at(middle), axis.at(third)),
        median=middle,
        count=len(ordered),
        drawn=len(within[::every]),
        beyond=len(ordered) - len(within),
        largest=float(ordered[-1]),
    )


def _density(axis: Axis, ordered: NDArray[np.float64]) -> str:
    """A Gaussian kernel estimate with Silverman's bandwidth (1986), its peak 1 high."""
    spread = float(min(np.std(ordered), np.subtract(*np.quantile(ordered, (0.75, 0.25))) / 1.34))
    width = max(0.9 * spread * len(ordered) ** -0.2, (axis.high - axis.low) / 150)
    grid = np.linspace(axis.low, axis.high, 101)
    heights = np.zeros_like(grid)
    for part in np.array_split(ordered, len(ordered) // 5000 + 1):  # so that a long list costs little memory
        heights += np.exp(-(((grid[:, None] - part) / width) ** 2) / 2).sum(axis=1)
    tops = 1 - heights / heights.max()
    return "M0 1" + "".join(f"L{x} {y:.3g}" for x, y in enumerate(tops)) + "L100 1Z"


@dataclass(frozen=True)
class Point:
    """A row by its latency and F1, in percent from left and top; `number` is its place among the rows.

    `level` is how many lines lower its label goes, so that it is not written over that of its neighbour.
    """

    number: int
    name: str
    milliseconds: float
    f1: float
    x: float
    y: float
    whisker: tuple[float, float] | None
    on_front: bool
    level: int = 0


@dataclass(frozen=True)
class Scatter:
    """F1 against latency. `front` joins what nothing beats in one without losing the other: x1, y1, x2, y2 a line."""

    x_axis: Axis
    y_axis: Axis
    points: tuple[Point, ...]
    front: tuple[tuple[float, float, float, float], ...]

    @property
    def best(self) -> tuple[Point, ...]:
        """The points on the front, fastest first."""
        return tuple(sorted((each for each in self.points if each.on_front), key=lambda each: each.milliseconds))


def scatter(rows: Sequence[tuple[int, Row, float]]) -> Scatter | None:
    """Where rows (number, row, milliseconds) lie, Base first; those without a quality are left out."""
    known = [(number, row, ms, row.quality) for number, row, ms in rows if row.quality is not None]
    if len(known) < 2:
        return None
    base = known[0][3].f1
    whiskers = {
        number: (base + found.f1_difference.low, base + found.f1_difference.high)
        for number, _, _, found in known
        if found.f1_difference is not None
    }
    f1s = [found.f1 for *_, found in known] + [end for ends in whiskers.values() for end in ends]
    x_axis = _padded([ms for _, _, ms, _ in known], 0.01 * known[0][2])
    y_axis = _padded(f1s, 0.2)

    def dominated(ms: float, f1: float) -> bool:
        return any(a <= ms and b.f1 >= f1 and (a, b.f1) != (ms, f1) for _, _, a, b in known)

    points = tuple(
        Point(
            number=number,
            name=row.name,
            milliseconds=ms,
            f1=found.f1,
            x=x_axis.at(ms),
            y=_from_top(y_axis, found.f1),
            whisker=(_from_top(y_axis, whiskers[number][0]), _from_top(y_axis, whiskers[number][1]))
            if number in whiskers
            else None,
            on_front=not dominated(ms, found.f1),
        )
        for number, row, ms, found in known
    )
    return Scatter(x_axis, y_axis, _apart(points), _stairs(points))


def _apart(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with labels one under the other where they lie close."""
    placed: list[Point] = []
    for point in sorted(points, key=lambda each: each.x):
        near = {each.level for each in placed if point.x - each.x < 4 and abs(point.y - each.y) < 12}
        placed.append(replace(point, level=next(level for level in range(len(points)) if level not in near)))
    return tuple(sorted(placed, key=lambda each: each.number))


def _padded(values: Sequence[float], least: float) -> Axis:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), least)
    return Axis(low - margin, high + margin)


def _from_top(axis: Axis, value: float) -> float:
    return round(100 - axis.at(value), 2)


def _stairs(points: Sequence[Point]) -> tuple[tuple[float, float, float, float], ...]:
    steps = sorted((each.x, each.y) for each in points if each.on_front)
    lines = []
    for (x, y), (next_x, next_y) in zip(steps, [*steps[1:], (100.0, steps[-1][1])], strict=True):
        lines += [(x, y, next_x, y), (next_x, y, next_x, next_y)]
    return tuple(line for line in lines if line[:2] != line[2:])


@dataclass(frozen=True)
class Heat:
    """A cell of a regime map; `shade` from -HEAT (much slower) to HEAT (much faster), 0 where it cannot be told."""

    cell: Cell
    shade: int


@dataclass(frozen=True)
class Grid:
    """A regime map at one number of threads: batch sizes down, lengths across; None where nothing was measured."""

    threads: int
    lengths: tuple[int, ...]
    lines: tuple[tuple[int, tuple[Heat | None, ...]], ...]


def grids(cells: Sequence[Cell]) -> tuple[Grid, ...]:
    """A row's regime as one map for each number of threads."""
    made = []
    for threads in sorted({cell.threads for cell in cells}):
        here = {(cell.batch, cell.length): Heat(cell, shade(cell.speedup)) for cell in cells if cell.threads == threads}
        lengths = tuple(sorted({length for _, length in here}))
        batches = sorted({batch for batch, _ in here})
        lines = tuple((batch, tuple(here.get((batch, length)) for length in lengths)) for batch in batches)
        made.append(Grid(threads, lengths, lines))
    return tuple(made)


def shade(ratio: Ratio) -> int:
    """How deep a cell is coloured: a shade for every quarter of a doubling; none for what cannot be told."""
    if ratio.verdict == "cannot tell" or not 0 < ratio.estimate < math.inf:
        return 0
    depth = min(HEAT, 1 + int(abs(math.log2(ratio.estimate)) / 0.25))
    return depth if ratio.verdict == "faster" else -depth
