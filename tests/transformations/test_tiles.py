"""Linears and attention on our own kernels, with what follows them: on every family, between others, and refusals.

They run on a machine without kernels as well, in plain PyTorch (`anyway`).
"""

import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose, hashes, kernels, onednn, products, varlen, verify
from bert_evaluation import graph as graphs
from bert_evaluation.blame import verify_steps
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.kernels.build import why_not_built
from bert_evaluation.probes import default_probes
from bert_evaluation.promise import Approximates, Reassociates
from bert_evaluation.signature import MASK
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    REGISTRY,
    CastToBFloat16,
    FuseLinearActivation,
    FuseResidual,
    FuseSkipLayerNorm,
    MergeLinears,
    PackLinears,
    QuantizeLinears,
    RemoveDropout,
    RemovePadding,
    TileAttention,
    TileLinears,
    parse_recipe,
    recipes,
)
from bert_evaluation.verification import check, in_double, observe

aten = torch.ops.aten
CPU = torch.device("cpu")
WIDE = 16  # numbers that a probe has at least, for its errors to say something

# Sites applied of found, of tiny models with two layers, where TileLinears takes what is float32 too.
LINEARS = dict.fromkeys(FAMILIES, (9, 9)) | {
    "electra": (10, 10),
    "albert": (6, 6),  # its layers share their weights
    "deberta-v2": (13, 13),
    "modernbert": (10, 10),
    "mobilebert": (26, 26),
}
ATTENTIONS = dict.fromkeys(FAMILIES, (2, 2)) | {
    "mpnet": (0, 0),  # written out
    "deberta-v2": (0, 0),
    "modernbert": (0, 2),  # query and key are turned by their positions in between
}
NORMS = dict.fromkeys(FAMILIES, (4, 5)) | {  # that of the embeddings ends no linear
    "modernbert": (2, 6),  # it normalises in front of a layer, and the sum is read further on
    "mobilebert": (0, 0),
}


