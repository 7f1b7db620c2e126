"""Linears that do more at once, and packed weights: on every family, on every way to write an activation."""

import copy

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose, hashes, onednn
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.transformations import (
    FuseLinearActivation,
    FuseResidual,
    MergeLinears,
    PackLinears,
    RemoveDropout,
)
from bert_evaluation.verification import check, observe

# Sites applied of found, of tiny models with two layers, once dropout is gone.
ACTIVATED = dict.fromkeys(FAMILIES, (2, 2)) | {
    "modernbert": (1, 3),  # those of its layers read one half of a linear
    "mobilebert": (8, 8),
}
RESIDUALS = dict.fromkeys(FAMILIES, (4, 4)) | {"mobilebert": (12, 13)}
PACKED = dict.fromkeys(FAMILIES, (8, 9)) | {  # but for the one that makes the outputs
    "electra": (9, 10),
    "albert": (5, 6),  # its layers share their weights
    "deberta-v2": (12, 13),
    "modernbert": (9, 10),
    "mobilebert": (25, 26),
}


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model), observe(model)


def counts(report):
    return len(report.applied), report.found


def test_every_family(subject):
    family, model, base, reference = subject
    hash_before, constants = hashes.graph_hash(base), hashes.constants_hash(base)
    steps = (RemoveDropout(), MergeLinears(), FuseLinearActivation(anyway=True), FuseResidual(), PackLinears())
    recipe = compose(*steps, inplace=False)
    graph = recipe(base)
    found = [counts(report) for report in recipe.reports[2:]]
    assert found == [ACTIVATED[family], RESIDUALS[family], PACKED[family]]
    assert recipe.reports[-1].refused[-1].reason == "It has 2 outputs; packing is of no use to fewer than 16."
    assert all(refusal.reason.endswith(".") for report in recipe.reports for refusal in report.refused)
    verdict = check(reference, graph)
    assert verdict.kept, verdict
    # Sizes are dynamic still.
    for batch, length in ((1, 1), (1, 2), (3, 31), (2, 60)):
        inputs = text_inputs(model, batch, length)
        with torch.inference_mode():
            assert torch.allclose(graph(**inputs)["end_logits"], base(**inputs)["end_logits"], atol=1e-4)
    back = recipe(graph, reverse=True)
    assert hashes.graph_hash(back) == hash_before
    assert hashes.constants_hash(back) == constants
    restored, before = dict(back.named_parameters()), dict(base.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name].requires_grad == before[name].requires_grad for name in before)


