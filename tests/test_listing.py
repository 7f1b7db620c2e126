"""Graphs as Python, and the differences that recipes make; snapshots of both in `tests/snapshots/`.

Where a listing is meant to change, `RENEW_SNAPSHOTS=1 .venv/bin/python -m pytest tests/test_listing.py` writes them
anew; read their diff before you commit it.
"""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import tiny
from torch import fx, nn

from bert_evaluation import capture, compose
from bert_evaluation import graph as graphs
from bert_evaluation.cli.diff import diff
from bert_evaluation.errors import UsageError
from bert_evaluation.listing import listing, step_diffs
from bert_evaluation.promise import Bitwise, Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations import (
    ORIGINAL,
    DeepCopy,
    FuseBiasInLinear,
    LintAndRecompile,
    MergeLinears,
    RemoveDropout,
)

SNAPSHOTS = Path(__file__).with_name("snapshots")
aten = torch.ops.aten


@pytest.fixture(scope="module")
def small():
    return capture(tiny("bert", num_hidden_layers=1))


def nodes_of(graph):
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def changed(text, sign):
    """The lines that a diff removes or adds, without the sign."""
    return [line[1:] for line in text.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)]


@pytest.mark.parametrize("kind", [None, MergeLinears, RemoveDropout, FuseBiasInLinear])
def test_snapshots(small, kind):
    graph = graphs.fork(small)
    text = listing(kind()(graph) if kind else graph)
    file = SNAPSHOTS / f"bert{f'-{kind.__name__}' if kind else ''}.txt"
    if os.environ.get("RENEW_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "see the top of this file for how to renew snapshots"


def test_every_node_has_a_line_under_its_layer(family):
    _, graph = family
    text = listing(graph)
    ast.parse(text)
    for node in nodes_of(graph):
        if node.users:
            assert f"\n    {node.name} = " in text
        if node.meta["nn_module_stack"] and graphs.layer(node) and "metadata_hook" not in graphs.layer(node):
            assert f"    # {graphs.layer(node)}: " in text
    for name in graphs.read_names(graph):
        assert re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"self.{name}  # ") in text
    assert "hook" not in text
    assert "pin_memory" not in text
    assert not re.search(r"\bs\d+\b", text)
    assert "batch" in text
    assert "length" in text


def test_what_a_line_says(small):
    lines = listing(small).splitlines()
    place = lines.index("    # bert.encoder.layer.0.attention.self.query: Linear")
    assert lines[place + 1 : place + 4] == [
        "    weight = self.bert.encoder.layer[0].attention.self.query.weight  # float32[32, 32]",
        "    bias = self.bert.encoder.layer[0].attention.self.query.bias  # float32[32]",
        "    linear = aten.linear(dropout, weight, bias)  # float32[batch, length, 32]",
    ]
    assert "    input_ids,  # int64[batch, length]" in lines


def test_the_same_in_another_process(bert_graph):
    code = "from families import tiny; from bert_evaluation import capture; from bert_evaluation.listing import listing"
    code += "; print(listing(capture(tiny('bert'))), end='')"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, env=environment, encoding="utf-8")
    # Whether torch finds the mask's batch equal to that of the ids was not the same in one process of some thirty.
    found, here = (text.replace("batch_2", "batch") for text in (done.stdout, listing(bert_graph)))
    assert found == here


def test_a_diff_is_there_where_the_graph_changed_and_reverse_takes_it_back(family):
    _, base = family
    text = listing(base)
    for kind in ORIGINAL:
        (step,) = step_diffs(base, kind())
        assert listing(base) == step.before == text
        assert step.transformation == step.report.transformation == repr(kind())
        assert bool(step.diff) == bool(step.report.applied) == (step.after != text)
        assert (f"by {kind.__name__}\n" in step.after) == bool(step.report.applied)
        ast.parse(step.after)
        transformation, graph = kind(), graphs.fork(base)
        assert listing(transformation(graph)) == step.after
        assert listing(transformation(graph, reverse=True)) == text


def test_lint_and_copy_change_nothing(bert_graph):
    steps = step_diffs(bert_graph, compose(LintAndRecompile(), DeepCopy()))
    assert [(step.transformation, step.diff) for step in steps] == [("LintAndRecompile()", ""), ("DeepCopy()", "")]


def test_the_diff_of_dropout_concerns_dropout(family):
    """What goes is a dropout or reads one; what comes computes what went."""
    _, graph = family
    gone = [node.name for node in graphs.calls(graph, aten.dropout.default)]
    sources = {node.args[0].name for node in graphs.calls(graph, aten.dropout.default)}
    (step,) = step_diffs(graph, RemoveDropout(), context=0)
    statement = re.compile(r"    (\w+) = (?!self\b)")
    removed = [line for line in changed(step.diff, "-") if statement.match(line)]
    added = [line for line in changed(step.diff, "+") if statement.match(line)]
    for line in removed:
        assert statement.match(line)[1] in sources or re.search(rf"\b({'|'.join(gone)})\b", line), line
    names = [statement.match(line)[1] for line in removed]
    assert {statement.match(line)[1] for line in added} == set(names) - set(gone)


class DoubleNegation(ReversibleTransformation):
    """Puts two negations behind every GELU."""

    promise = Bitwise()

    def sites(self, graph):
        return [Site(node) for node in graphs.calls(graph, aten.gelu.default)]

    def rewrite(self, graph, site):
        with graph.graph.inserting_after(site.node):
            first = graph.graph.call_function(aten.neg.default, (site.node,))
        with graph.graph.inserting_after(first):
            second = graph.graph.call_function(aten.neg.default, (first,))
        site.node.replace_all_uses_with(second, delete_user_cb=lambda user: user is not first)