def steps(*first):
    """The steps to a graph on our own kernels, behind these."""
    return (
        RemoveDropout(),
        MergeLinears(),
        *first,
        TileLinears(anyway=True),
        TileAttention(anyway=True),
        FuseLinearActivation(anyway=True),
        FuseResidual(),
        FuseSkipLayerNorm(),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    base = capture(model)
    probes = [probe for probe in default_probes(model) if probe.inputs["input_ids"].numel() >= WIDE]
    return request.param, model, base, observe(model, probes)


@pytest.fixture
def able(monkeypatch):
    """A machine that has everything, as far as we ask it; the kernels it really has are used."""
    for kind in (torch.int8, torch.bfloat16, torch.float32):
        kernels.why_not(kind, CPU)
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.fixture
def unable(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: "This processor has nothing of the kind.")


def counts(report):
    return len(report.applied), report.found


def targets(graph):
    return [node.target for node in graph.graph.nodes]


def endings(graph):
    """How the linears in tiles end."""
    return [node.args[5:] for node in graphs.calls(graph, kernels.LINEAR)]


def restored(graph, base):
    """Whether a graph is the base again: nodes, and parameters bit for bit and as trainable as before."""
    back, before = dict(graph.named_parameters()), dict(base.named_parameters())
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert all(back[name].requires_grad == before[name].requires_grad for name in before)
    same = hashes.constants_hash(graph) == hashes.constants_hash(base)
    return same and hashes.graph_hash(graph) == hashes.graph_hash(base)


@torch.inference_mode()
def run(graph, inputs):
    return torch.stack(graphs.output_tensors(graph(**inputs)), dim=-1)


def test_every_family_in_bfloat16(subject):
    family, model, base, reference = subject
    taken = steps(CastToBFloat16(anyway=True))
    recipe = compose(*taken)
    graph = recipe(graphs.fork(base))
    linears, attentions, _, _, norms = recipe.reports[3:]
    assert [counts(each) for each in (linears, attentions, norms)] == [
        LINEARS[family],
        ATTENTIONS[family],
        NORMS[family],
    ]
    assert all(refusal.reason.endswith(".") for report in recipe.reports for refusal in report.refused)
    assert aten.linear.default not in targets(graph)
    assert targets(graph).count(kernels.ATTENTION) == ATTENTIONS[family][0]
    assert isinstance(promise_of(graph), Approximates)
    assert all(step.kept for step in verify_steps(reference, recipe, saved=False))
    # Sizes are dynamic still.
    for batch, length in ((1, 1), (1, 2), (3, 31)):
        inputs = text_inputs(model, batch, length)
        assert (run(graph, inputs) - run(base, inputs)).abs().max() <= 4 * 2.0**-8
    for step, count in zip(taken[3:5], (LINEARS, ATTENTIONS), strict=True):
        assert bool(step.get_transformed_nodes(graph)) == bool(count[family][0])
    assert restored(recipe(graph, reverse=True), base)


def test_every_family_in_float32(subject):
    """The promise is that of the same function."""
    family, _, base, reference = subject
    recipe = compose(*steps())
    graph = recipe(graphs.fork(base))
    assert counts(recipe.reports[2]) == LINEARS[family]
    assert counts(recipe.reports[6]) == NORMS[family]
    assert counts(recipe.reports[3]) == ATTENTIONS[family]
    assert recipe.promise == promise_of(graph) == Reassociates()
    found = check(reference, graph)
    assert found.kept, found
    assert restored(recipe(graph, reverse=True), base)


def test_every_family_on_integers(subject):
    """Fused where they return float32 and where they return bfloat16.

    No step is held to float32's rounding here: that of integers makes a whole step of what tips it over.
    """
    family, model, base, reference = subject
    inputs = text_inputs(model, 3, 31)
    for cast in ((), (CastToBFloat16(anyway=True),)):
        taken = steps(QuantizeLinears(anyway=True), *cast)
        recipe = compose(*taken)
        graph = recipe(graphs.fork(base))
        assert counts(recipe.reports[-1]) == NORMS[family]
        assert check(reference, graph).kept
        apart = compose(*taken[: 3 + len(cast)])(graphs.fork(base))
        assert (run(graph, inputs) - run(apart, inputs)).abs().max() <= (12 * 2.0**-8 if cast else 1e-3)
        assert restored(recipe(graph, reverse=True), base)


@pytest.mark.parametrize("preset", ["exact", "bf16", "int8"])
def test_presets_on_every_family(subject, able, preset):
    family, model, base, reference = subject
    (recipe,) = recipes([preset])
    graph = recipe(graphs.fork(base))
    by_name = {report.transformation.partition("(")[0]: report for report in recipe.reports}
    assert by_name["FuseSkipLayerNorm"].applied or not NORMS[family][0]
    assert (promise_of(graph) == Reassociates()) == (preset == "exact")
    assert isinstance(promise_of(graph), Approximates) == (preset != "exact")
    found = check(reference, graph)
    assert found.kept, found
    inputs = text_inputs(model, 2, 9)
    assert (run(graph, inputs) - run(base, inputs)).abs().max() < 0.1
    assert restored(recipe(graph, reverse=True), base)


def test_presets_take_no_harm_where_there_are_no_kernels(bert, bert_graph, unable):
    for preset in ("exact", "bf16", "int8"):
        (recipe,) = recipes([preset])
        graph = recipe(graphs.fork(bert_graph))
        assert kernels.LINEAR not in targets(graph)
        assert verify(bert, graph).kept
        assert restored(recipe(graph, reverse=True), bert_graph)


def test_each_step_alone_is_undone(bert_graph):
    graph = graphs.fork(bert_graph)
    prepared = compose(RemoveDropout(), MergeLinears(), CastToBFloat16(anyway=True))(graph)
    for first, step in (
        ((), TileLinears(anyway=True)),
        ((), TileAttention(anyway=True)),
        ((TileLinears(anyway=True), FuseResidual()), FuseSkipLayerNorm()),
    ):
        before = compose(*first, inplace=False)(prepared) if first else graphs.fork(prepared)
        after = step(graphs.fork(before))
        assert step.report.applied
        assert isinstance(promise_of(after), Approximates)  # of the cast
        assert step.preserves_computation
        assert restored(step(after, reverse=True), before)
        assert not step.get_transformed_nodes(after)


def test_the_model_and_a_sibling_keep_their_weights(bert, bert_graph):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    hashed = hashes.graph_hash(bert_graph)
    compose(*steps())(graphs.fork(bert_graph))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())
    assert hashes.graph_hash(bert_graph) == hashed


