"""FoldConstants and EliminateCommonSubexpressions: where they act, where they must not, and that every bit stays."""

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

from bert_evaluation import capture, compose, hashes, verify
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import dynamic_dimensions, read, save, text_inputs
from bert_evaluation.probes import Probe
from bert_evaluation.transformation import history
from bert_evaluation.transformations import EliminateCommonSubexpressions, FoldConstants, MergeLinears
from bert_evaluation.verification import check, observe

# Sites applied and refused in tiny models with two layers.
FOLDED = dict.fromkeys(FAMILIES, 0) | {
    "roberta": 1,  # a type of token that is said to be what it is
    "camembert": 1,
    "xlm-roberta": 1,
    "mpnet": 1,  # a zero
    "deberta-v2": 12,  # scales, and what relative positions are projected to
    "modernbert": 2,  # the frequencies of its rotations
}
MERGED = dict.fromkeys(FAMILIES, 4) | {"mpnet": 5, "deberta-v2": 19, "modernbert": 35, "mobilebert": 5}
COUNTS = {FoldConstants: FOLDED, EliminateCommonSubexpressions: MERGED}
# As transformers 5.17 writes it: the frequencies are mere views, and one more call is made twice.
EARLIER = {(FoldConstants, "modernbert"): (0, 2), (EliminateCommonSubexpressions, "modernbert"): (36, 0)}
BOTH = tuple(COUNTS)


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model), observe(model)


def bits(graph):
    return hashes.graph_hash(graph), hashes.constants_hash(graph), sorted(graphs.tensors(graph))


def run(graph, inputs):
    with torch.inference_mode():
        return graphs.output_tensors(graph(**inputs))


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", BOTH)
def test_fires_keeps_every_bit_and_is_undone_exactly(subject, kind):
    family, model, base, reference = subject
    transformation, graph = kind(), graphs.fork(base)
    before, of_model = bits(base), hashes.weights_hash(model)

    transformation(graph)

    report = transformation.report
    counts = (COUNTS[kind][family], 0)
    assert (len(report.applied), len(report.refused)) in (counts, EARLIER.get((kind, family), counts))
    assert bool(transformation.get_transformed_nodes(graph)) == bool(report.applied)
    assert len(graph.graph.nodes) <= len(base.graph.nodes)
    for size in ((1, 1), (1, 2), (3, 31), (2, 500)):
        inputs = text_inputs(model, *size)
        inputs["attention_mask"][-1, size[1] // 2 :] = 0
        assert equal(run(base, inputs), run(graph, inputs)), size
    assert check(reference, graph).kept
    assert dynamic_dimensions(graph) == dynamic_dimensions(base)
    assert bits(base) == before
    assert hashes.weights_hash(model) == of_model

    again = kind()
    again(graphs.fork(graph))
    assert again.report.applied == ()

    transformation(graph, reverse=True)

    assert bits(graph) == before
    assert history(graph) == ()
    assert not transformation.get_transformed_nodes(graph)


def test_saved_and_read(subject, tmp_path):
    _, model, base, _ = subject
    graph = compose(*(kind() for kind in BOTH), inplace=False)(base)
    save(graph, tmp_path / "graph.pt2")
    again = read(tmp_path / "graph.pt2")
    for size in ((1, 1), (3, 31)):
        inputs = text_inputs(model, *size)
        assert equal(run(base, inputs), run(again, inputs))


HASHES = """
from families import tiny
from bert_evaluation import capture, compose
from bert_evaluation import hashes
from bert_evaluation.transformations import EliminateCommonSubexpressions, FoldConstants
for family in ("deberta-v2", "modernbert"):
    print(hashes.graph_hash(compose(FoldConstants(), EliminateCommonSubexpressions())(capture(tiny(family)))))
"""


def test_the_hash_is_the_same_in_another_process():
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", HASHES], capture_output=True, text=True, check=True)
    here = [
        hashes.graph_hash(compose(FoldConstants(), EliminateCommonSubexpressions())(capture(tiny(family))))
        for family in ("deberta-v2", "modernbert")
    ]
    assert found.stdout.split() == here


def test_after_folding_deberta_merges_its_linears():
    """Relative positions are projected with the weights of words; once that is stored, nothing else reads those."""
    model = tiny("deberta-v2")
    base = capture(model)
    merge, before = MergeLinears(), bits(base)
    steps = compose(FoldConstants(), merge)
    graph = steps(graphs.fork(base))
    assert (len(merge.report.applied), merge.report.refused) == (2, ())
    assert verify(model, graph).kept
    assert bits(steps(graph, reverse=True)) == before


class Module(nn.Module):
    """A forward made of a function of the module and its input."""

    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(6, 4))
        self.make = forward

    def forward(self, x):
        return self.make(self, x)


