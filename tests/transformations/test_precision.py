"""Linears and attention in bfloat16 and float16: on every family, with few casts, undone exactly; how results move."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from bert_evaluation import capture, compose, evaluate, hashes, kernels, load, onednn, varlen, verify
from bert_evaluation import graph as graphs
from bert_evaluation.builtin import QUESTIONS
from bert_evaluation.calibration import Calibration, calibrate
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.probes import text_probes
from bert_evaluation.promise import Approximates
from bert_evaluation.squad import read_squad
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    REGISTRY,
    CastToBFloat16,
    CastToFloat16,
    FuseAttention,
    FuseLinearActivation,
    FuseResidual,
    HoistMask,
    MergeLinears,
    PackLinears,
    QuantizeLinears,
    RemoveDropout,
    RemovePadding,
    TileLinears,
    parse_recipe,
)
from bert_evaluation.transformations.linear import tensor_of
from bert_evaluation.verification import check, observe

aten = torch.ops.aten
KINDS = (CastToBFloat16, CastToFloat16)
UNIT = {CastToBFloat16: 2.0**-8, CastToFloat16: 2.0**-11}  # what rounding may change, relatively
PAIRS = [{torch.float32, kind.low} for kind in KINDS]
requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

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


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


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
    """The casts between float32 and a lower type, which these models have none of themselves."""
    nodes = [node for node in graphs.calls(graph, aten.to.dtype) if {dtype(node), dtype(node.args[0])} in PAIRS]
    return [node for node in nodes if to in (None, dtype(node))]


def linears(graph):
    return [node for node in graph.graph.nodes if onednn.is_linear(node)]


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


@pytest.fixture(scope="module")
def reference(subject):
    """What the model makes of inputs that are chosen to break things, short ones."""
    _, model, base = subject
    return observe(base, text_probes(model, 31))


def hold_cast(cast, subject, reference):
    """That a cast does all that it should to a family, and is undone."""
    family, model, base = subject
    before, hash_before, constants = dict(base.named_parameters()), hashes.graph_hash(base), hashes.constants_hash(base)
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

    # LayerNorms are cast too; the weights of those on CUDA with them, which take no others.
    norms = list(graphs.calls(graph, aten.layer_norm.default))
    assert any(dtype(norm) is cast.low for norm in norms) == (family != "mobilebert")  # which has none
    for norm in norms:
        taken = torch.float32 if norm.meta["val"].device.type == "cpu" else dtype(norm)
        assert {tensor_of(each).dtype for each in norm.all_input_nodes[1:]} <= {taken}

    # Sizes are dynamic still, the results near, and finite where the model's are.
    assert check(reference, graph).kept
    for batch, length in ((1, 1), (1, 2), (3, 31)):
        inputs = text_inputs(model, batch, length)
        with torch.inference_mode():
            found, expected = graph(**inputs)["end_logits"], base(**inputs)["end_logits"]
        assert found.dtype is torch.float32
        assert (found - expected).abs().max() <= 8 * UNIT[type(cast)]  # what layers pass on is about 1 in size
        assert not torch.equal(found, expected)

    back = cast(graph, reverse=True)
    assert hashes.graph_hash(back) == hash_before
    assert hashes.constants_hash(back) == constants
    restored = dict(back.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies


def test_every_family(subject, reference, kind):
    hold_cast(kind(anyway=True), subject, reference)


def said_to_be_on_cuda(graph):
    """The graph on a CUDA device as far as its nodes say: it still computes where it is."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        moved = [_on_cuda(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
        node.meta["val"] = moved if isinstance(value, (list, tuple)) else moved[0]
    return graph


def _on_cuda(value):
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        shape = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, shape, torch.device("cuda", 0))


@pytest.fixture
def card(monkeypatch):
    """Make up a GPU, by its compute capability."""

    def made(major, minor):
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return made


