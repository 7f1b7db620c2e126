import pytest
import torch
from torch import nn

from bert_evaluation import capture, compose, products
from bert_evaluation.products import precision, ways
from bert_evaluation.transformations import CastToBFloat16, MergeLinears, QuantizeLinears, TileLinears

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def whole_numbers():
    return torch.randint(0, 4, (16, 32)).float(), torch.randint(-4, 4, (16, 32)).float()


def test_the_operators_multiply():
    """Each way computes the product that it is timed for."""
    x, weight = whole_numbers()
    computed = 0
    for way in ways(CPU):
        try:
            result = way.make(x, weight)()
        except RuntimeError:
            continue
        computed += 1
        step = 255 * 127 * 32 / 255 if way.name.startswith("quantized") else 1.0  # the largest error of 8 bits
        assert (result.dequantize().float() - x @ weight.T).abs().max() <= step, way.name
    assert computed >= 2


def test_those_of_a_gpu_multiply_on_a_cpu_too():
    """As far as torch has them there."""
    x, weight = whole_numbers()
    found, missing = set(), set()
    for way in ways(CUDA):
        try:
            result = way.make(x, weight)()
        except NotImplementedError:
            missing.add(way.precision)
            continue
        found.add(way.precision)
        assert torch.equal(result.float(), x @ weight.T), way.name  # sums below 256, which bfloat16 holds exactly
    assert found - missing >= {"fp32", "bf16", "fp16"}
    assert missing <= {"fp8"}


def test_what_there_is_by_device():
    assert {way.precision for way in ways(CPU)} == {"fp32", "bf16", "int8"}
    assert {way.precision for way in ways(CUDA)} == {"fp32", "bf16", "fp16", "fp8"}
    assert {way.precision for way in ways(torch.device("mps"))} == {"fp32", "bf16", "fp16"}


def test_whether_float32_is_tf32_is_told():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, name in (("highest", "linear, without TF32"), ("high", "linear, TF32 allowed")):
            torch.set_float32_matmul_precision(setting)
            assert next(ways(CUDA)).name == name
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), "fp32"),
        ((MergeLinears(),), "fp32"),
        ((CastToBFloat16(anyway=True),), "bf16"),
        ((CastToBFloat16(anyway=True), TileLinears(anyway=True)), "bf16"),
        ((QuantizeLinears(anyway=True), CastToBFloat16(anyway=True)), "int8"),
        ((QuantizeLinears(keep=("intermediate", "output", "query", "logits"), anyway=True),), "fp32"),
    ],
)
def test_the_precision_that_a_graph_multiplies_in(bert_graph, steps, expected):
    assert precision(compose(*steps, inplace=False)(bert_graph) if steps else bert_graph) == expected


def test_tables_are_looked_up_and_not_multiplied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(1000, 8), nn.Linear(8, 8, dtype=torch.float16)

        def forward(self, ids):
            return self.linear(self.table(ids).half())

    assert precision(capture(Model(), {"ids": torch.zeros(3, dtype=torch.int64)})) == "fp16"


def test_without_weights_it_is_float32():
    assert precision(capture(nn.ReLU(), {"input": torch.zeros(3)})) == "fp32"


def test_every_precision_has_a_type():
    assert {*products.PRECISIONS.values()} >= {way.precision for kind in (CPU, CUDA) for way in ways(kind)}