def applied(kind, forward):
    """Transform such a module's graph, check that every bit stays and comes back, and return both."""
    module = Module(forward)
    base = capture(module, {"x": torch.randn(3, 4)})
    transformation, graph = kind(), graphs.fork(base)
    transformation(graph)
    for rows in (1, 2, 7):
        inputs = {"x": torch.randn(rows, 4)}
        torch.manual_seed(1)
        expected = run(base, {"x": inputs["x"].clone()})
        torch.manual_seed(1)
        assert equal(expected, run(graph, {"x": inputs["x"].clone()}))
    undone = graphs.fork(graph)
    transformation(undone, reverse=True)
    assert bits(undone) == bits(base)
    return transformation.report, graph


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        (lambda m, x: x + torch.zeros(4).cos(), ["aten.add.Tensor"]),
        (lambda m, x: x @ (m.weight @ m.weight).relu(), ["aten.matmul.default"]),
        (lambda m, x: x @ m.weight.to(torch.float32), ["aten.matmul.default"]),
        (lambda m, x: x + m.table.sum(0), ["aten.add.Tensor"]),
        (lambda m, x: x + torch.chunk(m.table * 2, 2)[1].sum(0), ["aten.add.Tensor"]),
    ],
)
def test_folds(forward, left):
    report, graph = applied(FoldConstants, forward)
    assert len(report.applied) == 1
    assert targets(graph) == left


def test_what_only_the_folded_part_read_goes_and_comes_back():
    _, graph = applied(FoldConstants, lambda m, x: x @ (m.weight @ m.weight).relu())
    (name,) = graphs.tensors(graph)
    assert "weight" not in name
    assert not graphs.get_tensor(graph, name).requires_grad


def test_what_depends_on_a_size_is_no_constant():
    report, graph = applied(FoldConstants, lambda m, x: x + torch.arange(x.shape[0])[:, None])
    assert report.found == 0
    assert "aten.arange.default" in targets(graph)


def fill(module, x):
    written = torch.zeros(4)
    written.add_(x[0])
    return x + written


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x + torch.rand(4), "rand draws random numbers"),
        (lambda m, x: (x + 1, m.table * 2), "is an output of the graph"),
        (lambda m, x: (x + 1, (m.table * 2)[0]), "is an output of the graph"),
        (lambda m, x: x + m.table[0], "is a view of table"),
        (lambda m, x: x.sum() + torch.ones(1200, 1200) * 2, "would take 5.5 MiB"),
        (fill, "add_ writes into zeros"),
        (lambda m, x: x + torch.empty(4) * 0 * 0, "empty does more than"),
    ],
)
def test_refuses_to_fold(forward, reason):
    module = Module(forward)
    graph = capture(module, {"x": torch.randn(3, 4)})
    before, transformation = bits(graph), FoldConstants()
    transformation(graph)
    assert transformation.report.applied == ()
    assert any(reason in refusal.reason for refusal in transformation.report.refused), transformation.report
    assert bits(graph) == before


def test_a_result_is_stored_with_the_strides_that_it_had():
    _, graph = applied(FoldConstants, lambda m, x: x @ (m.table.T * 2))
    (tensor,) = graphs.tensors(graph).values()
    assert tensor.stride() == (1, 4)