class Written(nn.Module):
    """A linear and a function of its result."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


FORMS = {
    "gelu": F.gelu,
    "gelu with tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu by erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "gelu by erf, otherwise": lambda x: (torch.erf(x * 2**-0.5) + 1) * x / 2,
    "gelu by tanh": gelu_new,
    "gelu by tanh, otherwise": gelu_fast,
    "silu by sigmoid": lambda x: x * torch.sigmoid(x),
    "relu": torch.relu,
    "tanh": torch.tanh,
}
OTHERS = {
    "a near miss of a constant": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4)),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "no curve": lambda x: x * 2 + 1,
    "two tensors": lambda x: x.roll(1) * torch.sigmoid(x),
}


def captured(function):
    torch.manual_seed(0)
    module = Written(function)
    return module, capture(module, example_inputs={"x": torch.randn(3, 8)})


@pytest.mark.parametrize("form", FORMS)
def test_an_activation_is_known_however_it_is_written(form):
    module, graph = captured(FORMS[form])
    x = 4 * torch.randn(50, 8)
    fusion = FuseLinearActivation(anyway=True)
    fused = fusion(graphs.fork(graph))
    assert counts(fusion.report) == (1, 1)
    assert [node.target for node in fused.graph.nodes if node.op == "call_function"] == [onednn.POINTWISE]
    with torch.inference_mode():
        assert torch.allclose(fused(x=x), module(x), atol=1e-5)
        assert torch.allclose(onednn.expand(fused)(x=x), module(x), atol=1e-6)
    assert hashes.graph_hash(fusion(fused, reverse=True)) == hashes.graph_hash(graph)


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_another_function_is_left(form):
    _, graph = captured(OTHERS[form])
    before, fusion = hashes.graph_hash(graph), FuseLinearActivation(anyway=True)
    fusion(graph)
    assert not fusion.report.applied
    assert hashes.graph_hash(graph) == before


class Between(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear, self.other, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x):
        y = self.linear(x)
        match self.kind:
            case "read twice":
                return F.gelu(y) + (x + y)
            case "an inner part is read":
                half = 0.5 * y
                return half * (1.0 + torch.erf(y / 2**0.5)), half
            case "written in between":
                y.add_(1)
                return F.gelu(y), x + y
            case "repeated":
                return y + x[:1]
            case "a factor":
                return torch.add(x, y, alpha=2)
            case "twice the same":
                return y + y
            case "computed weight":
                return F.gelu(F.linear(x, self.linear.weight * 2)), x + F.linear(x, self.linear.weight * 2)
            case "another function":
                return F.gelu(F.gelu(x)), F.gelu(x) + x


REFUSALS = {
    "read twice": ("is also read by", "is also read by"),
    "an inner part is read": ("a part of it, is also read by", None),
    "written in between": (None, None),
    "repeated": (None, "is repeated"),
    "a factor": (None, "adds no other tensor as it is"),
    "twice the same": (None, "adds no other tensor as it is"),
    "computed weight": ("is no stored parameter", "is no stored parameter"),
    "another function": ("is no plain linear", None),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refuses_what_would_change_the_function(kind):
    torch.manual_seed(0)
    module = Between(kind)
    graph = capture(module, example_inputs={"x": torch.randn(3, 8)})
    before = hashes.graph_hash(graph)
    for fusion, reason in zip((FuseLinearActivation(anyway=True), FuseResidual()), REFUSALS[kind], strict=True):
        fusion(graph)
        assert not fusion.report.applied
        if reason is not None:
            assert reason in fusion.report.refused[0].reason
    assert hashes.graph_hash(graph) == before


@pytest.mark.parametrize(("capability", "applied"), [("AVX2", {"relu"}), ("AVX512", {"relu", "gelu", "tanh"})])
def test_what_is_slow_on_the_processor_is_refused(monkeypatch, capability, applied):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for form in ("relu", "gelu", "tanh"):
        _, graph = captured(FORMS[form])
        fusion = FuseLinearActivation()
        fusion(graph)
        assert bool(fusion.report.applied) == (form in applied)
        if form not in applied:
            assert "takes longer than the two apart" in fusion.report.refused[0].reason


def test_of_two_linears_added_one_ends_with_the_other():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.one(x) + self.other(x)

    module = Both()
    graph = capture(module, example_inputs={"x": torch.randn(3, 8)})
    fused = compose(FuseResidual(), PackLinears(), inplace=False)(graph)
    assert sum(node.target is onednn.BINARY for node in fused.graph.nodes) == 1
    x = torch.randn(5, 8)
    with torch.inference_mode():
        assert torch.allclose(fused(x=x), module(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (384, 384), (33, 100)])
def test_packing_and_unpacking_keeps_every_bit(shape):
    weight = torch.randn(shape)
    packed = onednn.pack(weight)
    assert packed.is_mkldnn
    assert torch.equal(onednn.unpack(packed), weight)


def test_a_shared_weight_is_packed_once_and_only_if_all_its_readers_are_linears():
    class Shared(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.linear, self.tied = nn.Linear(16, 16), tied

        def forward(self, x):
            y = self.linear(torch.relu(self.linear(x)))
            return y * self.linear.weight.sum() if self.tied else y

    for tied, expected in ((False, (1, 1)), (True, (0, 1))):
        graph = capture(Shared(tied), example_inputs={"x": torch.randn(3, 16)})
        packing = PackLinears()
        packing(graph)
        assert counts(packing.report) == expected
    assert "would keep the old copy" in packing.report.refused[0].reason


def test_double_is_left_and_packing_twice_is_once():
    graph = capture(nn.Linear(4, 4).double(), example_inputs={"input": torch.randn(3, 4).double()})
    packing = PackLinears()
    packing(graph)
    assert "float64" in packing.report.refused[0].reason
    graph = capture(nn.Linear(4, 16), example_inputs={"input": torch.randn(3, 4)})
    packing(packing(graph))
    assert packing.report.refused[0].reason == "It is packed already."


def test_the_model_and_a_sibling_keep_their_weights():
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    base = capture(model)
    PackLinears()(graphs.fork(base))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert onednn.is_plain(base)


def test_a_packed_graph_is_saved_in_plain_operators(tmp_path):
    model = tiny("bert")
    base = capture(model)
    graph = compose(FuseLinearActivation(anyway=True), FuseResidual(), PackLinears(), inplace=False)(base)
    assert not onednn.is_plain(graph)
    save(graph, tmp_path / "packed.pt2")
    found = read(tmp_path / "packed.pt2")
    assert onednn.is_plain(found)
    inputs = text_inputs(model, 2, 9)
    with torch.inference_mode():
        assert torch.equal(found(**inputs)["end_logits"], base(**inputs)["end_logits"])


def test_onednns_operators_are_as_this_code_takes_them():
    """They are not public: this fails where torch changes them."""
    pointwise, binary = (str(operator._schema) for operator in (onednn.POINTWISE, onednn.BINARY))
    assert "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor" in pointwise
    assert "(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor" in binary