def test_shared_weights_are_packed_once():
    graph = TileLinears(anyway=True)(capture(tiny("albert")))
    used = list(graphs.calls(graph, kernels.LINEAR))
    assert len({node.args[1].target for node in used}) == 8 < len(used)


def test_what_is_packed_takes_no_more_memory_but_for_its_ends():
    module = nn.Linear(256, 512)
    graph = TileLinears(anyway=True)(capture(module, {"input": torch.randn(2, 256)}))
    found = sum(tensor.nbytes for tensor in graphs.tensors(graph).values())
    if kernels.multiplies_slices(CPU):
        assert found == module.weight.nbytes * 3 // 4 + 2 * module.bias.nbytes  # with a scale for each output
    else:
        assert found == module.weight.nbytes + module.bias.nbytes


@pytest.fixture
def slices():
    if not kernels.multiplies_slices(CPU):
        pytest.skip("This processor has no AMX.")


def test_on_amx_float32_is_in_slices(slices, bert, bert_graph):
    recipe = compose(*steps())
    graph = recipe(graphs.fork(bert_graph))
    weights = [graphs.get_tensor(graph, str(node.args[1].target)) for node in graphs.calls(graph, kernels.LINEAR)]
    assert weights
    assert all(kernels.is_sliced(weight) for weight in weights)
    assert products.precision(graph) == "fp32"
    late = CastToBFloat16(anyway=True)
    late(compose(*steps()[:3])(graphs.fork(bert_graph)))
    reasons = [refusal.reason for refusal in late.report.refused]
    assert any("is in tiles of float32 already; cast before that." in reason for reason in reasons)
    # No farther from float64 than float32 itself, by more than a little.
    inputs = text_inputs(bert, 4, 31)
    exact = run(in_double(bert_graph), inputs)
    off, usual = ((run(each, inputs) - exact).abs().max() for each in (graph, bert_graph))
    assert off <= 4 * usual


def test_sums_that_might_overflow_are_not_of_slices(slices):
    inputs = kernels.LONGEST_SLICED + 1
    graph = TileLinears()(capture(nn.Linear(inputs, 2), {"input": torch.randn(2, inputs)}))
    (node,) = graphs.calls(graph, kernels.LINEAR)
    assert graphs.get_tensor(graph, str(node.args[1].target)).dtype is torch.float32


def test_slices_that_are_read_without_amx_are_float32_again(slices, bert, bert_graph, tmp_path):
    shared = capture(tiny("albert"))
    inputs = text_inputs(bert, 2, 9)
    for name, base in (("bert", bert_graph), ("albert", shared)):
        graph = compose(*steps())(graphs.fork(base))
        save(graph, tmp_path / f"{name}.pt2")
        variables = os.environ | {"BERT_EVALUATION_AMX": "0"}
        arguments = [tmp_path / f"{name}.pt2", tmp_path / "inputs.pt", tmp_path / "found.pt"]
        torch.save(inputs, arguments[1])
        subprocess.run([sys.executable, "-W", "ignore", "-c", READ_AND_RUN, *arguments], check=True, env=variables)
        assert torch.allclose(torch.load(arguments[2]), run(graph, inputs), atol=1e-5)


# Hard inputs.