def twice(module, x):
    return (x * 2).exp() + (x * 2).exp().sum()


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (twice, 2),
        (lambda m, x: (x @ m.weight).exp() + x @ m.weight, 1),
        (lambda m, x: x + torch.arange(x.shape[0])[:, None] - torch.arange(x.shape[0]).sum(), 1),
        (lambda m, x: (x.view(-1), x.view(-1) * 2), 1),
        (lambda m, x: nn.functional.dropout(x, 0.5, False).exp() + nn.functional.dropout(x, 0.5, False), 1),
    ],
)
def test_merges(forward, count):
    report, graph = applied(EliminateCommonSubexpressions, forward)
    assert (len(report.applied), report.refused) == (count, ())
    assert len(targets(graph)) == len(set(targets(graph))) or forward is twice


def test_a_stored_tensor_is_read_by_one_node():
    graph = capture(Module(lambda m, x: x @ m.weight), {"x": torch.randn(3, 4)})
    product = next(graphs.calls(graph, torch.ops.aten.matmul.default))
    with graph.graph.inserting_before(product):
        twin = graph.graph.get_attr("weight")
        twin.meta["val"] = product.args[1].meta["val"]
        other = graph.graph.call_function(torch.ops.aten.add.Tensor, (product.args[1], twin))
    product.args = (product.args[0], other)
    transformation = EliminateCommonSubexpressions()
    transformation(graph)
    assert len(transformation.report.applied) == 1
    assert len([node for node in graph.graph.nodes if node.op == "get_attr"]) == 1


def written_between(module, x):
    y = x + 1
    view = y.view(-1)
    one = view * 2
    y.add_(1)
    return one + view * 2


def written_after(module, x):
    one, two = x * 2, x * 2
    one.add_(1)
    return one + two


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x + torch.rand(4) - torch.rand(4), "two draws are not one"),
        (lambda m, x: nn.functional.dropout(x, 0.5, True) - nn.functional.dropout(x, 0.5, True), "two draws"),
        (lambda m, x: (x * 2, x * 2), "both outputs"),
        (lambda m, x: ((x * 2).view(-1), (x * 2).T), "both outputs"),
        (written_between, "add_ writes in place into what"),
        (written_after, "add_ writes into mul"),
    ],
)
def test_refuses_to_merge(forward, reason):
    report, _ = applied(EliminateCommonSubexpressions, forward)
    assert report.applied == ()
    assert reason in report.refused[0].reason


def test_literals_of_another_type_are_others():
    report, _ = applied(EliminateCommonSubexpressions, lambda m, x: (x.long() + 1) * 2 + (x.long() + 1.0))
    assert report.applied == ("_assert_tensor_metadata_default_1", "to_1")
    assert report.refused == ()


def three(module, x):
    one, two, three = x * 2, x * 2, x * 2
    return one.exp().relu(), two, three, three.exp().sin()


def test_what_reads_nodes_that_stayed_two_stays_two():
    """Merged with the first product, the second is an output; so the third, which is one too, has to stay."""
    report, _ = applied(EliminateCommonSubexpressions, three)
    assert report.applied == ("mul_1",)
    assert "mul and mul_2 are both outputs" in report.refused[0].reason
    assert "exp_1 and exp read nodes that were not merged" in report.refused[1].reason


@pytest.mark.parametrize("kind", BOTH)
def test_verify_catches_a_lie(kind, monkeypatch):
    """The checks above can fail: a rewrite that stores or keeps the wrong node is found."""
    module = Module(lambda m, x: x @ (m.weight * 2) + (x @ (m.weight * 3)) + x @ (m.weight * 2))
    graph = capture(module, {"x": torch.randn(3, 4)})
    if kind is FoldConstants:
        monkeypatch.setattr("bert_evaluation.transformations.constants._call", lambda node, values: torch.ones(4, 4))
    else:
        monkeypatch.setattr(hashes, "description", lambda node, number, graph: f"{node.op} {node.target}")
        monkeypatch.setattr(kind, "why_not", lambda self, site: None)
    kind()(graph)
    assert not verify(module, graph, [Probe("rows", {"x": torch.randn(3, 4)})]).kept
