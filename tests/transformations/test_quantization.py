"""Linears on 8-bit integers: the graphs of every family. `tests/test_kernels.py` has the arithmetic itself."""

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose, hashes, kernels, onednn, verify
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.memory import memory
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    REGISTRY,
    CastToBFloat16,
    FuseLinearActivation,
    MergeLinears,
    PackLinears,
    QuantizeLinears,
    RemoveDropout,
    parse_recipe,
)
from bert_evaluation.verification import in_double

# Sites applied of found, of tiny models with two layers.
SITES = dict.fromkeys(FAMILIES, (12, 13)) | {
    "electra": (12, 14),
    "albert": (7, 8),  # its layers share their weights
    "modernbert": (9, 10),
    "mobilebert": (30, 32),
}
LINEARS = dict.fromkeys(FAMILIES, 12) | {"albert": 13, "deberta-v2": 16, "modernbert": 9, "mobilebert": 30}
LARGEST = kernels.reference.LARGEST


@pytest.fixture
def able(monkeypatch):
    """A processor that has kernels, as far as we ask it; without, their equals compute."""
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: None)


@pytest.fixture
def unable(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: "This processor has no VNNI.")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


def test_every_family(subject, unable):
    family, model, base = subject
    before, hash_before, constants = dict(base.named_parameters()), hashes.graph_hash(base), hashes.constants_hash(base)
    quantize = QuantizeLinears(anyway=True)
    graph = quantize(graphs.fork(base))

    assert (len(quantize.report.applied), quantize.report.found) == SITES[family]
    assert all("keep list" in refusal.reason for refusal in quantize.report.refused)
    assert len(list(graphs.calls(graph, kernels.LINEAR))) == LINEARS[family]
    assert isinstance(promise_of(graph), Approximates)
    assert sum(onednn.is_linear(node) for node in graph.graph.nodes) == len(quantize.report.refused)

    for batch, length in ((1, 1), (1, 2), (3, 31)):  # sizes are dynamic still
        inputs = text_inputs(model, batch, length)
        with torch.inference_mode():
            found, expected = graph(**inputs)["end_logits"], base(**inputs)["end_logits"]
        assert found.dtype is torch.float32
        assert (found - expected).abs().max() <= 8 / LARGEST  # what layers pass on is about 1 in size
        assert not torch.equal(found, expected)

    back = quantize(graph, reverse=True)
    assert hashes.graph_hash(back) == hash_before
    assert hashes.constants_hash(back) == constants
    restored = dict(back.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies


def test_an_answer_does_not_depend_on_the_texts_beside_it(bert, bert_graph):
    graph = QuantizeLinears(anyway=True)(graphs.fork(bert_graph))
    inputs = text_inputs(bert, 3, 8)
    alone = {name: tensor[1:2] for name, tensor in inputs.items()}
    with torch.inference_mode():
        assert torch.allclose(graph(**inputs)["end_logits"][1:2], graph(**alone)["end_logits"], atol=1e-5)


rows = st.integers(1, 9)
sizes = st.integers(1, 200)
scale = st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 1e4, 1e30])


@st.composite
def factors(draw):
    """What a linear reads and its weight: random, constant, zero, or with a huge outlier, in rows of any size."""
    tokens, inputs, outputs = draw(rows), draw(sizes), draw(rows)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def made(count):
        numbers = torch.randn(count, inputs, generator=random)
        if draw(st.booleans()):
            numbers[0, draw(st.integers(0, inputs - 1))] = 1000.0
        if draw(st.booleans()):
            numbers[-1] = draw(st.sampled_from([0.0, 1.0, -1.0]))
        return numbers

    return made(tokens) * draw(scale), made(outputs)


@settings(deadline=None, max_examples=30)  # each captures a module
@given(factors(), st.booleans())
def test_a_linear_errs_by_half_a_step_of_each_factor(pair, biased):
    x, weight = pair
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=biased)
    module.weight.data = weight
    graph = QuantizeLinears(keep=(), anyway=True)(capture(module, {"input": torch.randn(2, weight.shape[1])}))
    a, b = x.double(), weight.double()
    s, t = kernels.quantize(x)[1].double(), kernels.quantize(weight)[1].double().T
    # |x'w' - xw| <= |x' - x| |w| + |x| |w' - w| + |x' - x| |w' - w|, for each product.
    bound = s / 2 * b.abs().sum(1) + a.abs().sum(1, keepdim=True) * t / 2 + x.shape[1] * s * t / 4
    bias = module.bias.double() if biased else torch.zeros(weight.shape[0], dtype=torch.float64)
    with torch.inference_mode():
        found, exact = graph(input=x).double(), F.linear(a, b, bias)
    size = a.abs() @ b.abs().T + bias.abs()
    assert bool(((found - exact).abs() <= (1 + 1e-3) * bound + 1e-6 * size + 1e-37).all())