def test_padding_and_rows_that_are_masked_in_full(bert, bert_graph):
    graph = compose(*steps(CastToBFloat16(anyway=True)))(graphs.fork(bert_graph))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 4 + [1] * 5, [0] * 9, [0, 1] * 4 + [0]])
    ids = torch.randint(5, 99, mask.shape)
    inputs = text_inputs(bert, *mask.shape) | {"input_ids": ids, MASK: mask}
    found = run(graph, inputs)
    assert found.isfinite().all()
    assert (found - run(bert_graph, inputs)).abs().max() <= 4 * 2.0**-8
    # Each text is answered as if it were alone.
    for row in range(len(mask)):
        alone = run(graph, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        assert (alone[0] - found[row]).abs().max() <= 4 * 2.0**-8


def test_verify_on_all_probes(bert, bert_graph):
    for first in ((), (CastToBFloat16(anyway=True),)):
        graph = compose(*steps(*first))(graphs.fork(bert_graph))
        found = verify(bert, graph)
        assert found.kept, found
        assert found.promise == ("approximates" if first else "reassociates")


def test_the_float64_run(bert, bert_graph):
    """In float64 the kernels' equals compute, with the weights as they were rounded."""
    inputs = text_inputs(bert, 2, 9)
    cast = compose(RemoveDropout(), MergeLinears(), CastToBFloat16(anyway=True))(graphs.fork(bert_graph))
    tiled = compose(*steps()[2:])(graphs.fork(cast))
    exact = run(in_double(tiled), inputs)
    assert exact.dtype is torch.float64
    # But for biases, which are no less exact, it is the same function.
    assert torch.allclose(exact, run(in_double(cast), inputs), atol=1e-12)
    assert kernels.LINEAR in targets(tiled)
    assert torch.allclose(run(in_double(bert_graph), inputs), exact, atol=0.02)


# Between other steps.


@pytest.mark.parametrize("family", ["bert", "albert", "mobilebert"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_padding_is_removed_before_attention_is_tiled(family, place):
    model = tiny(family)
    base = capture(model)
    kinds = list(steps(CastToBFloat16(anyway=True)))
    kinds.insert(place, RemovePadding())
    recipe = compose(*kinds)
    graph = recipe(graphs.fork(base))
    assert targets(graph).count(kernels.PACKED_ATTENTION) == 2
    assert varlen.ATTENTION not in targets(graph)
    tiled = next(graphs.calls(graph, kernels.PACKED_ATTENTION))
    assert {each.meta["val"].dtype for each in tiled.args[:3]} == {torch.bfloat16}
    assert check(observe(model), graph).kept
    inputs = text_inputs(model, 3, 7)
    inputs[MASK][0, 4:] = 0
    inputs[MASK][1, :3] = 0
    real = inputs[MASK].bool()
    assert (run(graph, inputs) - run(base, inputs))[real].abs().max() <= 4 * 2.0**-8
    assert restored(recipe(graph, reverse=True), base)


def test_padding_is_removed_between_linears_in_tiles(bert, bert_graph):
    for first in ((QuantizeLinears(anyway=True),), (CastToBFloat16(anyway=True), TileLinears(anyway=True))):
        recipe = compose(
            RemoveDropout(),
            MergeLinears(),
            *first,
            FuseResidual(),
            FuseSkipLayerNorm(),
            RemovePadding(),
            TileAttention(anyway=True),
        )
        graph = recipe(graphs.fork(bert_graph))
        assert targets(graph).count(varlen.ATTENTION) + targets(graph).count(kernels.PACKED_ATTENTION) == 2
        assert check(observe(bert), graph).kept
        assert restored(recipe(graph, reverse=True), bert_graph)


def test_padding_is_not_removed_behind_attention_in_tiles(bert_graph):
    graph = compose(CastToBFloat16(anyway=True), TileAttention(anyway=True))(graphs.fork(bert_graph))
    removal, before = RemovePadding(), hashes.graph_hash(graph)
    removal(graph)
    assert [refusal.reason for refusal in removal.report.refused] == [
        "attention_default is attention of our kernels already; this step comes before TileAttention."
    ]
    assert hashes.graph_hash(graph) == before


def test_the_mask_that_attention_adds_is_taken_as_it_was(able):
    """One that is written with 0 and -inf is a boolean one again."""
    model = tiny("bert", attn_implementation="eager")
    base = capture(model)
    (recipe,) = recipes(["bf16"])
    graph = recipe(graphs.fork(base))
    fused = [
        node
        for node in graph.graph.nodes
        if node.target in (kernels.ATTENTION, aten.scaled_dot_product_attention.default)
    ]
    assert fused
    assert check(observe(model), graph).kept


def test_steps_in_another_order_and_twice(bert, bert_graph):
    cast = compose(RemoveDropout(), MergeLinears(), CastToBFloat16(anyway=True))(graphs.fork(bert_graph))
    tiling, attending = TileLinears(anyway=True), TileAttention(anyway=True)
    one, other = compose(tiling, attending, inplace=False)(cast), compose(attending, tiling, inplace=False)(cast)
    inputs = text_inputs(bert, 2, 9)
    assert torch.equal(run(one, inputs), run(other, inputs))
    before = hashes.graph_hash(one)
    for step in (tiling, attending):
        step(one)
        assert step.report.found == 0
    assert hashes.graph_hash(one) == before
    late = CastToBFloat16(anyway=True)
    late(FuseResidual()(QuantizeLinears(anyway=True)(RemoveDropout()(graphs.fork(bert_graph)))))
    assert any("has taken in what follows it; cast before that." in refusal.reason for refusal in late.report.refused)
    packing = PackLinears()
    packing(one)
    assert packing.report.found == 0


# Saved and read.


READ_AND_RUN = """
import sys, torch
from bert_evaluation import graph as graphs
from bert_evaluation import kernels
from bert_evaluation.capturing import read
graph = read(sys.argv[1])
weights = [graphs.get_tensor(graph, str(node.args[1].target)) for node in graphs.calls(graph, kernels.LINEAR)]
assert weights and {each.dtype for each in weights} == {torch.float32}
assert not any("scales" in name for name in graphs.read_names(graph))
with torch.inference_mode():
    found = graph(**torch.load(sys.argv[2]))
torch.save(torch.stack(graphs.output_tensors(found), dim=-1), sys.argv[3])
"""
READ = """
import sys
from bert_evaluation.capturing import read
from bert_evaluation.kernels.build import why_not_built
graph = read(sys.argv[1])
print(why_not_built.cache_info().currsize, "bert_evaluation.linear" in graph.code)
"""


def test_saved_and_read(bert, bert_graph, tmp_path):
    inputs, file = text_inputs(bert, 2, 9), tmp_path / "tiled.pt2"
    for first in ((CastToBFloat16(anyway=True),), (QuantizeLinears(anyway=True),), ()):
        graph = compose(*steps(*first))(graphs.fork(bert_graph))
        save(graph, file)
        found = read(file)
        assert torch.equal(run(found, inputs), run(graph, inputs))
        assert targets(found).count(kernels.LINEAR) == targets(graph).count(kernels.LINEAR) > 0
    code = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, file], capture_output=True, text=True, check=True
    )
    asked = why_not_built.cache_info().currsize  # whether there were instructions to compile for
    assert code.stdout.split() == [str(asked), "True"]  # who reads it has the kernels, too


def test_a_machine_that_has_kernels_uses_them_anyway(bert_graph, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: asked.append(kind))
    for step in (TileLinears(anyway=True), TileAttention(anyway=True), QuantizeLinears(anyway=True)):
        asked.clear()
        step(
            compose(CastToBFloat16(anyway=True))(graphs.fork(bert_graph))
            if "Tile" in step.name
            else graphs.fork(bert_graph)
        )
        assert asked


def test_their_text_forms_read_back():
    for step in (TileLinears(anyway=True), TileAttention(), FuseSkipLayerNorm()):
        assert repr(parse_recipe(repr(step), REGISTRY)) == repr(step)


# What they leave alone.


def test_a_machine_without_is_refused(bert_graph, unable):
    graph = CastToBFloat16(anyway=True)(graphs.fork(bert_graph))
    before = hashes.graph_hash(graph)
    for step in (TileLinears(), TileAttention()):
        step(graph)
        assert {refusal.reason for refusal in step.report.refused} == {"This processor has nothing of the kind."}
        assert not step.report.applied
    assert hashes.graph_hash(graph) == before
    TileLinears(anyway=True)(graph)
    assert kernels.LINEAR in targets(graph)


class Odd(nn.Module):
    """Linears, attention and LayerNorms as encoders do not write them."""

    def __init__(self, kind):
        super().__init__()
        self.one, self.other, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind
        self.norm, self.plain = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.wide = nn.LayerNorm([4, 8])

    def forward(self, x):
        y = self.one(x)
        heads = y.view(*x.shape[:2], 2, 4).transpose(1, 2)
        match self.kind:
            case "computed":
                return F.linear(x, self.one.weight * 2)
            case "computed bias":
                return F.linear(x, self.one.weight, self.one.bias * 2)
            case "read by another":
                return y * self.one.weight.sum()
            case "a mask that is added":
                a = F.scaled_dot_product_attention(heads, heads, heads, x[:, None, :, :4])
            case "causal":
                a = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            case "other keys":
                keys = heads[:, :, :2]
                a = F.scaled_dot_product_attention(heads, keys, keys)
            case "odd width":
                odd = y[..., :6].view(*x.shape[:2], 2, 3).transpose(1, 2)
                return F.scaled_dot_product_attention(odd, odd, odd).transpose(1, 2).reshape(*x.shape[:2], 6)
            case "attention":
                a = F.scaled_dot_product_attention(heads, heads, heads)
            case "norm of an input":
                return self.norm(x)
            case "norm over two":
                return self.wide(y + x)
            case "norm without weights":
                return self.plain(y + x)
            case "norm of what others read":
                z = y + x
                return self.norm(z), z * 2
            case "norm of what is written":
                z = self.one(x)
                n = self.norm(z)
                return n, z.add_(1)
            case "written before the norm":
                z = self.one(x)
                z.add_(1)
                return self.norm(z)
            case "norm of a norm":
                return self.norm(self.norm(y + x))
            case "norm of a linear":
                return self.norm(y)
        return a.transpose(1, 2).reshape(*x.shape)


def odd(kind, *first, dtype=torch.float32):
    torch.manual_seed(0)
    module, x = Odd(kind).to(dtype), torch.randn(3, 4, 8, dtype=dtype)
    graph = capture(module, example_inputs={"x": x})
    return module, x, compose(*first)(graph) if first else graph


@pytest.mark.parametrize(
    ("kind", "first", "reason"),
    [
        ("computed", (), "is no stored parameter."),
        ("computed bias", (), "is no stored parameter."),
        ("read by another", (), "would keep the old copy."),
        ("norm of a linear", (PackLinears(),), "is fused or packed for oneDNN already."),
        ("norm of a linear", (FuseResidual(), QuantizeLinears(keep=(), anyway=True)), None),
    ],
)
def test_linears_that_are_left(kind, first, reason, monkeypatch):
    monkeypatch.setattr("bert_evaluation.transformations.packing.LEAST_OUTPUTS", 1)
    _, _, graph = odd(kind, *first)
    before, step = hashes.graph_hash(graph), TileLinears(anyway=True)
    step(graph)
    assert not step.report.applied
    assert [refusal.reason.endswith(reason) for refusal in step.report.refused] == ([True] if reason else [])
    assert hashes.graph_hash(graph) == before


def test_linears_in_float64_are_left():
    _, _, graph = odd("norm of a linear", dtype=torch.float64)
    step = TileLinears(anyway=True)
    step(graph)
    assert [each.reason for each in step.report.refused] == [
        "It computes in torch.float64; the kernels are for bfloat16, int8 and float32."
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("a mask that is added", "is added to the scores; the kernels take a boolean mask."),
        ("causal", "is causal, drops out, or shares keys between heads."),
        ("other keys", "which is more than a tensor split into heads."),
        ("odd width", "A head's width is odd."),
        ("float64", "It computes in torch.float64; the kernels are for bfloat16 and float32."),
    ],
)
def test_attention_that_is_left(kind, reason):
    dtype = torch.float64 if kind == "float64" else torch.bfloat16
    _, _, graph = odd("attention" if kind == "float64" else kind, dtype=dtype)
    before, step = hashes.graph_hash(graph), TileAttention(anyway=True)
    step(graph)
    assert [refusal.reason.endswith(reason) for refusal in step.report.refused] == [True]
    assert not step.report.applied
    assert hashes.graph_hash(graph) == before


