"""Linears in a row as one operator: where there are such, and that it computes the same to the bit."""

import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny
from promises import applied_and_kept, undone
from torch import nn

from bert_evaluation import capture, compose, hashes, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation
from bert_evaluation.transformations import (
    CastToBFloat16,
    ChainLinears,
    FuseLinearActivation,
    FuseResidual,
    FuseSkipLayerNorm,
    MergeLinears,
    QuantizeLinears,
    RemoveDropout,
    RemovePadding,
    TileLinears,
)
from bert_evaluation.verification import in_double, observe

CPU = torch.device("cpu")
# Sites applied of found, and how many linears each chain has: of two layers those behind attention, and the answer's.
SITES = dict.fromkeys(FAMILIES, (5, 6, [3, 4])) | {
    "electra": (5, 7, [3, 4]),
    "albert": (5, 7, [3, 4]),
    "modernbert": (2, 2, [3]),  # its layers multiply half of what a linear makes with the other half: at the end only
    "mobilebert": (8, 8, [2] * 8),  # what it normalises is no LayerNorm
}
# In lower types the answer's linear stands behind a cast.
LOWER = dict.fromkeys(FAMILIES, (4, 5, [3, 3])) | {
    "albert": (4, 6, [3, 3]),
    "modernbert": (1, 1, [2]),
    "mobilebert": SITES["mobilebert"],
}


def tiled(*first):
    """The steps in front of chains, behind these."""
    end = (FuseLinearActivation(anyway=True), FuseResidual(), FuseSkipLayerNorm())
    return compose(RemoveDropout(), MergeLinears(), *first, TileLinears(anyway=True), *end)


FIRST = {
    "float32": (),
    "bfloat16": (CastToBFloat16(anyway=True),),
    "int8": (QuantizeLinears(anyway=True), CastToBFloat16(anyway=True)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


def chains(graph):
    """How many linears each chain of a graph has."""
    return [len(node.args[2]) for node in graphs.calls(graph, kernels.LINEARS)]


@torch.inference_mode()
def run(graph, inputs):
    return torch.stack(graphs.output_tensors(graph(**inputs)), dim=-1)


@pytest.mark.parametrize("kind", FIRST)
def test_every_family(subject, kind):
    family, model, captured = subject
    base = tiled(*FIRST[kind])(graphs.fork(captured))
    step = ChainLinears()
    graph = applied_and_kept(step, base, observe(base))  # Bitwise: equal to that graph on every probe
    expected = (LOWER if FIRST[kind] else SITES)[family]
    assert (len(step.report.applied), step.report.found, chains(graph)) == expected
    for batch, length in ((1, 1), (3, 31), (1, 512)):
        inputs = text_inputs(model, batch, length)
        assert torch.equal(run(graph, inputs), run(base, inputs))
    undone(step, graph, base)


def test_padding_and_rows_that_are_masked_in_full(bert, bert_graph):
    base = tiled()(graphs.fork(bert_graph))
    graph = ChainLinears()(graphs.fork(base))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 9, [0, 1] * 4 + [0]])
    inputs = text_inputs(bert, *mask.shape) | {"attention_mask": mask}
    assert torch.equal(run(graph, inputs), run(base, inputs))
    # Padding is left out of a chain as of its linears.
    packed = RemovePadding()(graphs.fork(graph))
    assert any(node.name.startswith("places") for node in packed.graph.nodes)
    here = mask.bool()
    assert torch.allclose(run(packed, inputs)[here], run(graph, inputs)[here], atol=1e-5)


def test_the_float64_run(bert, bert_graph):
    base = tiled()(graphs.fork(bert_graph))
    graph, inputs = ChainLinears()(graphs.fork(base)), text_inputs(bert, 2, 9)
    exact = run(in_double(graph), inputs)
    assert exact.dtype is torch.float64
    assert torch.equal(exact, run(in_double(base), inputs))


WITHOUT_AMX = """
import sys, torch
from bert_evaluation import graph as graphs
from bert_evaluation import kernels
from bert_evaluation.capturing import read
graph = read(sys.argv[1])
(first, *_) = graphs.calls(graph, kernels.LINEARS)
assert {graphs.get_tensor(graph, str(each.target)).dtype for each in first.args[1] if each} == {torch.float32}
assert not any("scales" in name for name in graphs.read_names(graph))
with torch.inference_mode():
    torch.save(torch.stack(graphs.output_tensors(graph(**torch.load(sys.argv[2]))), dim=-1), sys.argv[3])
"""


def test_saved_and_read(bert, bert_graph, tmp_path):
    graph, inputs = ChainLinears()(tiled()(graphs.fork(bert_graph))), text_inputs(bert, 2, 9)
    save(graph, tmp_path / "graph.pt2")
    found = read(tmp_path / "graph.pt2")
    assert chains(found) == chains(graph)
    assert torch.equal(run(found, inputs), run(graph, inputs))
    # Without AMX, slices are numbers of float32 again.
    arguments = [tmp_path / name for name in ("graph.pt2", "inputs.pt", "found.pt")]
    torch.save(inputs, arguments[1])
    variables = os.environ | {"BERT_EVALUATION_AMX": "0"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_AMX, *arguments], check=True, env=variables)
    assert torch.allclose(torch.load(arguments[2]), run(graph, inputs), atol=1e-5)


class Odd(nn.Module):
    """Linears in a row as encoders do not write them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, r):
        y = self.one(x)
        match self.kind:
            case "of itself":
                return self.two(y) + y
            case "returned":
                return self.two(y), y
            case "two readers":
                return self.two(y) + self.three(y)
            case "two from outside":
                return self.three(self.two(y + x) + r)
            case "in place":
                z = y.relu()
                r.add_(1)
                return self.two(z)
            case "added twice":
                return self.three(self.two(y + r) + r)


def odd(kind):
    x = torch.randn(5, 8)
    graph = capture(Odd(kind).eval(), {"x": x, "r": x + 1})
    steps = (TileLinears(anyway=True), FuseLinearActivation(anyway=True), FuseResidual())
    return x, compose(*steps)(graph)


@pytest.mark.parametrize(
    ("kind", "lengths", "said"),
    [
        ("of itself", [2], None),
        ("added twice", [3], None),
        ("returned", [], "is also read by output."),
        ("two readers", [], "is also read by linear_default"),
        ("two from outside", [2], "add different tensors, neither of which is made in between."),
        ("in place", [], "writes in place between them."),
    ],
)
def test_what_is_no_chain(kind, lengths, said):
    x, base = odd(kind)
    step = ChainLinears()
    graph = step(graphs.fork(base))
    assert chains(graph) == lengths
    assert [said in refusal.reason for refusal in step.report.refused] == ([True] if said else [])
    found, expected = (graphs.output_tensors(each(x, x + 1)) for each in (graph, base))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    undone(step, graph, base)


def test_weights_of_two_kinds_are_no_chain():
    base = capture(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), {"input": torch.randn(3, 8)})
    graph = compose(QuantizeLinears(anyway=True, keep=("0",)), TileLinears(anyway=True))(base)
    step = ChainLinears()
    before = hashes.graph_hash(graph)
    step(graph)
    assert [each.reason.endswith("are of different kinds.") for each in step.report.refused] == [True]
    assert hashes.graph_hash(graph) == before


def test_plain_linears_are_no_sites(bert_graph):
    step = ChainLinears()
    step(graphs.fork(bert_graph))
    assert step.report.found == 0
    assert step.promise == Bitwise()
    assert isinstance(step, ReversibleTransformation)