def test_every_family_on_a_made_up_gpu(subject, reference, kind, card, unable):
    card(9, 0)
    family, model, base = subject
    hold_cast(kind(), (family, model, said_to_be_on_cuda(graphs.fork(base))), reference)


def test_an_older_gpu_has_no_bfloat16_but_float16(bert_graph, card):
    card(7, 5)
    graph, cast = said_to_be_on_cuda(graphs.fork(bert_graph)), CastToBFloat16()
    cast(graph)
    assert not cast.report.applied
    assert cast.report.refused[0].reason == (
        "Tesla T4 has no bfloat16: its compute capability is 7.5, not 8.0 or more."
        " It would be slower; anyway=True casts it all the same."
    )
    for other in (CastToBFloat16(anyway=True), CastToFloat16()):
        other(graphs.fork(graph))
        assert len(other.report.applied) == 14


def test_other_devices_are_refused(bert_graph, kind):
    graph = graphs.fork(bert_graph)
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(node.meta["val"].shape, device="meta")
    cast = kind(anyway=True)
    cast(graph)
    assert not cast.report.applied
    assert cast.report.refused[0].reason == f"{kind.__name__} is for cpu and cuda, and the graph is on meta."


@pytest.fixture
def gpus_kind(kind):
    if kind is CastToBFloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    return kind


@pytest.mark.cuda
@requires_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_a_gpu(family, gpus_kind):
    model = tiny(family).cuda()
    base = capture(model)
    hold_cast(gpus_kind(), (family, model, base), observe(base, text_probes(model, 31)))


def test_the_keep_list(bert_graph, kind):
    def applied(*keep):
        cast = kind(keep=keep, anyway=True)
        graph = cast(graphs.fork(bert_graph))
        return len(cast.report.applied), len(casts(graph)), graph

    assert applied()[:2] == (15, 2)  # the logits are cast back, not what they are computed of
    assert applied("logits")[:2] == (14, 2)
    assert applied("layer.1", "logits")[:2] == (7, 2)
    assert applied("scaled_dot_product_attention", "logits")[:2] == (12, 2 * 4 + 2)
    count, number, graph = applied("LayerNorm", "logits")
    assert (count, number) == (14, 4 + 4)
    assert all(dtype(norm) is torch.float32 for norm in graphs.calls(graph, aten.layer_norm.default))
    assert kind(keep="logits").keep == ("logits",)


def test_a_number_in_a_path_is_not_the_start_of_another(able):
    graph = capture(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), {"input": torch.randn(3, 4)})
    cast = CastToBFloat16(keep=["1"])
    cast(graph)
    assert [refusal.site.split()[0] for refusal in cast.report.refused] == ["1"]


def test_a_processor_without_is_refused_unless_anyway(bert_graph, unable):
    cast = CastToBFloat16()
    before = hashes.graph_hash(bert_graph)
    graph = cast(graphs.fork(bert_graph))
    assert not cast.report.applied
    assert hashes.graph_hash(graph) == before
    reasons = {refusal.reason for refusal in cast.report.refused}
    assert any("nothing in bfloat16" in reason and "anyway=True" in reason for reason in reasons)
    anyway = CastToBFloat16(anyway=True)
    anyway(graph)
    assert len(anyway.report.applied) == 14


def test_any_processor_is_refused_in_float16_unless_anyway(bert_graph, able):
    cast = CastToFloat16()
    cast(graphs.fork(bert_graph))
    assert not cast.report.applied
    assert cast.report.refused[0].reason == (
        "float16 is a type for GPUs, which few CPUs compute in. It would be slower; anyway=True casts it all the same."
    )


ONEDNNS = {
    CastToBFloat16: "This processor computes nothing in bfloat16 (it has no AVX-512).",
    CastToFloat16: "oneDNN's linear is for float32 and bfloat16, not for torch.float16.",
}


