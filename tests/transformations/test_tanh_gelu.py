"""GELU at the end of products: on every family, how far the forms are apart, and what is refused."""

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import applied_and_kept, undone
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.tanh_gelu import LINEAR_GELU
from bert_evaluation.transformations import REGISTRY, Compile, FuseTanhGelu, parse_recipe
from bert_evaluation.transformations.activations import activation_at
from bert_evaluation.verification import check, observe

APART = 5e-4  # at most, of the two forms


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return model, capture(model), observe(model)


def test_every_family(subject):
    _, base, reference = subject
    step = FuseTanhGelu(anyway=True)
    graph = applied_and_kept(step, base, reference)
    gelus = [node for node in base.graph.nodes if (found := activation_at(node)) and found.activation.name == "gelu"]
    assert len(step.report.applied) + len(step.report.refused) == step.report.found <= len(gelus)
    assert len(list(graphs.calls(graph, LINEAR_GELU))) == len(step.report.applied)
    undone(step, graph, base)


@pytest.mark.parametrize("kind", ["CastToBFloat16", "CastToFloat16"])
def test_in_16_bits(bert, bert_graph, kind, tmp_path):
    cast = parse_recipe(f"{kind}(anyway=True)", REGISTRY)(graphs.fork(bert_graph))
    step = FuseTanhGelu(anyway=True)
    graph = step(graphs.fork(cast))
    assert len(step.report.applied) == bert.config.num_hidden_layers
    assert check(observe(cast, observe(bert).probes), graph).kept
    save(graph, tmp_path / "graph.pt2")
    inputs = text_inputs(bert, 2, 5)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "graph.pt2")(**inputs).start_logits, graph(**inputs).start_logits)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_it_is_near_the_exact_form(batch, length, inputs, outputs, size):
    x, weight, bias = size * torch.randn(batch, length, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    found = LINEAR_GELU(x, weight, bias)
    assert found.shape == (batch, length, outputs)
    torch.testing.assert_close(found, F.gelu(F.linear(x, weight, bias)), rtol=1e-5, atol=APART)


def test_torch_has_the_operator_that_it_stands_on():
    """It is not public. On a CPU it ends with the exact form."""
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    found = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    torch.testing.assert_close(found, F.gelu(F.linear(x, weight, bias)), rtol=1e-5, atol=APART)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (128, 1024, 4096), (77, 40, 24), (5, 7, 3)])
def test_on_a_gpu(kind, rows, inputs, outputs):
    x, weight, bias = (
        torch.randn(*size, device="cuda", dtype=kind) for size in ((1, rows, inputs), (outputs, inputs), (outputs,))
    )
    weight /= inputs**0.5
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    allowed = torch.finfo(kind).eps
    torch.testing.assert_close(LINEAR_GELU(x, weight, bias).double(), exact, rtol=allowed, atol=APART + allowed / 8)


class Several(nn.Module):
    """GELUs of a linear, of one that others read, of one without bias, and of none; and what is no GELU."""

    def __init__(self):
        super().__init__()
        self.one, self.shared, self.bare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        shared = self.shared(x)
        return F.gelu(self.one(x)) + F.gelu(shared) + shared + F.gelu(self.bare(x)) + F.gelu(x) + self.one(x).relu()


def test_what_is_refused():
    graph, step = capture(Several().eval(), {"x": torch.randn(3, 8)}), FuseTanhGelu(anyway=True)
    step(graphs.fork(graph))
    assert len(step.report.applied) == 1
    shared, bare, none = (each.reason for each in step.report.refused)
    assert "is also read by add" in shared
    assert "has no bias" in bare
    assert "is no plain linear" in none
    step = FuseTanhGelu()
    step(graph)
    assert step.report.refused[0].reason == "It is for an NVIDIA GPU, and the graph is on cpu."


def test_float32_on_a_gpu_is_refused(monkeypatch, bert_graph):
    monkeypatch.setattr("bert_evaluation.transformations.tanh_gelu.DEVICE", "cpu")  # as if it were there
    step = FuseTanhGelu()
    step(graphs.fork(bert_graph))
    assert step.report.refused
    assert all(each.reason.startswith("It is for 16 bits") for each in step.report.refused)


def test_it_is_compiled(bert, bert_graph):
    graph = compose(FuseTanhGelu(anyway=True), Compile())(graphs.fork(bert_graph))
    assert check(observe(bert), graph).kept
