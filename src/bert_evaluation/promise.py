"""What a transformation promises of a graph's results."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Promise:
    """What a transformation claims about the outputs; `kind` is its word, a higher `rank` claims less.

    `where` names an input such as `attention_mask`: nothing is claimed about positions where that is 0.
    """

    kind: ClassVar[str]
    rank: ClassVar[int]
    where: str | None = None


class Bitwise(Promise):
    """Every output keeps every bit."""

    kind, rank = "bitwise", 0


class Reassociates(Promise):
    """The same function over the real numbers; only rounding differs."""

    kind, rank = "reassociates", 1


class Approximates(Promise):
    """Another function: its quality has to be measured."""

    kind, rank = "approximates", 2


def weakest(promises: Iterable[Promise]) -> Promise:
    """The promise that holds where all of these do; `Bitwise` of none."""
    all_of_them = tuple(promises)
    where = next((promise.where for promise in all_of_them if promise.where is not None), None)
    return replace(max(all_of_them, key=lambda promise: promise.rank, default=Bitwise()), where=where)
