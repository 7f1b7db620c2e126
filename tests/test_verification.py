import pytest
import torch
from torch import nn

from bert_evaluation import capture, verify
from bert_evaluation import graph as graphs
from bert_evaluation.errors import UsageError
from bert_evaluation.transformation import Approximates, Bitwise, Reassociates, Site, Transformation
from bert_evaluation.transformations import MergeLinears, RemoveDropout
from bert_evaluation.verification import Probe, default_probes

aten = torch.ops.aten


class Scale(Transformation):
    """Multiplies the weights of the second layer's output by `by`, under a promise that may not hold."""

    def __init__(self, by, kind):
        self.by, self.kind = by, kind.kind
        self._promise = kind()

    @property
    def promise(self):
        return self._promise

    def sites(self, graph):
        return [Site(node) for node in graph.graph.nodes if node.target == "bert.encoder.layer.1.output.dense.weight"]

    def rewrite(self, graph, site):
        name = site.node.target
        graphs.set_tensor(graph, name, nn.Parameter(graphs.get_tensor(graph, name) * self.by))


@pytest.mark.parametrize(
    ("by", "kind", "verdict"),
    [
        (1.01, Reassociates, "broken"),
        (1 + 1e-3, Reassociates, "broken"),
        (1 + 1e-7, Bitwise, "broken"),
        (1 + 1e-7, Reassociates, "kept"),
        (1.0, Bitwise, "kept"),
        (1.5, Approximates, "kept"),
        (float("nan"), Approximates, "broken"),
    ],
)
def test_a_promise_is_held_against_what_it_says(bert, bert_graph, by, kind, verdict):
    graph = Scale(by, kind)(graphs.fork(bert_graph))
    found = verify(bert, graph)
    assert (found.verdict, found.promise) == (verdict, kind.kind)
    assert found.probes == 9
    if verdict == "broken":
        assert found.failing_probe.startswith("batch 1, length ")
        assert found.error > found.tolerance or found.error != found.error
        assert "layer.1.output" in found.first_difference


def test_a_wrong_slice_is_found(bert, bert_graph):
    graph = MergeLinears()(graphs.fork(bert_graph))
    first = next(graphs.calls(graph, aten.split_with_sizes.default))
    pieces = sorted(first.users, key=lambda node: node.args[1])
    pieces[0].args, pieces[1].args = (first, 1), (first, 0)
    graph.recompile()
    found = verify(bert, graph)
    assert not found.kept
    assert "layer.0" in found.first_difference


def test_against_a_graph_as_against_the_model(bert, bert_graph):
    graph = RemoveDropout()(graphs.fork(bert_graph))
    probes = default_probes(bert)
    assert verify(bert_graph, graph, probes).kept
    assert verify(bert, graph, probes[:1]).probes == 1


def test_probes_are_what_breaks_things(family):
    model, _ = family
    probes = {probe.name: probe.inputs for probe in default_probes(model)}
    shapes = {tuple(inputs["input_ids"].shape) for inputs in probes.values()}
    assert {(1, 1), (1, 2), (1, 512)} <= shapes
    assert not probes["a fully masked row"]["attention_mask"][1].any()
    assert probes["padding on the left"]["attention_mask"][0, 0] == 0
    assert probes["padding on the right"]["attention_mask"][0, -1] == 0


def test_other_modules_need_their_graph_for_probes():
    module = nn.Linear(3, 3)
    graph = capture(module, {"input": torch.randn(2, 3)})
    assert verify(module, graph).kept
    with pytest.raises(UsageError, match="give probes"):
        default_probes(module)
    with pytest.raises(UsageError, match="at least one probe"):
        verify(module, graph, [])


def test_shapes_and_what_is_not_finite_are_compared():
    module = nn.ReLU()
    graph = capture(module, {"input": torch.randn(2, 3)})
    x = torch.tensor([[float("nan"), float("inf"), -1.0]])
    assert verify(module, graph, [Probe("odd", {"input": x})]).max_abs_error == 0
