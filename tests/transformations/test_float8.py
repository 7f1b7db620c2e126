"""Linears in float8: arithmetic, and the graphs of every family. `tests/test_triton_kernels.py` has the GPU's part."""

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bert_evaluation import capture, compose, float8, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.memory import memory
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    CastToBFloat16,
    CastToFloat16,
    FuseAttention,
    MergeLinears,
    QuantizeToFloat8,
    RemoveDropout,
    RemovePadding,
)
from bert_evaluation.verification import in_double

# Sites applied of found, of tiny models with two layers; and how often something is rounded, once for linears that read
# the same.
SITES = dict.fromkeys(FAMILIES, (12, 13)) | {
    "electra": (12, 14),
    "albert": (7, 8),  # its layers share their weights
    "modernbert": (9, 10),
    "mobilebert": (30, 32),
}
ROUNDED = dict.fromkeys(FAMILIES, 8) | {"albert": 9, "deberta-v2": 10, "modernbert": 9, "mobilebert": 24}
STEP = 2.0**-3  # between two numbers of float8, for their size


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


def test_every_family(subject):
    family, model, base = subject
    before, hash_before, constants = dict(base.named_parameters()), hashes.graph_hash(base), hashes.constants_hash(base)
    quantize = QuantizeToFloat8(anyway=True)
    graph = quantize(graphs.fork(base))

    assert (len(quantize.report.applied), quantize.report.found) == SITES[family]
    assert all("keep list" in refusal.reason for refusal in quantize.report.refused)
    assert len(list(graphs.calls(graph, float8.ROWS))) == ROUNDED[family]
    assert isinstance(promise_of(graph), Approximates)
    for batch, length in ((1, 1), (1, 2), (3, 31)):  # sizes are dynamic still
        inputs = text_inputs(model, batch, length)
        inputs["attention_mask"][-1, length // 2 :] = 0
        with torch.inference_mode():
            found, expected = graph(**inputs)["end_logits"], base(**inputs)["end_logits"]
            exact = in_double(graph)(**inputs)["end_logits"]
        assert found.dtype is torch.float32
        assert exact.dtype is torch.float64
        assert (found - expected).abs().max() <= STEP  # what layers pass on is about 1 in size
        assert not torch.equal(found, expected)

    back = quantize(graph, reverse=True)
    assert hashes.graph_hash(back) == hash_before
    assert hashes.constants_hash(back) == constants
    restored = dict(back.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies


@pytest.mark.parametrize(
    "steps", [(RemovePadding(), QuantizeToFloat8(anyway=True)), (QuantizeToFloat8(anyway=True), RemovePadding())]
)
def test_without_padding_in_either_order(bert, bert_graph, steps):
    base = compose(RemoveDropout(), FuseAttention(), CastToBFloat16(anyway=True))(graphs.fork(bert_graph))
    recipe = compose(*steps)
    graph = recipe(graphs.fork(base))
    assert all(report.applied for report in recipe.reports)
    inputs = text_inputs(bert, 3, 31)
    inputs["attention_mask"][1, 5:] = 0
    with torch.inference_mode():
        found, expected = (each(**inputs)["start_logits"].float() for each in (graph, base))
    real = inputs["attention_mask"].bool()
    assert (found - expected)[real].abs().max() <= STEP


def test_linears_of_one_tensor_round_it_once_and_an_activation_goes_along(bert_graph):
    graph = compose(RemoveDropout(), QuantizeToFloat8(anyway=True))(graphs.fork(bert_graph))
    rows = list(graphs.calls(graph, float8.ROWS))
    assert [node.args[1] for node in rows].count("gelu") == 2
    assert not list(graphs.calls(graph, torch.ops.aten.gelu.default))
    products = [[user for part in node.users for user in part.users] for node in rows]
    assert sorted(len(set(each)) for each in products) == [1] * 6 + [3] * 2  # query, key and value


def test_an_activation_that_others_read_too_stays():
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            y = F.gelu(self.one(x))
            return self.other(y) + y

    graph = QuantizeToFloat8(keep=(), anyway=True)(capture(Gated(), {"x": torch.randn(2, 32)}))
    assert {node.args[1] for node in graphs.calls(graph, float8.ROWS)} == {"none"}
    assert len(list(graphs.calls(graph, torch.ops.aten.gelu.default))) == 1


def test_an_answer_does_not_depend_on_the_texts_beside_it(bert, bert_graph):
    graph = QuantizeToFloat8(anyway=True)(graphs.fork(bert_graph))
    inputs = text_inputs(bert, 3, 8)
    alone = {name: tensor[1:2] for name, tensor in inputs.items()}
    with torch.inference_mode():
        assert torch.allclose(graph(**inputs)["end_logits"][1:2], graph(**alone)["end_logits"], atol=1e-5)


def test_what_it_refuses(bert_graph):
    def reasons(quantize, graph):
        quantize(graph)
        assert not quantize.report.applied
        return {refusal.reason for refusal in quantize.report.refused if "keep list" not in refusal.reason}

    no_gpu = "Only an NVIDIA GPU multiplies float8, and the graph is on cpu."
    no_gpu += " anyway=True computes it in plain PyTorch, slowly."
    assert reasons(QuantizeToFloat8(), graphs.fork(bert_graph)) == {no_gpu}
    half = CastToFloat16(anyway=True)(graphs.fork(bert_graph))
    assert reasons(QuantizeToFloat8(anyway=True), half) == {
        "It computes in torch.float16, and products of float8 are bfloat16; apply CastToBFloat16 before."
    }
    odd = capture(torch.nn.Linear(24, 32), {"input": torch.randn(2, 24)})
    assert reasons(QuantizeToFloat8(keep=(), anyway=True), odd) == {"Its weight is 32 by 24; float8 goes by 16."}


def test_weights_take_a_quarter_of_the_memory(bert, bert_graph):
    inputs = text_inputs(bert, 1, 4)
    others = sum(tensor.nbytes for name, tensor in bert.named_parameters() if "encoder" not in name or tensor.dim() < 2)
    graph = compose(MergeLinears(), QuantizeToFloat8(anyway=True))(graphs.fork(bert_graph))
    before, after = (memory(each, inputs).weights - others for each in (bert_graph, graph))
    assert 0 < after < before / 2


numbers = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(st.lists(st.lists(numbers, min_size=16, max_size=16), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_product_errs_by_half_a_step_of_each_factor(rows, seed):
    x, weight = torch.tensor(rows), torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    (a, s), (b, t) = float8.quantize(x), float8.quantize(weight)
    assert bool((a.float().abs() <= float8.LARGEST).all())
    found = float8.LINEAR(a, s, b, t, None, torch.float32)
    # Half a step is a sixteenth of a number, or of the least normal one of its row, 2^-6 of 448.
    off = [each.abs() / 16 + scale * 2**-10 for each, scale in ((x, s), (weight, t))]
    bound = off[0] @ weight.abs().T + x.abs() @ off[1].T + off[0] @ off[1].T
    assert bool(((found - x @ weight.T).abs() <= bound * (1 + 1e-4) + 1e-6 * (x.abs() @ weight.abs().T) + 1e-10).all())


def test_zeros_and_what_is_not_finite():
    x = torch.zeros(4, 16)
    x[1, 2], x[2, 3] = torch.inf, torch.nan
    found = float8.LINEAR(*float8.ROWS(x, "none"), *float8.quantize(torch.randn(16, 16)), None, torch.float32)
    assert not found[[0, 3]].any()
    assert not found[1:3].isfinite().any()
    assert float8.LINEAR(*float8.ROWS(x[:0], "gelu"), *float8.quantize(x), None, torch.bfloat16).shape == (0, 4)
