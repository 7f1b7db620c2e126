"""A graph as readable Python with its provenance, and a recipe as the differences that its steps make there."""

import difflib
import itertools
import keyword
import math
import operator
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.recipe import Recipe
from bert_evaluation.transformation import MARKS, Report, Transformation, history

INDENT = "    "
HEADER = f"{INDENT}# "
DIMENSIONS = ("batch", "length")  # what the dynamic dimensions of an input are called
NO_LAYER = "_empty_nn_module_stack"  # what export calls it where it made a node itself, such as the size of an input
# Said of every tensor that is made, and true of any that is made without a word.
USUAL = {"layout": torch.strided, "pin_memory": False}


def listing(graph: GraphModule) -> str:
    """The graph as a Python function: one assignment a node, its shape as a comment, headed by the layer it is from.

    Nodes keep the names that they have in the graph, and a parameter is read right before each use, into a variable
    called as its last part. So a rewrite changes the lines of what it rewrites, and no others.
    """
    return "\n".join(_Writer(graph).function("forward", graph)) + "\n"


@dataclass(frozen=True)
class StepDiff:
    """What one step of a recipe did: its sites and refusals, the listings, and their unified diff."""

    transformation: str
    report: Report
    before: str
    after: str
    diff: str


def step_diffs(graph: GraphModule, recipe: Transformation, context: int = 3) -> tuple[StepDiff, ...]:
    """What each step of a recipe does, with so many lines around each change. The graph itself stays as it is."""
    graph, found = graphs.fork(graph), list[StepDiff]()
    before = listing(graph)
    for step in recipe.steps if isinstance(recipe, Recipe) else (recipe,):
        graph = step(graph)
        after = listing(graph)
        text = unified_diff(before, after, repr(step), context)
        found.append(StepDiff(repr(step), step.report, before, after, text))
        before = after
    return tuple(found)


def unified_diff(before: str, after: str, name: str, context: int = 3) -> str:
    """The unified diff of two listings, each hunk headed by the layer it begins in; empty if they are the same."""
    old, new = before.splitlines(), after.splitlines()
    lines = difflib.unified_diff(old, new, "before", f"after {name}", n=context, lineterm="")
    return "".join(f"{_headed(line, old, context)}\n" for line in lines)


def _headed(line: str, old: list[str], context: int) -> str:
    if not (hunk := re.match(r"@@ -(\d+)", line)):
        return line
    above = reversed(old[: int(hunk[1]) - 1 + context])
    layer = next((each.removeprefix(HEADER) for each in above if each.startswith(HEADER)), "")
    return f"{line} {layer}".rstrip()


