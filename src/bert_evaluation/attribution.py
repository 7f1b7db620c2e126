"""Which step of a recipe does what: the recipe without it, and it alone, run beside the whole."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from bert_evaluation import graph as graphs
from bert_evaluation import hashes
from bert_evaluation.graph import GraphModule
from bert_evaluation.recipe import Recipe, compose
from bert_evaluation.rows import Effect, Way
from bert_evaluation.stats import Difference, Ratio

SAME = 0.01  # a speed that is surely within this of equal makes no difference


@dataclass(frozen=True)
class Part:
    """One step of a row's recipe, seen one way: the variants without and with it, equal where it does nothing."""

    row: str
    step: str
    way: Way
    without: str
    with_: str


class Parts:
    """The parts of composed recipes, and a variant for each: graphs that are equal are one variant.

    `graphs` are the variants by name, the first of them the base; those of the parts are added.
    """

    def __init__(self, variants: dict[str, GraphModule]) -> None:
        self.graphs = dict(variants)
        self.base = next(iter(variants))
        self.parts: list[Part] = []
        self._names: dict[tuple[str, str], str] = {}
        for name, graph in variants.items():
            self._names.setdefault(_identity(graph), name)

    def add(self, row: str, recipe: Recipe) -> None:
        """The steps of one row's recipe, each left out and alone; nothing for a recipe of one step."""
        steps = recipe.steps
        if len(steps) < 2:
            return
        for index, step in enumerate(steps):
            name = (
                step.name if [each.name for each in steps].count(step.name) == 1 else f"{step.name} (step {index + 1})"
            )
            rest = compose(*steps[:index], *steps[index + 1 :])
            without = self._variant(f"{row} without {name}", rest)
            alone = self._variant(f"{self.base}+{step!r}", compose(step))
            self.parts.append(Part(row, name, "left out", without, self._known(row)))
            self.parts.append(Part(row, name, "alone", self.base, alone))

    def _known(self, row: str) -> str:
        return self._names[_identity(self.graphs[row])]

    def _variant(self, name: str, recipe: Recipe) -> str:
        """The name of the variant that a recipe makes; a new one if there is none like it."""
        graph = recipe(graphs.fork(self.graphs[self.base]))
        known = self._names.setdefault(_identity(graph), name)
        if known == name:
            self.graphs[name] = graph
        return known

    def effects(
        self,
        row: str,
        before: tuple[Effect, ...] = (),
        speedup: Callable[[str, str], Ratio | None] | None = None,
        throughput: Callable[[str, str], Ratio | None] | None = None,
        f1: Callable[[str, str], Difference] | None = None,
    ) -> tuple[Effect, ...]:
        """The effects of a row's steps; the functions compare the variant without a step with the one with it.

        `before` are those of an earlier stage, which are added to.
        """
        mine = [part for part in self.parts if part.row == row]
        found = []
        for part, effect in zip(mine, before or [Effect(part.step, part.way) for part in mine], strict=True):
            pair = (part.without, part.with_)
            if part.without != part.with_:
                effect = replace(
                    effect,
                    speedup=speedup(*pair) if speedup else effect.speedup,
                    throughput_speedup=throughput(*pair) if throughput else effect.throughput_speedup,
                    f1_difference=f1(*pair) if f1 else effect.f1_difference,
                )
                effect = replace(effect, verdict=verdict(effect))
            found.append(effect)
        return tuple(found)


def _identity(graph: GraphModule) -> tuple[str, str]:
    return hashes.graph_hash(graph), hashes.constants_hash(graph)


def verdict(effect: Effect) -> str:
    """What a step that changes the graph does: helps, harms, makes no difference, or cannot tell."""
    if effect.f1_difference is not None and effect.f1_difference.verdict == "worse":
        return "harms"
    ratio = effect.throughput_speedup or effect.speedup
    if ratio is None:
        return "not timed"
    if ratio.low >= 1 - SAME and ratio.high <= 1 + SAME:
        return "no difference"
    return {"faster": "helps", "slower": "harms"}.get(ratio.verdict, "cannot tell")