def test_attention_and_linears_of_a_model_in_bfloat16():
    module, x, graph = odd("attention", TileLinears(anyway=True), TileAttention(anyway=True), dtype=torch.bfloat16)
    names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert names == [kernels.LINEAR, kernels.ATTENTION]
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), module(x), atol=0.02)


TILED = (TileLinears(anyway=True), FuseResidual())


@pytest.mark.parametrize(
    ("kind", "first", "reason"),
    [
        ("norm of an input", TILED, "It reads x, which is no linear in tiles (TileLinears, QuantizeLinears)."),
        ("norm of a linear", (), "It reads linear, which is no linear in tiles (TileLinears, QuantizeLinears)."),
        ("norm of a linear", (PackLinears(),), "which is no linear in tiles (TileLinears, QuantizeLinears)."),
        ("norm over two", TILED, "It is over more than the last dimension."),
        ("norm without weights", TILED, "Its weights are not stored in float32."),
        ("norm of what others read", TILED, " is also read by mul."),
        ("norm of what is written", TILED, "is also read by add_."),
        ("written before the norm", TILED, "which is no linear in tiles (TileLinears, QuantizeLinears)."),
    ],
)
def test_norms_that_are_left(kind, first, reason):
    module, x, graph = odd(kind, *first)
    before, step = hashes.graph_hash(graph), FuseSkipLayerNorm()
    step(graph)
    assert [refusal.reason.endswith(reason) for refusal in step.report.refused] == [True], step.report.refused
    assert not step.report.applied
    assert hashes.graph_hash(graph) == before
    with torch.inference_mode():
        found, expected = graphs.output_tensors(graph(x=x)), graphs.output_tensors(module(x))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))