def test_what_is_onednns_is_refused_there_even_so(bert_graph, kind, unable):
    graph = FuseLinearActivation(anyway=True)(graphs.fork(bert_graph))
    cast = kind(anyway=True)
    cast(graph)
    assert len(cast.report.applied) == 12
    assert [refusal.reason for refusal in cast.report.refused[:2]] == [ONEDNNS[kind]] * 2


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
    ("odd", "reason"),
    [
        ("its result is written into", "in place."),
        ("a computed weight", "is no stored parameter."),
        ("a mask that is added", "is added to the scores"),
        ("double", "not in float32."),
    ],
)
def test_refuses_what_it_cannot_cast(odd, reason, kind):
    made, x = Odd(odd), torch.randn(3, 8)
    if odd == "double":
        made, x = made.double(), x.double()
    graph = capture(made, example_inputs={"x": x})
    cast = kind(keep=(), anyway=True)
    cast(graph)
    assert any(refusal.reason.endswith(reason) or reason in refusal.reason for refusal in cast.report.refused)
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), made(x), atol=0.05)


def test_casting_twice_is_once(bert_graph, kind):
    graph = kind(anyway=True)(graphs.fork(bert_graph))
    before, again = hashes.graph_hash(graph), kind(anyway=True)
    again(graph)
    assert not again.report.applied
    assert again.report.refused[0].reason == f"It is in {str(kind.low).removeprefix('torch.')} already."
    assert hashes.graph_hash(graph) == before


@pytest.fixture(scope="module")
def of_bert(bert):
    return observe(bert, text_probes(bert, 31))


def test_one_type_and_then_the_other(bert_graph, of_bert):
    """What the first keeps may be of the second: the two are cast to each other by way of float32."""
    for first, second in (KINDS, reversed(KINDS)):
        recipe = compose(first(keep=("layer.1", "logits"), anyway=True), second(anyway=True))
        graph = recipe(graphs.fork(bert_graph))
        report = recipe.steps[1].report
        assert len(report.applied) == 7
        assert report.refused[0].reason == f"It computes in {first.low}, not in float32."
        types = [dtype(linear) for linear in linears(graph)]
        assert types == [first.low] * 6 + [second.low] * 6 + [torch.float32]
        assert len(casts(graph)) == 4
        assert check(of_bert, graph).kept
        assert hashes.graph_hash(recipe(graph, reverse=True)) == hashes.graph_hash(bert_graph)


def test_shared_weights_are_cast_once(kind):
    graph = kind(anyway=True)(capture(tiny("albert")))
    stored, name = [each for each, tensor in graphs.tensors(graph).items() if tensor.dtype is kind.low], str(kind.low)
    assert len(stored) == len({each.replace(f"_{name.removeprefix('torch.')}", "") for each in stored}) == 2 * 7


def test_a_gelu_that_is_spelt_out_becomes_one_operator(kind):
    class Spelt(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.one(x)
            return self.other(0.5 * y * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * torch.pow(y, 3.0)))))

    module = Spelt()
    graph = kind(keep=(), anyway=True)(capture(module, example_inputs={"x": torch.randn(3, 8)}))
    names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert names == [aten.to.dtype, aten.linear.default, aten.gelu.default, aten.linear.default, aten.to.dtype]
    x = torch.randn(50, 8)
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), module(x), atol=8 * UNIT[kind])


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
        assert (targets.count(onednn.BINARY), targets.count(onednn.POINTWISE)) == (4, 4)
        assert len(casts(graph)) == 2
        assert {dtype(linear) for linear in linears(graph)[:-1]} == {torch.bfloat16}
        with torch.inference_mode():
            found = onednn.expand(graph)(**inputs)["start_logits"]
            assert torch.equal(found, plain(**inputs)["start_logits"])
        back = recipe(graph, reverse=True)
        assert hashes.graph_hash(back) == hashes.graph_hash(bert_graph)


def floats(largest):
    return st.floats(-largest, largest, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 1e-30])


numbers = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(floats(2.0**60 if kind is CastToBFloat16 else 2.0**12), min_size=1, max_size=6)
    )
)


