"""Linears in parts: on every family, and what is refused."""

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
from bert_evaluation.partial_products import PRODUCTS
from bert_evaluation.transformations import REGISTRY, Compile, SplitLinears, parse_recipe
from bert_evaluation.verification import check, observe


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return model, capture(model), observe(model)


@pytest.mark.parametrize("parts", [2, 4])
def test_every_family(subject, parts):
    model, base, reference = subject
    step = SplitLinears(parts, anyway=True)
    graph = applied_and_kept(step, base, reference)
    linears = len(list(graphs.calls(base, torch.ops.aten.linear.default)))
    assert len(step.report.applied) == step.report.found == linears > 0
    assert len(list(graphs.calls(graph, PRODUCTS))) == linears
    for batch, length in ((1, 1), (3, 31)):
        inputs = text_inputs(model, batch, length)
        with torch.inference_mode():
            assert torch.allclose(graph(**inputs)["end_logits"], base(**inputs)["end_logits"], atol=1e-5)
    undone(step, graph, base)


@pytest.mark.parametrize("kind", ["CastToBFloat16", "CastToFloat16"])
def test_in_16_bits_only_the_sum_is_rounded(bert, bert_graph, kind, tmp_path):
    cast = parse_recipe(f"MergeLinears+{kind}(anyway=True)", REGISTRY)(graphs.fork(bert_graph))
    step = SplitLinears(anyway=True)
    graph = step(graphs.fork(cast))
    assert step.report.applied
    assert {node.meta["val"].dtype for node in graphs.calls(graph, PRODUCTS)} <= {torch.float32}
    reference = observe(cast, observe(bert).probes)
    assert check(reference, graph).kept
    save(graph, tmp_path / "graph.pt2")
    inputs = text_inputs(bert, 2, 5)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "graph.pt2")(**inputs).start_logits, graph(**inputs).start_logits)


@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(2, 5),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_parts_add_up(batch, length, outputs, parts, kind):
    x, weight = torch.randn(batch, length, 6 * parts, dtype=kind), torch.randn(outputs, 6 * parts, dtype=kind)
    found = PRODUCTS(x, weight, parts)
    assert found.shape == (parts, batch, length, outputs)
    assert found.dtype is kind
    torch.testing.assert_close(found.sum(0), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    for index, (some, theirs) in enumerate(zip(x.chunk(parts, -1), weight.chunk(parts, -1), strict=True)):
        torch.testing.assert_close(found[index], F.linear(some, theirs), rtol=1e-5, atol=1e-5)


class Two(nn.Module):
    """A linear whose weight is computed, and one whose is not."""

    def __init__(self, inputs=8):
        super().__init__()
        self.linear = nn.Linear(inputs, 4)

    def forward(self, x):
        return self.linear(x) + F.linear(x, self.linear.weight * 2)


def test_what_is_refused():
    def reasons(step, module, x):
        step(capture(module, {"x": x}))
        return [each.reason for each in step.report.refused]

    x = torch.randn(3, 8)
    on_cpu, computed = reasons(SplitLinears(), Two(), x)
    assert on_cpu == "The cores of a CPU share the rows of a product, and the graph is on cpu."
    assert computed.endswith("which the graph computes: it is no stored parameter.")
    assert reasons(SplitLinears(3, anyway=True), Two(), x)[0] == "Its 8 inputs do not come apart in 3 equal parts."
    with pytest.raises(ValueError, match="a linear is split in 2 or more"):
        SplitLinears(1)


def test_on_a_gpu_only_long_sums_of_enough_outputs_are_split(monkeypatch):
    class On(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.last = nn.Linear(512, 2048), nn.Linear(2048, 512), nn.Linear(512, 2)

        def forward(self, x):
            return self.last(self.down(self.up(x)))

    graph = capture(On(), {"x": torch.randn(3, 512)})
    step = SplitLinears()
    monkeypatch.setattr("bert_evaluation.transformations.splitting.DEVICE", "cpu")  # as if it were there
    step(graph)
    assert step.report.applied == ("down (linear_1)",)
    assert "Its weight is 2048 by 512" in step.report.refused[0].reason


def test_it_is_compiled(bert, bert_graph):
    graph = compose(SplitLinears(anyway=True), Compile())(graphs.fork(bert_graph))
    assert check(observe(bert), graph).kept