class _Writer:
    """Writes a graph, and those nested in it, with one set of names for dynamic sizes and transformations."""

    def __init__(self, graph: GraphModule) -> None:
        self._sizes = _size_names(graph.graph.find_nodes(op="placeholder"))
        steps = (step.transformation for step in history(graph))
        self._authors = {step.signature: repr(step).removesuffix("()") for step in steps}

    def function(self, name: str, graph: GraphModule) -> Iterator[str]:
        """The lines of the function `name` that computes what the graph does."""
        yield f"def {name}("
        yield f"{INDENT}self,"
        for node in graph.graph.find_nodes(op="placeholder"):
            yield f"{INDENT}{node.name},{self._comment(node)}"
        yield "):"
        taken = {node.name for node in graph.graph.nodes if node.op != "get_attr"}
        header = block = ""
        for node in graph.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op != "output" and header != (header := _provenance(node)):
                if block != (block := _block(header)):
                    yield ""
                yield HEADER + (header or "of no layer")
            names = _local_names(node, taken)
            for read, local in names.items():
                yield from self._read(read, local, graph)
            yield INDENT + _statement(node, names) + self._comment(node)

    def _read(self, node: Node, local: str, graph: GraphModule) -> Iterator[str]:
        """A parameter put into a local variable, or a graph that an operator is given, as a function."""
        path = str(node.target)
        tensor = graphs.get_tensor(graph, path)
        if tensor is None and isinstance(nested := graph.get_submodule(path), GraphModule):
            yield from (INDENT + line if line else "" for line in self.function(local, nested))
        else:
            yield f"{INDENT}{local} = {_attribute(path)}  # {self._described(tensor)}"

    def _comment(self, node: Node) -> str:
        marks = node.meta.get(MARKS, frozenset())
        authors = [author for signature, author in self._authors.items() if signature in marks]
        by = f"by {', '.join(authors)}" if authors else ""
        text = "; ".join(filter(None, (self._described(node.meta.get("val")), by)))
        return f"  # {text}" if text else ""

    def _described(self, value: Any) -> str:
        """Type and shape of a tensor or of several; the size that a symbol stands for."""
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(self._size, value.shape))}]"
        if isinstance(value, (tuple, list)):
            groups = [(text, len(list(group))) for text, group in itertools.groupby(map(self._described, value))]
            return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in groups)
        return self._size(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else ""

    def _size(self, size: Any) -> str:
        return re.sub(r"[A-Za-z]\w*", lambda symbol: self._sizes.get(symbol[0], symbol[0]), str(size))


def _size_names(inputs: Iterable[Node]) -> dict[str, str]:
    """A name for each symbol in the shapes of the inputs, by the dimension where it is seen first."""
    names: dict[str, str] = {}
    for node in inputs:
        for dimension, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if not isinstance(size, int) and (symbol := str(size)) not in names:
                plain = DIMENSIONS[dimension] if dimension < len(DIMENSIONS) else f"size_of_{dimension}"
                names[symbol] = _free(plain, names.values())
    return names


def _free(name: str, taken: Iterable[str]) -> str:
    """The name itself, or with the first number behind it that is free."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in set(taken))


def _local_names(node: Node, taken: set[str]) -> dict[Node, str]:
    """What the parameters that a node reads are called on the lines before it: `weight`, `bias`."""
    names: dict[Node, str] = {}
    for read in node.all_input_nodes:
        if read.op == "get_attr":
            leaf = _identifier(str(read.target).rpartition(".")[2])
            names[read] = _free(leaf, taken.union(names.values()))
    return names


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"_{name}"


def _provenance(node: Node) -> str:
    """The layer that a node is from and its class: `qa_outputs: Linear`, of the model itself the class alone."""
    path, stack = graphs.layer(node), list((node.meta.get("nn_module_stack") or {}).values())
    if path.startswith(NO_LAYER):
        return ""
    kind = stack[-1][1] if stack else ""
    name = (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]
    return ": ".join(filter(None, (path, name)))


def _block(header: str) -> str:
    """The part of the model that makes a paragraph: a numbered layer, or all between two."""
    found = re.match(r"[^:]*?\.\d+(?=[.:@]|$)", header)
    return found[0] if found else ""


def _attribute(path: str) -> str:
    """A dotted name as Python has it: `self.layer[0].weight`."""
    parts = (f"[{part}]" if part.isdecimal() else f".{_identifier(part)}" for part in path.split("."))
    return "self" + "".join(parts)


def _statement(node: Node, names: Mapping[Node, str]) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0], names)}"
    # What nobody reads is there for its effect, such as an assertion.
    return f"{node.name} = {_expression(node, names)}" if node.users else _expression(node, names)


def _expression(node: Node, names: Mapping[Node, str]) -> str:
    args = [_value(argument, names) for argument in node.args]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    while args and args[-1] == "None":
        args.pop()
    for key, argument in node.kwargs.items():
        if argument is not None and argument != USUAL.get(key):
            args.append(f"{key}={_value(argument, names)}")
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    called = _attribute(str(node.target)) if node.op == "call_module" else _operator(node.target)
    return f"{called}({', '.join(args)})"


def _operator(target: Any) -> str:
    """The name that one finds an operator by: `aten.linear`, `aten.add.Tensor`, `operator.mul`."""
    if isinstance(target, (types.FunctionType, types.BuiltinFunctionType)):
        name = f"{target.__module__}.{target.__qualname__}".removeprefix("builtins.").removeprefix("_")
    else:
        name = str(target).removesuffix(".default")
    return ".".join(map(_identifier, name.split(".")))


def _value(value: Any, names: Mapping[Node, str]) -> str:
    """An argument as Python text."""
    if isinstance(value, Node):
        return names.get(value, value.name)
    if isinstance(value, (tuple, list)):
        items = ", ".join(_value(item, names) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_value(item, names)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_value(part, names) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, int) and value == sys.maxsize:  # to the end, in a slice
        return "sys.maxsize"
    plain = value is None or value is ... or isinstance(value, (bool, int, float, complex, str))
    return repr(value if plain else str(value))