@settings(deadline=None, max_examples=60)  # each captures a module
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), numbers)
def test_a_linear_errs_by_the_rounding_of_what_it_reads_and_returns(rows, inputs, outputs, kind_and_values):
    """Each factor may be off by a unit, one part in 256 of bfloat16, so each product by two, the result by one more.

    What is smaller than the smallest normal number may be off by half of the smallest of all.
    """
    kind, values = kind_and_values
    module, unit, type_of = nn.Linear(inputs, outputs), UNIT[kind], torch.finfo(kind.low)
    graph = kind(keep=(), anyway=True)(capture(module, {"input": torch.randn(2, inputs)}))
    x = torch.tensor(values).repeat(rows * inputs)[: rows * inputs].reshape(rows, inputs)
    with torch.inference_mode():
        found, weight, bias = graph(input=x).double(), module.weight.double(), module.bias.double()
        exact, size = F.linear(x.double(), weight, bias), F.linear(x.double().abs(), weight.abs(), bias.abs())
    sums = 2 * inputs * 2.0**-24  # of additions in float32
    lost = type_of.tiny * type_of.eps / 2 * (2 + inputs + float(x.abs().double().sum(-1).max() + weight.abs().sum()))
    assert bool(((found - exact).abs() <= ((1 + unit) ** 3 - 1 + sums) * size + 2 * lost + 1e-37).all())


