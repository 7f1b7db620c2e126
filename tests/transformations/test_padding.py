"""RemovePadding: on every family, every kind of padding, between other transformations, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MobileBertForQuestionAnswering

from bert_evaluation import capture, compose, hashes, varlen
from bert_evaluation import graph as graphs
from bert_evaluation.answering import Reader
from bert_evaluation.blame import verify_steps
from bert_evaluation.capturing import DYNAMIC, read, save, text_inputs
from bert_evaluation.checkpoints import load_dataset
from bert_evaluation.evaluation import evaluate_together
from bert_evaluation.probes import Probe, default_probes
from bert_evaluation.promise import Bitwise, Reassociates, weakest
from bert_evaluation.signature import MASK
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.squad.batches import Batching
from bert_evaluation.transformation import Site, Transformation, promise_of
from bert_evaluation.transformations import (
    FuseBiasInLinear,
    FuseLinearActivation,
    FuseResidual,
    MergeLinears,
    PackLinears,
    RemoveDropout,
    RemovePadding,
)
from bert_evaluation.verification import check, observe

aten = torch.ops.aten
REFUSED = {
    "mpnet": "softmax is a part of attention that is written out",
    "deberta-v2": "softmax is a part of attention that is written out",
    "modernbert": "reads to_20, which is more than a tensor split into heads",  # rotary positions
}
TAKEN = [family for family in FAMILIES if family not in REFUSED]
MASKS = {
    "right": [1, 1, 1, 1, 0, 0, 0],
    "left": [0, 0, 1, 1, 1, 1, 1],
    "holes": [0, 1, 0, 1, 1, 0, 1],
    "one token": [0, 0, 0, 1, 0, 0, 0],
    "none": [0] * 7,
    "all": [1] * 7,
}


@pytest.fixture(scope="module", params=TAKEN)
def subject(request):
    model = tiny(request.param)
    base = capture(model)
    return model, base, RemovePadding()(graphs.fork(base))


@pytest.fixture(scope="module")
def packed(bert_graph):
    return RemovePadding()(graphs.fork(bert_graph))


def inputs_of(model, mask):
    inputs = text_inputs(model, *mask.shape)
    inputs["input_ids"] = torch.randint(5, 99, mask.shape, generator=torch.Generator().manual_seed(1))
    return inputs | {MASK: mask}


@torch.inference_mode()
def run(graph, inputs):
    return torch.stack(graphs.output_tensors(graph(**inputs)), dim=-1)


def every_kind_of_padding(model):
    rows = torch.tensor(list(MASKS.values()))
    masks = {
        "every kind of padding": rows,
        "nothing but padding": torch.zeros(3, 5, dtype=torch.int64),
        "batch 1, length 1, padding": torch.zeros(1, 1, dtype=torch.int64),
        "length 2": torch.tensor([[1, 0], [0, 1], [1, 1]]),
    }
    return [Probe(name, inputs_of(model, mask)) for name, mask in masks.items()]


def test_every_family(subject):
    model, base, graph = subject
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(varlen.ATTENTION) == 2
    assert targets.count(varlen.PLACES) == targets.count(varlen.PAD) == 1
    assert aten.scaled_dot_product_attention.default not in targets
    assert aten.__and__.Tensor not in targets  # the old mask is gone
    assert graphs.input_names(graph) == graphs.input_names(base)
    found = check(observe(model, [*default_probes(model), *every_kind_of_padding(model)]), graph)
    assert found.kept, found
    assert (found.promise, found.where) == ("reassociates", MASK)
    before = inputs_of(model, torch.tensor(list(MASKS.values())))
    copies = {name: tensor.clone() for name, tensor in before.items()}
    padded = run(graph, before)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    assert not padded[before[MASK] == 0].any()
    RemovePadding()(graph_of_its_own := graphs.fork(base))
    RemovePadding()(graph_of_its_own, reverse=True)
    assert hashes.graph_hash(graph_of_its_own) == hashes.graph_hash(base)
    assert torch.equal(run(graph_of_its_own, before), run(base, before))


def test_embeddings_are_looked_up_for_real_tokens_only(subject):
    model, base, graph = subject
    lookups = list(graphs.calls(graph, aten.embedding.default))
    if isinstance(model, MobileBertForQuestionAnswering):
        assert all(node.args[1].target is not varlen.UNPAD for node in lookups)  # it packs what neighbours are part of
        return
    assert len(lookups) == len(list(graphs.calls(base, aten.embedding.default))) > 1
    assert all(node.args[1].target is varlen.UNPAD for node in lookups)
    assert len(list(graphs.calls(graph, varlen.UNPAD))) == len(lookups)


def test_what_is_not_only_looked_up_is_packed_as_it_is():
    class Encoder(torch.nn.Module):
        """Its embeddings are mixed along the text before they are attended to."""

        def __init__(self):
            super().__init__()
            self.words, self.linear = torch.nn.Embedding(99, 8), torch.nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask):
            x = self.words(input_ids) + self.words(input_ids).cumsum(1)
            q = self.linear(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            mask = attention_mask[:, None, None, :].bool()
            found = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
            return found.transpose(1, 2).reshape(x.shape)

    inputs = {"input_ids": torch.arange(15).view(3, 5), MASK: torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 5])}
    base = capture(Encoder().eval(), inputs)
    graph, step = graphs.fork(base), RemovePadding()
    step(graph)
    assert step.report.applied, step.report.refused
    (unpad,) = graphs.calls(graph, varlen.UNPAD)
    assert unpad.args[0].target is aten.add.Tensor
    real = inputs[MASK].bool()
    with torch.inference_mode():
        assert torch.allclose(graph(**inputs)[real], base(**inputs)[real], atol=1e-6)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused(family):
    graph = capture(tiny(family))
    before, removal = hashes.graph_hash(graph), RemovePadding()
    removal(graph)
    assert removal.report.found == 1
    assert REFUSED[family] in removal.report.refused[0].reason
    assert removal.report.refused[0].reason.endswith(".")
    assert hashes.graph_hash(graph) == before
    assert promise_of(graph) == Bitwise()


def test_as_each_sequence_alone_without_padding(subject):
    model, base, graph = subject
    if isinstance(model, MobileBertForQuestionAnswering):
        pytest.skip("MobileBERT embeds a token with its neighbours, padding or not, before there is anything to pack")
    lengths = [1, 9, 4, 4, 9]
    together = inputs_of(model, (torch.arange(9) < torch.tensor(lengths)[:, None]).long())
    found = run(graph, together)
    for row, length in enumerate(lengths):
        alone = run(base, {name: tensor[row : row + 1, :length] for name, tensor in together.items()})
        assert torch.allclose(found[row, :length], alone[0], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 6), length=st.integers(1, 20))
def test_any_mask(bert, bert_graph, packed, data, batch, length):
    bits = data.draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length))
    inputs = inputs_of(bert, torch.tensor(bits).reshape(batch, length))
    real = inputs[MASK].bool()
    expected, got = run(bert_graph, inputs), run(packed, inputs)
    assert got.shape == expected.shape
    assert torch.allclose(got[real], expected[real], atol=1e-5)
    assert not got[~real].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_packing_and_padding(dtype):
    mask = torch.tensor(list(MASKS.values())).to(dtype)
    x = torch.randn(*mask.shape, 5).transpose(1, 2).contiguous().transpose(1, 2)
    packed = varlen.unpad(x, varlen.places(mask))
    assert packed.shape == (1, int(mask.sum()), 5)
    assert torch.equal(varlen.pad(packed, mask), x * mask[..., None])


def test_attention_of_slices_and_of_neighbours_of_one_length():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 1]])
    query, key, value = torch.randn(5, 3, 24).split(8, dim=-1)
    packed = [varlen.unpad(x, varlen.places(mask)) for x in (query, key, value)]
    sliced = varlen.unpad(torch.cat([query, key, value], dim=-1), varlen.places(mask)).split(8, dim=-1)
    found = varlen.ATTENTION(*packed, varlen.offsets(mask), 3, 2, 0.7)
    assert torch.equal(varlen.ATTENTION(*sliced, varlen.offsets(mask), 3, 2, 0.7), found)
    heads = (x.view(5, 3, 2, 4).transpose(1, 2) for x in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(*heads, mask.bool()[:, None, None, :], scale=0.7)
    assert torch.allclose(
        found, varlen.unpad(attended.transpose(1, 2).reshape(5, 3, 8), varlen.places(mask)), atol=1e-6
    )


ORDERS = {
    "last": (RemoveDropout, MergeLinears, FuseLinearActivation, FuseResidual, PackLinears, RemovePadding),
    "first": (RemovePadding, RemoveDropout, MergeLinears, FuseLinearActivation, FuseResidual, PackLinears),
    "between": (MergeLinears, RemovePadding, FuseBiasInLinear, PackLinears),
    "behind bias": (FuseBiasInLinear, MergeLinears, RemovePadding),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["bert", "albert", "mobilebert"])
def test_before_and_behind_others(family, order):
    model = tiny(family)
    base = capture(model)
    recipe = compose(*(kind() for kind in ORDERS[order]), inplace=False)
    graph = recipe(base)
    alone = compose(*(kind() for kind in ORDERS[order] if kind is not RemovePadding), inplace=False)
    alone(base)
    others = [report for report in recipe.reports if report.transformation != "RemovePadding()"]
    assert [len(report.applied) for report in others] == [len(report.applied) for report in alone.reports]
    assert any(node.target is varlen.ATTENTION for node in graph.graph.nodes)
    assert recipe.promise == promise_of(graph) == Reassociates(where=MASK)
    reference = observe(model, [*default_probes(model), *every_kind_of_padding(model)])
    assert check(reference, graph).kept
    assert all(step.kept for step in verify_steps(reference, recipe))
    back = recipe(graph, reverse=True)
    assert hashes.graph_hash(back) == hashes.graph_hash(base)
    assert hashes.constants_hash(back) == hashes.constants_hash(base)


def test_saved_and_read_in_another_process(bert, packed, tmp_path):
    save(packed, tmp_path / "packed.pt2")
    graph, inputs = read(tmp_path / "packed.pt2"), inputs_of(bert, torch.tensor(list(MASKS.values())))
    assert torch.equal(run(graph, inputs), run(packed, inputs))
    for batch, length in ((1, 1), (3, 19)):
        inputs = text_inputs(bert, batch, length)
        assert torch.equal(run(graph, inputs), run(packed, inputs))
    # The outputs' class has to be known to read any graph that returns it.
    code = "import sys, transformers.modeling_outputs; from bert_evaluation.capturing import read"
    code += "; print(read(sys.argv[1]).code)"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "packed.pt2")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "varlen_attention" in printed


class Spoilt(Transformation):
    """Adds something to the first output where the mask has this value."""

    def __init__(self, at, promise):
        self.at = at
        self._promise = promise

    @property
    def promise(self):
        return self._promise

    def sites(self, graph):
        return [Site(next(graphs.calls(graph, aten.contiguous.default)))]

    def rewrite(self, graph, site):
        mask = next(node for node in graph.graph.find_nodes(op="placeholder") if node.target == MASK)
        with graph.graph.inserting_after(site.node):
            there = graph.graph.call_function(aten.eq.Scalar, (mask, self.at))
        with graph.graph.inserting_after(there):
            spoilt = graph.graph.call_function(aten.add.Tensor, (site.node, there))
        site.node.replace_all_uses_with(spoilt, delete_user_cb=lambda user: user is not spoilt)


@pytest.mark.parametrize(
    ("at", "promise", "verdict"),
    [
        (0, Reassociates(), "broken"),
        (0, Bitwise(), "broken"),
        (0, Reassociates(where=MASK), "kept"),
        (0, Bitwise(where=MASK), "kept"),
        (1, Reassociates(where=MASK), "broken"),
        (1, Bitwise(where=MASK), "broken"),
    ],
)
def test_only_a_promise_that_says_so_leaves_padding_out(bert, bert_graph, at, promise, verdict):
    found = check(observe(bert), Spoilt(at, promise)(graphs.fork(bert_graph)))
    assert found.verdict == verdict
    assert found.where == promise.where
    assert found.compared == ("" if promise.where is None else "compared where attention_mask is 1")


def test_a_fault_behind_the_removal_is_traced(bert, bert_graph):
    reference = observe(bert)
    for at, kept in ((0, True), (1, False)):
        recipe = compose(RemovePadding(), Spoilt(at, Reassociates()))
        removal, spoilt = list(verify_steps(reference, recipe, saved=False))
        assert removal.kept
        assert (spoilt.kept, spoilt.verification.where) == (kept, MASK)
    assert (spoilt.blame.probe, spoilt.blame.node) == ("batch 1, length 1", "output")


def test_a_fault_within_what_is_packed_is_found(bert, bert_graph):
    removal, graph = RemovePadding(), graphs.fork(bert_graph)
    removal(graph)
    second = list(graphs.calls(graph, varlen.ATTENTION))[1]
    second.update_arg(5, 2.0)
    graph.recompile()
    found = check(observe(bert, [*every_kind_of_padding(bert), *default_probes(bert)]), graph)
    assert (found.verdict, found.failing_probe) == ("broken", "every kind of padding")
    assert "layer.1.attention" in found.first_difference


def test_packed_results_are_no_padded_ones(bert, bert_graph):
    graph = RemovePadding()(graphs.fork(bert_graph))
    padding = next(graphs.calls(graph, varlen.PAD))
    padding.replace_all_uses_with(padding.args[0])
    graph.recompile()
    found = check(observe(bert, every_kind_of_padding(bert)), graph)
    assert (found.verdict, found.error) == ("broken", float("inf"))


def test_the_weakest_promise_keeps_where():
    assert weakest([]) == Bitwise()
    assert weakest([Reassociates(where=MASK), Bitwise()]) == Reassociates(where=MASK)
    assert weakest([Bitwise(), Bitwise(where=MASK), Reassociates()]) == Reassociates(where=MASK)


class Encoder(nn.Module):
    """One attention over embedded tokens, in many ways."""

    def __init__(self, kind):
        super().__init__()
        self.words, self.kind = nn.Embedding(50, 8), kind
        self.qkv, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        kind, (batch, length) = self.kind, input_ids.shape
        x = self.words(input_ids)
        real = attention_mask.bool()[:, None, None, :]
        places = torch.arange(length)
        near = (places[:, None] - places).abs()
        masks = {
            "additive mask": (1.0 - attention_mask[:, None, None, :]) * torch.finfo(torch.float32).min,
            "weak mask": (1.0 - attention_mask[:, None, None, :]) * -2.0,
            "window": real & (near <= 64),
            "causal mask": real & (places[:, None] >= places),
            "position bias": torch.where(real, -0.1 * near, -torch.inf),
            "mask of ids": (input_ids != 0)[:, None, None, :],
            "no mask": None,
            "causal": None,
        }
        split = [linear(x).view(batch, length, 2, 4).transpose(1, 2) for linear in self.qkv]
        if kind == "scaled heads":
            split[0] = split[0] * 2
        a = nn.functional.scaled_dot_product_attention(
            *split, masks.get(kind, real), is_causal=kind == "causal", scale=0.5
        )
        if kind == "heads are read":
            return a.mean(dim=1)
        y = self.last(a.transpose(1, 2).reshape(batch, length, 8)) + x
        match kind:
            case "neighbours":
                y = y + y.roll(1, dims=1)
            case "pooled":
                return y[:, 0]
            case "differs between positions":
                y = y + torch.arange(length)[None, :, None]
            case "softmax":
                y = y.softmax(dim=1)
            case "product of tokens":
                y = y @ y.transpose(1, 2)
        return (y, a) if kind == "attention is an output" else y


REFUSALS = {
    "weak mask": "is no padding mask: not every token",
    "window": "is no padding mask: not every token",
    "causal mask": "is no padding mask: not every token",
    "position bias": "is no padding mask: not every token",
    "mask of ids": "is no padding mask: it depends on input_ids too",
    "no mask": "attends to padding too: it has no mask",
    "causal": "is causal, drops out, or shares keys between heads",
    "scaled heads": ", which is more than a tensor split into heads",
    "heads are read": "is read otherwise than by what joins its heads",
    "attention is an output": "is read otherwise than by what joins its heads",
    "neighbours": "roll (aten.roll.default) is not known to treat each position by itself",
    "pooled": "is not known to treat each position by itself",
    "differs between positions": "which may differ between positions",
    "softmax": "softmax (aten.softmax.int) is not known",
    "product of tokens": "is not known to treat each position by itself",
}


def encoder(kind):
    torch.manual_seed(0)
    module = Encoder(kind).eval()
    ids = torch.arange(12).reshape(3, 4)
    dynamic = {name: {0: DYNAMIC, 1: DYNAMIC} for name in ("input_ids", MASK)}
    return module, capture(module, {"input_ids": ids, MASK: torch.ones_like(ids)}, dynamic)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refuses_what_mixes_positions(kind):
    _, graph = encoder(kind)
    before, removal = hashes.graph_hash(graph), RemovePadding()
    removal(graph)
    assert len(removal.report.refused) == 1
    assert REFUSALS[kind] in removal.report.refused[0].reason
    assert hashes.graph_hash(graph) == before


@pytest.mark.parametrize("kind", ["mask of booleans", "additive mask"])
def test_hidden_states_are_padded_and_a_residual_from_the_entry_is_packed(kind):
    module, graph = encoder(kind)
    RemovePadding()(graph)
    inputs = {"input_ids": torch.arange(42).reshape(6, 7), MASK: torch.tensor(list(MASKS.values()))}
    real = inputs[MASK].bool()
    with torch.inference_mode():
        expected, got = module(**inputs), graph(**inputs)
    assert torch.allclose(got[real], expected[real], atol=1e-6)
    assert not got[~real].any()


def test_a_graph_without_attention_has_no_site_and_one_without_the_mask_is_refused():
    removal = RemovePadding()
    removal(capture(nn.Linear(4, 4), {"input": torch.randn(3, 4)}))
    assert removal.report.found == 0

    class Unmasked(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    removal(capture(Unmasked(), {"x": torch.randn(2, 2, 3, 4)}))
    assert "no input attention_mask" in removal.report.refused[0].reason


@pytest.mark.slow
def test_the_same_answers(built_in, base):
    graph, tokenizer = RemovePadding()(graphs.fork(base)), built_in[1]
    readers = {name: Reader(each, tokenizer, AnswerRule()) for name, each in (("base", base), ("packed", graph))}
    found = evaluate_together(readers, load_dataset(), Batching(size=16))
    assert found["base"].work.padding > 0
    assert found["packed"].answers == found["base"].answers
    assert found["packed"].scores == found["base"].scores
