"""What is long on the page: changed answers, graph differences, sites. As much of each as a page can carry."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from markupsafe import escape

from bert_evaluation.rows import Change, Row
from bert_evaluation.transformation import Refusal

CHANGES, REFUSALS, APPLIED, LINES = 200, 60, 60, 600  # shown of one row, step, step and step
CHARACTERS = 1_200_000  # shown of each kind, so that the page stays below 6 MB

T = TypeVar("T")


class Budget:
    """How many characters the page has left for one kind of what is long."""

    def __init__(self, characters: int = CHARACTERS) -> None:
        self._left = characters

    def first(self, items: Sequence[T], most: int, text: Callable[[T], str]) -> tuple[T, ...]:
        """The first of these that there is room for, at most so many."""
        shown: list[T] = []
        for item in items[:most]:
            size = len(escape(text(item))) + 200  # for the tags around it
            if size > self._left:
                break
            self._left -= size
            shown.append(item)
        return tuple(shown)


def changes(rows: Iterable[Row], budget: Budget) -> list[tuple[Row, tuple[Change, ...], int]]:
    """Of each row that changed answers those that were clearest before, and how many more there are."""
    found = []
    for row in rows:
        if row.quality and row.quality.changes:
            ordered = sorted(row.quality.changes, key=lambda change: -change.margin_before)
            shown = budget.first(ordered, CHANGES, lambda change: change.question + change.before + change.after)
            found.append((row, shown, len(ordered) - len(shown)))
    return found


@dataclass(frozen=True)
class StepListing:
    """A step's difference in parts of one kind (added, removed, hunk, or neither), and how many lines are left out.

    Not shown again where an earlier row, `same_as`, has the very same.
    """

    name: str
    added: int
    removed: int
    parts: tuple[tuple[str, str], ...]
    more: int
    same_as: str | None


def diffs(rows: Iterable[Row], budget: Budget) -> list[tuple[Row, list[StepListing]]]:
    """What the steps of each row did to the graph."""
    shown: dict[str, str] = {}
    return [
        (row, [_step(each.step, each.diff, row.name, shown, budget) for each in row.graph_changes])
        for row in rows
        if row.graph_changes
    ]


def _step(step: str, diff: str, row: str, shown: dict[str, str], budget: Budget) -> StepListing:
    lines = diff.splitlines()
    kinds = [_kind(line) for line in lines]
    same_as = shown.get(diff) if diff else None
    shown.setdefault(diff, row)
    kept = () if same_as else budget.first(lines, LINES, lambda line: line)
    parts = tuple((kind, "\n".join(part)) for kind, part in groupby(kept, _kind))
    more = 0 if same_as else len(lines) - len(kept)
    return StepListing(step, kinds.count("added"), kinds.count("removed"), parts, more, same_as)


def _kind(line: str) -> str:
    if line.startswith(("@@", "+++", "---")):
        return "hunk"
    return {"+": "added", "-": "removed"}.get(line[:1], "")


@dataclass(frozen=True)
class StepSites:
    """One step's sites: refusals with how many `more`, and the names of applied ones with how many are `unshown`."""

    name: str
    found: int
    applied: tuple[str, ...]
    shown: tuple[str, ...]
    unshown: int
    refused: tuple[Refusal, ...]
    more: int


def sites(rows: Iterable[Row], budget: Budget) -> list[tuple[Row, list[StepSites]]]:
    """The sites of each row, step by step."""
    found = []
    for row in rows:
        steps = []
        for report in row.sites:
            refused = budget.first(report.refused, REFUSALS, lambda each: each.site + each.reason)
            applied = budget.first(report.applied, APPLIED, str)
            steps.append(
                StepSites(
                    name=report.transformation,
                    found=report.found,
                    applied=report.applied,
                    shown=applied,
                    unshown=len(report.applied) - len(applied),
                    refused=refused,
                    more=len(report.refused) - len(refused),
                )
            )
        if steps:
            found.append((row, steps))
    return found