class Large(nn.Module):
    """What one linear returns is beyond 65504; then it is normalised."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.other = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            self.one.weight *= 1e6

    def forward(self, x):
        return self.other(self.norm(self.one(x)))


def test_what_float16_cannot_hold_breaks_the_promise():
    module = Large()
    base = capture(module, example_inputs={"x": torch.randn(3, 8)})
    for kind, keep, kept in (
        (CastToFloat16, (), False),
        (CastToFloat16, ("one",), True),
        (CastToBFloat16, (), True),
    ):
        found = verify(module, kind(keep=keep, anyway=True)(graphs.fork(base)))
        assert found.kept == kept
        if not kept:
            assert found.error == float("inf")
            assert found.first_difference == "one (linear)"


def test_what_float16_cannot_hold_is_left():
    module, x = Large(), torch.randn(20, 8)
    base = calibrate(capture(module, example_inputs={"x": x[:3]}), Calibration(({"x": x},)))
    cast = CastToFloat16(keep=(), anyway=True, leave=0.5)
    assert verify(module, cast(base)).kept
    assert [(refusal.site, refusal.reason) for refusal in cast.report.refused] == [
        ("one (linear)", "Alone it moves the outputs infinitely far, more than 1 other sites do.")
    ]


def test_masks_stay_boolean_or_are_refused(bert_graph, of_bert, kind):
    """A row that is masked wholly is the hard one: all its scores are minus infinity, or the lowest number."""
    recipe = compose(HoistMask(), kind(anyway=True))
    graph = recipe(graphs.fork(bert_graph))
    assert recipe.steps[0].report.applied
    assert len(recipe.steps[1].report.applied) == 14
    masks = {node.args[3] for node in graphs.calls(graph, aten.scaled_dot_product_attention.default)}
    assert {dtype(mask) for mask in masks} == {torch.bool}
    assert check(of_bert, graph).kept

    model = tiny("bert", attn_implementation="eager")
    recipe = compose(FuseAttention(), kind(anyway=True))
    graph = recipe(capture(model))
    refused = [each.reason for each in recipe.steps[1].report.refused if "is added to the scores" in each.reason]
    assert len(refused) == len(recipe.steps[0].report.applied) == 2
    assert len(recipe.steps[1].report.applied) == 12
    assert check(observe(model, text_probes(model, 31)), graph).kept


def test_removing_padding_before_and_after(bert, bert_graph, of_bert, kind):
    inputs = text_inputs(bert, 3, 17)
    inputs["attention_mask"][0, 9:] = 0
    real = inputs["attention_mask"].bool()
    results = []
    for steps in ((RemovePadding(), kind(anyway=True)), (kind(anyway=True), RemovePadding())):
        recipe = compose(RemoveDropout(), MergeLinears(), *steps)
        graph = recipe(graphs.fork(bert_graph))
        assert all(step.report.applied for step in recipe.steps)
        packed = list(graphs.calls(graph, varlen.ATTENTION))
        assert [dtype(node) for node in packed] == [kind.low] * 2
        assert len(casts(graph)) == 2
        assert check(of_bert, graph).kept
        with torch.inference_mode():
            results.append(graph(**inputs)["end_logits"][real])
            expected = bert_graph(**inputs)["end_logits"][real]
        assert (results[-1] - expected).abs().max() <= 4 * UNIT[kind]
        assert hashes.graph_hash(recipe(graph, reverse=True)) == hashes.graph_hash(bert_graph)
    assert torch.equal(*results)


def test_linears_on_integers_before(bert, bert_graph, of_bert, kind):
    recipe = compose(QuantizeLinears(anyway=True), kind(anyway=True))
    graph = recipe(graphs.fork(bert_graph))
    assert len(recipe.steps[1].report.applied) == 14
    tiled = list(graphs.calls(graph, kernels.LINEAR))
    assert [dtype(node) for node in tiled] == [kind.low] * 12
    assert len(casts(graph)) == 2
    assert check(of_bert, graph).kept
    inputs = text_inputs(bert, 3, 17)
    with torch.inference_mode():
        expected = recipe.steps[0](graphs.fork(bert_graph))(**inputs)["end_logits"]
        found = graph(**inputs)["end_logits"]
    # A number that is rounded before it is counted in 127 steps may be a step off.
    assert (found - expected).abs().max() <= 0.05


def test_linears_in_tiles_of_float32_are_left(bert_graph, kind):
    recipe = compose(TileLinears(anyway=True), kind(anyway=True))
    recipe(graphs.fork(bert_graph))
    refused = [each.reason for each in recipe.steps[1].report.refused]
    assert sum("is in tiles of float32 already; cast before that." in reason for reason in refused) == 12


def test_verify_and_the_float64_run(bert, bert_graph, kind):
    graph = kind(anyway=True)(graphs.fork(bert_graph))
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


def test_saved_and_read(bert, bert_graph, kind, tmp_path):
    graph = kind(anyway=True)(graphs.fork(bert_graph))
    save(graph, tmp_path / "cast.pt2")
    inputs = text_inputs(bert, 2, 9)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "cast.pt2")(**inputs)["end_logits"], graph(**inputs)["end_logits"])


@pytest.mark.slow
def test_it_keeps_the_built_in_checkpoints_quality(built_in, base):
    hold_quality(base, CastToBFloat16(anyway=True), built_in[1])


@pytest.mark.cuda
@requires_cuda
def test_it_keeps_the_built_in_checkpoints_quality_on_a_gpu(gpus_kind):
    model, tokenizer = load(device=torch.device("cuda"))
    hold_quality(capture(model), gpus_kind(), tokenizer)


def hold_quality(base, cast, tokenizer):
    questions, cast = read_squad(QUESTIONS), cast(graphs.fork(base))
    expected, found = (evaluate(graph, tokenizer, questions, batch_size=16).scores["f1"] for graph in (base, cast))
    assert found >= 0.999 * expected


def test_its_text_form_reads_back(kind):
    cast = kind(keep=("embeddings", "LayerNorm"), anyway=True)
    assert repr(cast) == f"{kind.__name__}(anyway=True, keep=('embeddings', 'LayerNorm'), leave=0.0)"
    assert repr(parse_recipe(repr(cast), REGISTRY)) == repr(cast)
    for keep in ("5", "(5,)"):
        with pytest.raises(UsageError, match="does not take the arguments keep"):
            parse_recipe(f"{kind.__name__}(keep={keep})", REGISTRY)
