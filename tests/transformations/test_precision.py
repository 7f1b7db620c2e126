"""Linears and attention in bfloat16: on every family, with few casts, undone exactly, and how far results move."""

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose, evaluate, onednn, verify
from bert_evaluation import graph as graphs
from bert_evaluation.builtin import QUESTIONS
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.squad import read_squad
from bert_evaluation.transformation import Approximates, promise_of
from bert_evaluation.transformations import (
    REGISTRY,
    CastToBFloat16,
    FuseLinearActivation,
    FuseResidual,
    MergeLinears,
    PackLinears,
    RemoveDropout,
    parse_recipe,
)
from bert_evaluation.verification import check, observe

aten = torch.ops.aten
UNIT = 2.0**-8  # what rounding to bfloat16 may change, relatively

# Sites applied of found, of tiny models with two layers, and casts: one where the encoder begins, one where it ends.
SITES = dict.fromkeys(FAMILIES, (14, 15)) | {
    "electra": (14, 16),
    "albert": (15, 16),
    "mpnet": (12, 13),  # attention that is written out is no site
    "deberta-v2": (16, 17),
    "modernbert": (11, 12),
    "mobilebert": (32, 34),
}
CASTS = dict.fromkeys(FAMILIES, 2) | {
    "mpnet": 10,  # query, key, value and what attention returns, in each layer
    "deberta-v2": 18,  # and those of positions
    "modernbert": 10,  # query and key are turned in float32
    "mobilebert": 30,  # scales and shifts, in place of LayerNorms, in float32
}