def test_a_linear_ends_with_one_norm():
    module, x, graph = odd("norm of a norm", *TILED)
    step = FuseSkipLayerNorm()
    step(graph)
    assert counts(step.report) == (1, 2)
    assert step.report.refused[0].reason.endswith("ends with norm weight already, which comes later or is the same.")
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), module(x), atol=1e-5)


def test_weights_of_norms_in_bfloat16_are_left():
    _, _, graph = odd("norm of a linear", TileLinears(anyway=True), dtype=torch.bfloat16)
    step = FuseSkipLayerNorm()
    step(graph)
    assert [each.reason for each in step.report.refused] == ["Its weights are not stored in float32."]


@pytest.mark.parametrize("quantized", [False, True])
def test_an_activation_that_the_kernels_lack_stays_behind(quantized):
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU())
    first = QuantizeLinears(keep=(), anyway=True) if quantized else TileLinears(anyway=True)
    graph, fusion = first(capture(module, {"input": torch.randn(2, 8)})), FuseLinearActivation(anyway=True)
    fusion(graph)
    assert counts(fusion.report) == (1, 2)
    assert fusion.report.refused[0].reason == "Linears in tiles end with no tanh."
    assert [each[:1] for each in endings(graph)] == [(), ("relu",)]
    x = torch.randn(5, 8)
    with torch.inference_mode():
        assert torch.allclose(graph(input=x), module(x), atol=0.05)


def test_what_comes_later_is_not_taken_in_before():
    """An activation behind a residual is none of the linear's."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return F.gelu(self.linear(x) + x)

    module, x = Late(), torch.randn(5, 8)
    graph = compose(*TILED)(capture(module, {"x": x}))
    fusion = FuseLinearActivation(anyway=True)
    fusion(graph)
    assert fusion.report.refused[0].reason.endswith("ends with residual already, which comes later or is the same.")
    with torch.inference_mode():
        assert torch.allclose(graph(x=x), module(x), atol=1e-5)


def test_onednn_takes_what_is_left(bert_graph, monkeypatch):
    """Linears that stay plain are fused and packed as before."""
    monkeypatch.setattr(kernels, "why_not", lambda kind, device: None if kind is torch.bfloat16 else "Not here.")
    recipe = compose(
        RemoveDropout(),
        TileLinears(),
        FuseLinearActivation(anyway=True),
        FuseResidual(),
        FuseSkipLayerNorm(),
        PackLinears(),
    )
    graph = recipe(graphs.fork(bert_graph))
    assert [counts(report) for report in recipe.reports[1:]] == [(0, 13), (2, 2), (4, 4), (0, 5), (12, 13)]
    assert onednn.BINARY in targets(graph)
