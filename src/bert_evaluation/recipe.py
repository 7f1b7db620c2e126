"""A recipe: an ordered list of transformations, itself a transformation, with a text form."""

import ast
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bert_evaluation import graph as graphs
from bert_evaluation.errors import UsageError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Promise, weakest
from bert_evaluation.transformation import Report, ReversibleTransformation, Transformation, unchanged_on_error


class Recipe(Transformation):
    """Transformations applied in order. With `inplace=False` the graph given stays as it was and a fork is returned."""

    def __init__(self, steps: tuple[Transformation, ...], inplace: bool = True, title: str = "") -> None:
        self._steps = steps
        self._inplace = inplace
        self._title = title

    @property
    def steps(self) -> tuple[Transformation, ...]:
        """The transformations, first to last."""
        return self._steps

    @property
    def promise(self) -> Promise:  # type: ignore[override]  # what its steps promise, not a constant of the class
        """The weakest promise of the steps."""
        return weakest(step.promise for step in self._steps)

    @property
    def name(self) -> str:
        """The steps' names, as in `RemoveDropout+MergeLinears`, or the name of the preset that it is."""
        return self._title or "+".join(step.name for step in self._steps)

    def __repr__(self) -> str:
        return "+".join(repr(step) for step in self._steps)

    def __call__(self, graph_module: GraphModule, lint_and_recompile: bool = True) -> GraphModule:
        """Apply every step; if one fails, the graph is as it was before the first."""
        if not self._inplace:
            graph_module = graphs.fork(graph_module)
        with unchanged_on_error(graph_module):
            for step in self._steps:
                graph_module = step(graph_module, lint_and_recompile)
        return graph_module

    @property
    def reports(self) -> tuple[Report, ...]:
        """What each step did in the last call."""
        return tuple(step.report for step in self._steps)

    @property
    def report(self) -> Report:
        """The sites of all steps together."""
        applied = tuple(site for report in self.reports for site in report.applied)
        return Report(repr(self), applied, tuple(refusal for report in self.reports for refusal in report.refused))

    def transformed(self, node: Node) -> bool:
        """Whether the node is the work of one of the steps."""
        return any(step.transformed(node) for step in self._steps)


class ReversibleRecipe(Recipe, ReversibleTransformation):
    """A recipe all of whose steps can be undone."""

    def __call__(
        self, graph_module: GraphModule, lint_and_recompile: bool = True, reverse: bool = False
    ) -> GraphModule:
        """Apply every step, or with `reverse=True` undo each, last to first."""
        if not reverse:
            return Recipe.__call__(self, graph_module, lint_and_recompile)
        return self.reverse(graph_module if self._inplace else graphs.fork(graph_module))

    def reverse(self, graph_module: GraphModule) -> GraphModule:
        """Undo every step, last to first; if one cannot be undone, the graph is as it was."""
        with unchanged_on_error(graph_module):
            for step in reversed(self._steps):
                if isinstance(step, ReversibleTransformation):
                    graph_module = step(graph_module, reverse=True)
        return graph_module


def compose(*transformations: Transformation, inplace: bool = True, title: str = "") -> Recipe:
    """One transformation out of several, applied first to last; reversible if all of them are. `title` is its name."""
    steps = tuple(step for item in transformations for step in (item.steps if isinstance(item, Recipe) else (item,)))
    reversible = all(isinstance(step, ReversibleTransformation) for step in steps)
    return (ReversibleRecipe if reversible else Recipe)(steps, inplace, title)


Presets = Mapping[str, tuple[type[Transformation], ...]]


def parse_recipe(
    text: str, registry: tuple[type[Transformation], ...], presets: Presets = MappingProxyType({})
) -> Recipe:
    """The recipe that a text such as `RemoveDropout+MergeLinears()` names; `repr` of a recipe reads back.

    A preset's name stands for its steps, alone or among others; what has to be last in it stands at the end of all,
    unless the text has its own there. Raises UsageError for a name that is not in the registry (with the nearest ones)
    and for what is not a recipe.
    """
    try:
        terms = _terms(ast.parse(text.strip(), mode="eval").body)
        calls = [
            (term.func, term.keywords, term.args) if isinstance(term, ast.Call) else (term, [], []) for term in terms
        ]
        parsed = [
            (_name(func), {str(k.arg): ast.literal_eval(k.value) for k in keywords}) for func, keywords, _ in calls
        ]
        if any(positional for _, _, positional in calls):
            raise ValueError(text)
    except (SyntaxError, ValueError):
        raise UsageError(
            f"{text!r} is not a recipe; write names joined by +, such as RemoveDropout+MergeLinears."
        ) from None
    steps, last = list[Transformation](), list[Transformation]()
    for name, arguments in parsed:
        if name not in presets:
            steps.append(_make(name, arguments, registry, presets))
            continue
        steps += [kind() for kind in presets[name] if not kind.is_last]
        last = [kind() for kind in presets[name] if kind.is_last] or last
    steps += last if not steps or not steps[-1].is_last else []
    # Named as it was written, so that two that differ in an argument have two names.
    return compose(*steps, title="+".join(ast.unparse(term).removesuffix("()") for term in terms))


def _terms(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return [*_terms(tree.left), *_terms(tree.right)]
    return [tree]


def _name(tree: ast.expr) -> str:
    if not isinstance(tree, ast.Name):
        raise ValueError("not a name")
    return tree.id


def _make(
    name: str, arguments: dict[str, Any], registry: tuple[type[Transformation], ...], presets: Presets
) -> Transformation:
    known = {kind.__name__: kind for kind in registry}
    if name not in known:
        lower = {each.lower(): each for each in (*known, *presets)}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join((*known, *presets))}."
        raise UsageError(f"There is no transformation {name!r}; {hint}")
    try:
        return known[name](**arguments)
    except TypeError:
        raise UsageError(f"{name} does not take the arguments {', '.join(arguments)}.") from None
