"""Which step of a recipe breaks its promise, at which site, and the smallest probe that shows it."""

import copy
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

from bert_evaluation import graph as graphs
from bert_evaluation import onednn
from bert_evaluation.capturing import capture, read, save
from bert_evaluation.graph import GraphModule
from bert_evaluation.probes import Probe
from bert_evaluation.promise import Approximates, Bitwise, Promise
from bert_evaluation.recipe import Recipe, compose
from bert_evaluation.transformation import Report, ReversibleTransformation, Site, Transformation, promise_of
from bert_evaluation.verification import (
    FAILURES,
    OUTPUT,
    Place,
    Reference,
    Verification,
    in_double,
    judge,
    observe,
    parting,
    results,
    tolerances,
)

WHOLE = "the whole graph"


@dataclass(frozen=True)
class Blame:
    """Where a promise was broken.

    The smallest probe that shows it, the first node and layer where the graphs before and after the step part, the step
    and the site that cause it, a command line that shows it again, and what that node says if it fails.
    """

    probe: str
    node: str
    layer: str
    step: str
    site: str
    command: str
    failure: str = ""


@dataclass(frozen=True)
class StepCheck:
    """One step of a recipe, held to its own promise against the graph before it."""

    recipe: str
    number: int
    step: str
    report: Report
    verification: Verification
    blame: Blame | None = None

    @property
    def kept(self) -> bool:
        """Whether the promise held."""
        return self.verification.kept


class SaveAndRead(Transformation):
    """The graph as it is after `save` and `read`: it has to return the same bits."""

    promise = Bitwise()

    def __call__(self, graph_module: GraphModule, lint_and_recompile: bool = True) -> GraphModule:  # noqa: ARG002
        """Return the graph that was read."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.pt2"
            save(graph_module, file)
            return read(file)


class SomeSites(Transformation):
    """A transformation that is kept to some of its sites, by their names."""

    def __init__(self, whole: Transformation, names: Iterable[str]) -> None:
        self._whole = copy.copy(whole)
        self._names = frozenset(names)

    @property
    def promise(self) -> Promise:  # type: ignore[override]  # what the whole promises
        """The promise of the whole."""
        return self._whole.promise

    def sites(self, graph: GraphModule) -> list[Site]:
        """Those of the whole that have these names."""
        return [site for site in self._whole.sites(graph) if str(site) in self._names]

    def why_not(self, site: Site) -> str | None:
        """What the whole says."""
        return self._whole.why_not(site)

    def rewrite(self, graph: GraphModule, site: Site) -> object:
        """What the whole does."""
        return self._whole.rewrite(graph, site)


def verify_steps(
    reference: Reference, recipe: Transformation, options: Sequence[str] = (), saved: bool = True
) -> Iterator[StepCheck]:
    """Check the promise of each step of a recipe, then (unless `saved` is false) that its graph can be saved and read.

    Each step is held to its own promise against the graph before it; one that breaks it is left out for the next.
    Positions that a step promises nothing about are left out from there on.
    A graph that is fused for a processor is not saved, since that would bring plain operators back.
    Steps that follow an approximation (of the precision, say) are checked behind it, and once more without it.
    `reference` is what `observe` made of the model or its graph; `options` are those of the command line that chose
    model, data set, seed and device: part of the command that shows a broken promise again.
    """
    model = reference.model
    if not isinstance(model, GraphModule):
        model = capture(model, None if hasattr(model, "config") else reference.probes[0].inputs)
        reference = observe(model, reference.probes)
    whole, last = compose(recipe), (SaveAndRead(),) if saved else ()
    yield from _walk(model, reference, whole, last, options)
    same = [step.promise.rank < Approximates.rank for step in whole.steps]
    if False in same and True in same[same.index(False) :]:
        yield from _walk(model, reference, compose(*compress(whole.steps, same)), last, options)


def _walk(
    graph: GraphModule, reference: Reference, recipe: Recipe, last: Sequence[Transformation], options: Sequence[str]
) -> Iterator[StepCheck]:
    before = graph
    origin = yardstick = graph  # whose float64 results the reference has, and whose distance from those it allows
    where = promise_of(graph).where
    command = ("bert-evaluation", "verify", *options, "--recipe", repr(recipe), "--probe")
    for number, step in enumerate((*recipe.steps, *last), 1):
        if isinstance(step, SaveAndRead) and not onednn.is_plain(before):
            continue
        after = step(graphs.fork(before))
        found, where = results(after, reference.probes), where or promise_of(after).where
        promise = replace(step.promise, where=where)
        verdict, blame = judge(reference, found, promise), None
        if not verdict.kept:
            trial = _Trial(before, promise, origin, yardstick)
            failing = next(probe for probe in reference.probes if probe.name == verdict.failing_probe)
            blame = _blame(trial, step, after, failing, command)
            verdict = replace(verdict, first_difference=str(Place(blame.node, blame.layer, blame.failure)))
        yield StepCheck(repr(recipe), number, repr(step), step.report, verdict, blame)
        if not verdict.kept:
            continue
        before = after
        if step.promise.rank < Approximates.rank:
            reference = replace(reference, model=after, outputs=found)
            continue
        try:
            reference = observe(after, reference.probes)
            origin = yardstick = after
        except FAILURES:  # some operator does not run in float64: what follows is as near to the last one that did
            yardstick = after
            allowed = tolerances(reference.exact, found)
            reference = replace(reference, model=after, outputs=found, tolerances=allowed)


class _Trial:
    """Says whether what a step made of the graph `before` breaks the step's promise on a single probe."""

    def __init__(self, before: GraphModule, promise: Promise, origin: GraphModule, yardstick: GraphModule) -> None:
        self.before, self.promise, self._yardstick = before, promise, yardstick
        self._precise = None if isinstance(promise, Bitwise) else in_double(origin)

    def breaks(self, graph: GraphModule, probe: Probe) -> bool:
        """Whether the graph does."""
        outputs = results(self.before, [probe])
        if self._precise is None:
            reference = Reference(self.before, (probe,), outputs, outputs, (0.0,))
        else:
            reference = replace(observe(self._yardstick, [probe], self._precise), outputs=outputs)
        return not judge(reference, results(graph, [probe]), self.promise).kept