def test_zeros_give_the_bias_and_what_is_not_finite_stays_so():
    module = nn.Linear(8, 3)
    graph = QuantizeLinears(keep=(), anyway=True)(capture(module, {"input": torch.randn(2, 8)}))
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.inf, torch.nan
    with torch.inference_mode():
        found = graph(input=x)
    assert torch.equal(found[0], module.bias)
    assert not found[1:].isfinite().any()


def test_the_weights_of_linears_take_less_than_half_of_the_memory(bert, bert_graph, able):
    inputs = text_inputs(bert, 1, 4)
    others = sum(tensor.nbytes for name, tensor in bert.named_parameters() if "encoder" not in name or tensor.dim() < 2)
    graph = QuantizeLinears()(graphs.fork(bert_graph))
    before, after = (memory(each, inputs).weights - others for each in (bert_graph, graph))
    assert 0 < after < before / 2


def test_a_processor_without_vnni_is_refused_unless_anyway(bert_graph, unable):
    quantize, before = QuantizeLinears(), hashes.graph_hash(bert_graph)
    graph = quantize(graphs.fork(bert_graph))
    assert not quantize.report.applied
    assert hashes.graph_hash(graph) == before
    assert quantize.report.refused[0].reason == (
        "This processor has no VNNI. anyway=True computes it in plain PyTorch, slowly."
    )


def test_the_keep_list(bert_graph):
    quantize = QuantizeLinears(keep=("layer.0", "intermediate"), anyway=True)
    quantize(graphs.fork(bert_graph))
    assert len(quantize.report.applied) == 6
    assert {refusal.reason for refusal in quantize.report.refused} == {
        "The keep list has 'layer.0'.",
        "The keep list has 'intermediate'.",
    }


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.long, self.kind = nn.Linear(8, 8), nn.Linear(kernels.LONGEST + 1, 2), kind

    def forward(self, x):
        match self.kind:
            case "written into":
                x = x * 2
                y = self.one(x)
                x.add_(1)
                return x + y
            case "read by another":
                return self.one(x) * self.one.weight.sum()
            case "computed":
                return F.linear(x, self.one.weight * 2)
            case "long":
                return self.long(x[:, :1].expand(-1, kernels.LONGEST + 1))
            case "double":
                return self.one(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("written into", "in place."),
        ("read by another", "would keep the old copy."),
        ("computed", "is no stored parameter."),
        ("long", "may not fit into 32 bits."),
        ("double", "not float32."),
    ],
)
def test_refuses_what_it_cannot_quantise(kind, reason):
    made, x = Odd(kind), torch.randn(3, 8)
    if kind == "double":
        made, x = made.double(), x.double()
    graph = capture(made, example_inputs={"x": x})
    quantize = QuantizeLinears(keep=(), anyway=True)
    quantize(graph)
    assert not quantize.report.applied
    assert quantize.report.refused[0].reason.endswith(reason)


def test_what_is_fused_or_in_bfloat16_already_is_refused(bert_graph):
    for first, reason in (
        (FuseLinearActivation(anyway=True), "is fused or packed"),
        (PackLinears(), "is fused or packed"),
        (CastToBFloat16(anyway=True), "The weight is torch.bfloat16"),
    ):
        quantize = QuantizeLinears(anyway=True)
        quantize(first(graphs.fork(bert_graph)))
        assert any(reason in refusal.reason for refusal in quantize.report.refused)


def test_other_steps_before_and_behind(bert, bert_graph, monkeypatch):
    monkeypatch.setattr("bert_evaluation.transformations.packing.LEAST_OUTPUTS", 1)  # so that one is packed
    recipe = compose(
        RemoveDropout(), MergeLinears(), QuantizeLinears(anyway=True), CastToBFloat16(anyway=True), PackLinears()
    )
    graph = recipe(graphs.fork(bert_graph))
    assert [len(report.applied) for report in recipe.reports[1:]] == [2, 8, 10, 1]
    assert verify(bert, graph).kept
    assert hashes.graph_hash(recipe(graph, reverse=True)) == hashes.graph_hash(bert_graph)


def test_verify_saving_and_the_float64_run(bert, bert_graph, tmp_path):
    graph = QuantizeLinears(anyway=True)(graphs.fork(bert_graph))
    found = verify(bert, graph)
    assert (found.promise, found.verdict) == ("approximates", "kept")
    assert found.max_abs_error > 0
    inputs = text_inputs(bert, 2, 9)
    save(graph, tmp_path / "int8.pt2")
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "int8.pt2")(**inputs)["end_logits"], graph(**inputs)["end_logits"])
        assert in_double(graph)(**inputs)["end_logits"].dtype is torch.float64


def test_its_text_form_reads_back():
    quantize = QuantizeLinears(keep="logits", anyway=True)
    assert repr(parse_recipe(repr(quantize), REGISTRY)) == repr(quantize)