def test_a_local_rewrite_has_a_local_diff(bert_graph):
    (step,) = step_diffs(bert_graph, DoubleNegation())
    assert len(step.report.applied) == 2
    assert len(changed(step.diff, "-")) == 2
    assert len(changed(step.diff, "+")) == 6
    heads = [line for line in step.diff.splitlines() if line.startswith("@@")]
    assert len(heads) == 2
    assert heads[0].endswith("@@ bert.encoder.layer.0.intermediate.intermediate_act_fn: GELUActivation")


def test_several_steps_are_named_and_build_on_each_other(bert_graph):
    steps = step_diffs(bert_graph, compose(RemoveDropout(), MergeLinears()))
    assert steps[0].after == steps[1].before
    assert steps[1].diff.startswith("--- before\n+++ after MergeLinears()\n@@")
    assert "by RemoveDropout\n" in steps[1].after
    assert "3 × float32[batch, length, 32]; by MergeLinears\n" in steps[1].after


class Odd(nn.Module):
    """What encoders do not have: parameters of the model itself, several read by one node, branches."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        self.weight = nn.Parameter(torch.ones(1, 4))

    def forward(self, x, weight):
        both = torch.cat([self.parts["one"].weight, self.parts["two"].weight, self.weight])
        y = torch.cond(weight.sum() > 0, lambda z: z.sin() * self.weight, lambda z: z.cos(), (x,))
        return y.clamp(max=float("inf")) @ both.t(), self.weight, x[:, 1::2, None]


def test_odd_graphs():
    graph = capture(Odd(), {"x": torch.randn(2, 4), "weight": torch.randn(3)})
    text = listing(graph)
    ast.parse(text)
    assert "    weight,  # float32[batch_2]\n" in text
    assert "    weight_2 = self.parts.one.weight  # float32[4, 4]" in text
    assert "    weight_3 = self.parts.two.weight  # float32[4, 4]" in text
    assert "    weight_4 = self.weight  # float32[1, 4]" in text
    assert "aten.cat([weight_2, weight_3, weight_4])" in text
    assert "    def true_graph_0(\n        self,\n" in text
    assert "float('inf')" in text
    assert "return (" in text


def test_graphs_of_symbolic_trace():
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2))

        def forward(self, x):
            return self.layers(x).relu().add_(1)[..., 0]

    text = listing(fx.symbolic_trace(Traced()))
    ast.parse(text)
    assert "    layers_0 = self.layers[0](x)\n" in text
    assert "    relu = layers_0.relu()\n" in text
    assert "[(Ellipsis, 0)]" in text


def test_fast_enough(base):
    start = time.perf_counter()
    text = listing(base)
    assert time.perf_counter() - start < 0.5
    assert text.count("\n\n    # bert.encoder.layer.") == 6


class Refuses(ReversibleTransformation):
    """Finds every softmax-like site and takes none."""

    promise = Reassociates()

    def sites(self, graph):
        return [Site(node) for node in graphs.calls(graph, aten.gelu.default)]

    def why_not(self, site):
        return f"{site.node.name} stays."


@pytest.fixture
def shown(bert, bert_graph, capsys, monkeypatch):
    """What the command prints of a tiny model, with these variables set."""
    monkeypatch.setattr("bert_evaluation.checkpoints.load", lambda name: (bert, None))
    monkeypatch.setattr("bert_evaluation.capturing.capture", lambda model: bert_graph)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(variables=(), **options):
        for name in variables:
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        diff(**options)
        return capsys.readouterr().out

    return run


def test_the_command_shows_sites_and_diffs(shown, bert_graph):
    text = shown(recipe=["LintAndRecompile+MergeLinears", "RemoveDropout"])
    assert "\x1b" not in text
    assert text.startswith("Base+LintAndRecompile+MergeLinears\n")
    assert "\nLintAndRecompile() found no sites: the graph stays the same.\n" in text
    assert "\nMergeLinears(): 2 of 2 sites\n  applied bert.encoder.layer.0.attention.self.query (linear)\n" in text
    for kind in (MergeLinears, RemoveDropout):
        assert step_diffs(bert_graph, kind())[0].diff in text
    assert "def forward" not in text


def test_the_command_shows_refusals(shown, monkeypatch):
    monkeypatch.setattr("bert_evaluation.transformations.REGISTRY", (Refuses,))
    text = shown(recipe=["Refuses"])
    assert "Refuses(): 0 of 2 sites; the graph stays the same\n" in text
    assert "  refused bert.encoder.layer.0.intermediate.intermediate_act_fn (gelu): gelu stays.\n" in text
    assert "@@" not in text


def test_the_command_shows_all_original_recipes_in_full(shown, bert_graph):
    text = shown(full=True, context=0)
    assert listing(bert_graph) in text
    assert text.count("def forward(") == 7
    assert text.count(", the whole graph\n") == 7


def test_colour_on_a_terminal_only_and_never_with_no_color(shown):
    plain = shown(recipe=["MergeLinears"], full=True)
    coloured = shown(["FORCE_COLOR"], recipe=["MergeLinears"], full=True)
    assert "\x1b[32m+    weight" in coloured
    assert "\x1b[31m-    weight" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert shown(["FORCE_COLOR", "NO_COLOR"], recipe=["MergeLinears"], full=True) == plain


@pytest.mark.parametrize(
    ("options", "part"),
    [({"context": -1}, "-1 lines of context"), ({"recipe": ["MergeLinear"]}, "did you mean MergeLinears")],
)
def test_bad_requests(options, part):
    with pytest.raises(UsageError, match=part):
        diff(**options)