@pytest.fixture
def able(monkeypatch):
    """A processor that has bfloat16, as far as we ask it: its kernels are still missing where this one has none."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.fixture
def unable(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def dtype(node):
    return node.meta["val"].dtype


def casts(graph, to=None):
    """The casts between float32 and bfloat16, which these models have none of themselves."""
    pair = {torch.float32, torch.bfloat16}
    nodes = [node for node in graphs.calls(graph, aten.to.dtype) if {dtype(node), dtype(node.args[0])} == pair]
    return [node for node in nodes if to in (None, dtype(node))]


def linears(graph):
    return [node for node in graph.graph.nodes if onednn.is_linear(node)]


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


def test_every_family(subject, able):
    family, model, base = subject
    before, hash_before, constants = dict(base.named_parameters()), graphs.graph_hash(base), graphs.constants_hash(base)
    cast = CastToBFloat16()
    graph = cast(graphs.fork(base))

    assert (len(cast.report.applied), cast.report.found) == SITES[family]
    assert all("keep list" in refusal.reason for refusal in cast.report.refused)
    assert len(casts(graph)) == CASTS[family]
    assert isinstance(promise_of(graph), Approximates)
    assert cast.get_transformed_nodes(graph)
    assert sum(dtype(linear) is torch.float32 for linear in linears(graph)) == len(cast.report.refused)

    # No cast undoes another, none is made twice, and none is there that others could do without.
    for each in casts(graph):
        assert each.args[0] not in casts(graph)
        assert sum(user in casts(graph) for user in each.args[0].users) == 1
    for node in graphs.calls(graph, aten.view.default, aten.layer_norm.default, aten.gelu.default, aten.add.Tensor):
        assert not all(
            source in casts(graph, torch.float32)
            for source in node.all_input_nodes[:1]
            + [each for each in node.all_input_nodes[1:] if each.op != "get_attr"]
        )

    # Sizes are dynamic still, and the results near.
    for batch, length in ((1, 1), (1, 2), (3, 31)):
        inputs = text_inputs(model, batch, length)
        with torch.inference_mode():
            found, expected = graph(**inputs)["end_logits"], base(**inputs)["end_logits"]
        assert found.dtype is torch.float32
        assert (found - expected).abs().max() <= 4 * UNIT  # what layers pass on is about 1 in size
        assert not torch.equal(found, expected)

    back = cast(graph, reverse=True)
    assert graphs.graph_hash(back) == hash_before
    assert graphs.constants_hash(back) == constants
    restored = dict(back.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies


def test_the_keep_list(bert_graph, able):
    def applied(*keep):
        cast = CastToBFloat16(keep=keep)
        graph = cast(graphs.fork(bert_graph))
        return len(cast.report.applied), len(casts(graph)), graph

    assert applied()[:2] == (15, 2)  # the logits are cast back, not what they are computed of
    assert applied("logits")[:2] == (14, 2)
    assert applied("layer.1", "logits")[:2] == (7, 2)
    assert applied("scaled_dot_product_attention", "logits")[:2] == (12, 2 * 4 + 2)
    count, number, graph = applied("LayerNorm", "logits")
    assert (count, number) == (14, 4 + 4)
    assert all(dtype(norm) is torch.float32 for norm in graphs.calls(graph, aten.layer_norm.default))
    assert CastToBFloat16(keep="logits").keep == ("logits",)


def test_a_number_in_a_path_is_not_the_start_of_another(able):
    graph = capture(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), {"input": torch.randn(3, 4)})
    cast = CastToBFloat16(keep=["1"])
    cast(graph)
    assert [refusal.site.split()[0] for refusal in cast.report.refused] == ["1"]


def test_a_processor_without_is_refused_unless_anyway(bert_graph, unable):
    cast = CastToBFloat16()
    before = graphs.graph_hash(bert_graph)
    graph = cast(graphs.fork(bert_graph))
    assert not cast.report.applied
    assert graphs.graph_hash(graph) == before
    reasons = {refusal.reason for refusal in cast.report.refused}
    assert any("nothing in bfloat16" in reason and "anyway=True" in reason for reason in reasons)
    anyway = CastToBFloat16(anyway=True)
    anyway(graph)
    assert len(anyway.report.applied) == 14


def test_what_is_onednns_is_refused_there_even_so(bert_graph, unable):
    graph = FuseLinearActivation(anyway=True)(graphs.fork(bert_graph))
    cast = CastToBFloat16(anyway=True)
    cast(graph)
    assert len(cast.report.applied) == 12
    assert [refusal.reason for refusal in cast.report.refused[:2]] == [
        "This processor computes nothing in bfloat16 (it has no AVX-512)."
    ] * 2


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.other, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x):
        match self.kind:
            case "its result is written into":
                y = self.one(x)
                y.add_(1)
                return self.other(torch.tanh(self.other(y)))
            case "a computed weight":
                return self.other(F.linear(x, self.one.weight * 2))
            case "a mask that is added":
                q = self.one(x)[None]
                return self.other(F.scaled_dot_product_attention(q, q, q, x @ x.T)[0])
            case "double":
                return self.other(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("its result is written into", "in place."),
        ("a computed weight", "is no stored parameter."),
        ("a mask that is added", "is added to the scores"),
        ("double", "not in float32."),
    ],
)
def test_refuses_what_it_cannot_cast(kind, reason, able):
    made, x = Odd(kind), torch.randn(3, 8)
    if kind == "double":
        made, x = made.double(), x.double()
    graph = capture(made, example_inputs={"x": x})
    cast = CastToBFloat16(keep=())
    cast(graph)
    assert any(refusal.reason.endswith(reason) or reason in refusal.reason for refusal in cast.report.refused)
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), made(x), atol=0.05)


def test_casting_twice_is_once(bert_graph, able):
    graph = CastToBFloat16()(graphs.fork(bert_graph))
    before, again = graphs.graph_hash(graph), CastToBFloat16()
    again(graph)
    assert not again.report.applied
    assert again.report.refused[0].reason == "It is in bfloat16 already."
    assert graphs.graph_hash(graph) == before


def test_shared_weights_are_cast_once(able):
    graph = CastToBFloat16()(capture(tiny("albert")))
    stored = [name for name, tensor in graphs.tensors(graph).items() if tensor.dtype is torch.bfloat16]
    assert len(stored) == len({name.replace("_bfloat16", "") for name in stored}) == 2 * 7


def test_a_gelu_that_is_spelt_out_becomes_one_operator(able):
    class Spelt(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.one(x)
            return self.other(0.5 * y * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * torch.pow(y, 3.0)))))

    module = Spelt()
    graph = CastToBFloat16(keep=())(capture(module, example_inputs={"x": torch.randn(3, 8)}))
    names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert names == [aten.to.dtype, aten.linear.default, aten.gelu.default, aten.linear.default, aten.to.dtype]
    x = torch.randn(50, 8)
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), module(x), atol=8 * UNIT)


def test_fusing_and_casting_in_either_order_is_the_same_in_plain_operators(bert, bert_graph, able, monkeypatch):
    """The order of nodes is tested, on stored weights: whether oneDNN's kernels for them are right is not."""
    monkeypatch.setattr(onednn, "pack", lambda weight: weight)  # which this processor may not be able to
    fused, cast = (
        (RemoveDropout(), MergeLinears(), FuseLinearActivation(anyway=True), FuseResidual(), PackLinears()),
        CastToBFloat16(),
    )
    plain = compose(*fused[:2], cast)(graphs.fork(bert_graph))
    inputs = text_inputs(bert, 3, 11)
    for steps in ((*fused[:2], cast, *fused[2:]), (*fused[:4], cast, fused[4])):
        recipe = compose(*steps)
        graph = recipe(graphs.fork(bert_graph))
        targets = [linear.target for linear in linears(graph)]
        assert (targets.count(onednn.BINARY), targets.count(onednn.POINTWISE)) == (4, 5)
        assert len(casts(graph)) == 2
        assert {dtype(linear) for linear in linears(graph)[:-1]} == {torch.bfloat16}
        with torch.inference_mode():
            found = onednn.expand(graph)(**inputs)["start_logits"]
            assert torch.equal(found, plain(**inputs)["start_logits"])
        back = recipe(graph, reverse=True)
        assert graphs.graph_hash(back) == graphs.graph_hash(bert_graph)


numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1e30, 1e-30])


@settings(deadline=None, max_examples=30)  # each captures a module
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.lists(numbers, min_size=1, max_size=6))
def test_a_linear_errs_by_the_rounding_of_what_it_reads_and_returns(rows, inputs, outputs, values):
    """Each factor may be off by one part in 256, so each product by two, and the result by one more."""
    module = nn.Linear(inputs, outputs)
    graph = CastToBFloat16(keep=(), anyway=True)(capture(module, {"input": torch.randn(2, inputs)}))
    x = torch.tensor(values).repeat(rows * inputs)[: rows * inputs].reshape(rows, inputs)
    with torch.inference_mode():
        found, weight, bias = graph(input=x).double(), module.weight.double(), module.bias.double()
        exact, size = F.linear(x.double(), weight, bias), F.linear(x.double().abs(), weight.abs(), bias.abs())
    sums = 2 * inputs * 2.0**-24  # of additions in float32
    assert bool(((found - exact).abs() <= ((1 + UNIT) ** 3 - 1 + sums) * size + 1e-37).all())


def test_verify_and_the_float64_run(bert, bert_graph):
    graph = CastToBFloat16(anyway=True)(graphs.fork(bert_graph))
    found = verify(bert, graph)
    assert (found.promise, found.verdict) == ("approximates", "kept")
    assert found.max_abs_error > 0
    # In float64 the graph still has the rounded weights, so what follows is held to them.
    precise = graphs.in_double(graph)
    inputs = text_inputs(bert, 2, 9)
    with torch.inference_mode():
        exact = precise(**inputs)["start_logits"]
    assert exact.dtype is torch.float64
    assert check(observe(graph, observe(bert).probes), RemoveDropout()(graphs.fork(graph))).kept


def test_saved_and_read(bert, bert_graph, tmp_path):
    graph = CastToBFloat16(anyway=True)(graphs.fork(bert_graph))
    save(graph, tmp_path / "cast.pt2")
    inputs = text_inputs(bert, 2, 9)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "cast.pt2")(**inputs)["end_logits"], graph(**inputs)["end_logits"])


@pytest.mark.slow
def test_it_keeps_the_built_in_checkpoints_quality(built_in, base):
    tokenizer, questions = built_in[1], read_squad(QUESTIONS)
    cast = CastToBFloat16(anyway=True)(graphs.fork(base))
    expected, found = (evaluate(graph, tokenizer, questions, batch_size=16).scores["f1"] for graph in (base, cast))
    assert found >= 0.999 * expected


def test_its_text_form_reads_back():
    cast = CastToBFloat16(keep=("embeddings", "LayerNorm"), anyway=True)
    assert repr(parse_recipe(repr(cast), REGISTRY)) == repr(cast)
    for keep in ("5", "(5,)"):
        with pytest.raises(UsageError, match="does not take the arguments keep"):
            parse_recipe(f"CastToBFloat16(keep={keep})", REGISTRY)