def _blame(trial: _Trial, step: Transformation, after: GraphModule, failing: Probe, command: Sequence[str]) -> Blame:
    probe = smallest(failing, lambda each: trial.breaks(after, each))

    def applied(names: Sequence[str]) -> GraphModule:
        return SomeSites(step, names)(graphs.fork(trial.before))

    names, site = step.report.applied, WHOLE
    if names and walks_sites(step):
        site = guilty(names, lambda first: trial.breaks(applied(first), probe))
        # Sound sites may change what nodes return too, and only this one's change is of interest.
        alone = applied([site])
        after = alone if trial.breaks(alone, probe) else after
    place = parting(trial.before, after, probe.inputs, trial.promise) or OUTPUT
    again = shlex.join([*command, probe.name])
    return Blame(probe.name, place.node, place.layer, repr(step), site, again, place.failure)


def smallest(probe: Probe, fails: Callable[[Probe], bool]) -> Probe:
    """The probe made smaller and smaller for as long as it fails."""
    while (next_one := next((each for each in probe.smaller() if fails(each)), None)) is not None:
        probe = next_one
    return probe


def guilty(sites: Sequence[str], breaks: Callable[[Sequence[str]], bool]) -> str:
    """The site with which the first ones break the promise, and without which they do not; found by bisection."""
    kept, broken = 0, len(sites)  # so many of the first ones
    while broken - kept > 1:
        middle = (kept + broken) // 2
        kept, broken = (kept, middle) if breaks(sites[:middle]) else (middle, broken)
    return sites[broken - 1]


def walks_sites(step: Transformation) -> bool:
    """Whether the frame walks the step's sites, rather than a method of its own."""
    kind = type(step)
    calls = (Transformation.__call__, ReversibleTransformation.__call__)
    return kind.transform is Transformation.transform and kind.__call__ in calls
