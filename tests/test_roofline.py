import sqlite3
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from bert_evaluation import capture, database, roofline
from bert_evaluation.capturing import text_inputs
from bert_evaluation.products import Way
from bert_evaluation.roofline import Bandwidth, Peak, Roofline, flops, known, reached, share
from bert_evaluation.stats import Interval
from bert_evaluation.store import Store

CPU = torch.device("cpu")
SMALL = ((4, 64, 32), (8, 32, 64))


def peak(precision, gflops, way="linear", **more):
    return Peak(precision, way, Interval(gflops, gflops, gflops), (1, 1, 1), **more)


MADE_UP = Roofline(
    "cpu", 2, (peak("fp32", 50), peak("fp32", 100, "packed"), peak("int8", 9, error=0.49)), (
        Bandwidth("triad", Interval(10, 9, 11), 64),
        Bandwidth("copy", Interval(12, 9, 13), 64),
    ),
)  # fmt: skip


def test_operations_of_a_linear():
    graph = capture(nn.Linear(6, 4), {"input": torch.randn(3, 6)})
    assert flops(graph, {"input": torch.randn(5, 6)}) == 2 * 5 * 6 * 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_of_bert(attention):
    from families import SIZES, tiny

    model = tiny("bert", attn_implementation=attention)
    batch, length, wide, inner = 3, 11, SIZES["hidden_size"], SIZES["intermediate_size"]
    tokens = batch * length
    layer = 4 * tokens * wide * wide + 2 * tokens * wide * inner  # query, key, value, output; the two of the MLP
    layer += 2 * tokens * length * wide  # scores, and what they weigh
    by_hand = 2 * (SIZES["num_hidden_layers"] * layer + tokens * wide * 2)  # and the head's start and end
    assert flops(capture(model), text_inputs(model, batch, length)) == by_hand


@pytest.mark.slow
def test_attention_is_counted_in_every_family(family):
    """Whichever way it is computed, it is what grows with the square of the length."""
    model, graph = family
    one, two, three = (flops(graph, text_inputs(model, 2, length)) for length in (16, 32, 48))
    assert three - two > two - one


def test_every_kernel_of_attention_is_counted():
    """Whichever of torch's an inference ends up with, by device, types and shapes."""
    aten = torch.ops.aten
    for_none = ("overrideable", "_math")  # for back ends outside of torch; made of products, which are counted
    kernels = [name for name in dir(aten) if name.startswith("_scaled_dot_product") and "backward" not in name]
    kernels = [getattr(aten, name) for name in kernels if not name.endswith(for_none)]
    assert len(kernels) >= 5
    assert set(kernels) <= {*roofline.FORMULAS, *flop_registry}


def test_share_of_a_peak():
    assert share(5e9, 0.1, peak("fp32", 100)) == pytest.approx(0.5)


def test_the_best_way_is_the_peak():
    assert MADE_UP.peak("fp32").way == "packed"
    assert MADE_UP.peak("bf16") is None
    assert [each.is_safe for each in MADE_UP.peaks] == [True, True, False]
    assert peak("int8", 9, error=0.0).is_safe


@pytest.fixture
def quick(monkeypatch):
    """So little time that the figures mean nothing."""
    monkeypatch.setattr(roofline, "TIME", 0.0)
    monkeypatch.setattr(roofline, "TRY", 0.01)


def test_measuring_this_machine(quick):
    found = roofline.measure(CPU, SMALL, 1 << 16)
    assert found.threads == torch.get_num_threads()
    assert {"fp32", "bf16"} <= {each.precision for each in found.peaks}
    assert all(0 < each.gflops.low <= each.gflops.estimate <= each.gflops.high for each in found.peaks)
    assert all(each.shape in SMALL for each in found.peaks)
    assert all((each.error is None) == (each.precision != "int8") for each in found.peaks)
    assert [each.array_bytes for each in found.bandwidths] == [1 << 16, 1 << 16]


def test_a_way_that_torch_does_not_have_here_is_left_out(quick):
    def refuses(x, weight):
        raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")

    assert roofline._peak(Way("bf16", "packed", refuses), CPU, SMALL) is None


@pytest.mark.parametrize(("way", "safe"), [("exact", True), ("saturates", False)])
def test_sums_that_overflow_are_seen_in_the_result(quick, way, safe):
    def make(x, weight):
        exact = (x[:, ::2, None] * weight.T[::2] + x[:, 1::2, None] * weight.T[1::2]) if len(x) == 4 else None
        pairs = torch.zeros(1, 1, 1) if exact is None else exact
        return lambda: (pairs if way == "exact" else pairs.clamp(max=32767)).sum(1)

    found = roofline._peak(Way("int8", way, make), CPU, SMALL[1:])
    assert found.is_safe == safe


def test_shapes_fit_the_device_and_its_memory():
    cuda = roofline._shapes(torch.device("cuda"))
    assert min(roofline._work(shape) for shape in cuda) > max(roofline._work(shape) for shape in roofline._shapes(CPU))
    assert roofline._fitting(cuda, 140 << 30) == list(cuda)
    assert roofline._fitting(cuda, 0) == [cuda[0]]
    less = roofline._fitting(cuda, 8 << 30)
    assert set(less) < set(cuda)
    largest = max(tokens * inputs + inputs * outputs + tokens * outputs for tokens, inputs, outputs in less)
    assert 4 * 4 * largest <= 2 << 30  # two at a time, each twice


def test_it_is_measured_once_and_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(roofline, "measure", lambda device: calls.append(device) or MADE_UP)
    with Store(tmp_path / "results.sqlite") as store:
        first = known(store, CPU)
        assert known(store, CPU) == first == replace(MADE_UP, measured=first.measured)
        assert len(calls) == 1
        known(store, CPU, fresh=True)
        assert len(calls) == 2
        threads = torch.get_num_threads()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
        known(store, CPU)
        assert len(calls) == 3


def test_a_store_from_before_gets_the_table(tmp_path, monkeypatch):
    file = tmp_path / "results.sqlite"
    with monkeypatch.context() as earlier:
        earlier.setattr(database, "MIGRATIONS", database.MIGRATIONS[:1])
        Store(file).__exit__()
    assert "measured" not in {name for (name,) in sqlite3.connect(file).execute("SELECT name FROM sqlite_master")}
    with Store(file) as store:
        assert store.measured("key", lambda: "{}")[0] == "{}"


def test_what_a_model_reaches(quick, bert):
    (one, two) = reached(bert, MADE_UP, ((1, 8), (2, 999)))
    assert (one.batch, one.length, two.length) == (1, 8, 530)  # not more than the model reads
    assert two.share == pytest.approx(two.flops / (two.milliseconds.estimate / 1000) / 100e9)
