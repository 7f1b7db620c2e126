"""Attentions: fused, their factors folded, their masks hoisted, on every family and in every written form."""

import math
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bert_evaluation import capture, compose, hashes, verify
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import dynamic_dimensions, read, save, text_inputs
from bert_evaluation.listing import listing, step_diffs
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import history
from bert_evaluation.transformations import (
    ORIGINAL,
    REGISTRY,
    EliminateCommonSubexpressions,
    FoldAttentionScale,
    FuseAttention,
    HoistMask,
    MergeLinears,
    original_recipes,
)
from bert_evaluation.verification import Probe, check, observe

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
KINDS = (FuseAttention, FoldAttentionScale, HoistMask)
LOWEST = torch.finfo(torch.float32).min
ONLY_WRITTEN_OUT = ("mpnet", "deberta-v2")  # transformers has no other form of them

# Sites applied of found, in tiny models with two layers whose attention is written out, and in those of the operator.
EAGER = {
    FuseAttention: dict.fromkeys(FAMILIES, (2, 2)),
    FoldAttentionScale: dict.fromkeys(FAMILIES, (2, 2))
    | {
        "albert": (1, 1),  # its layers share their weights
        "deberta-v2": (0, 2),  # the query is multiplied by positions too
        "modernbert": (0, 2),  # the query is rotated
    },
    HoistMask: dict.fromkeys(FAMILIES, (1, 1))
    | {
        "mpnet": (2, 2),  # mask, and bias of positions
        "deberta-v2": (0, 2),  # differs from query to query
        "modernbert": (1, 2),  # the second is a window
    },
}
OPERATOR = EAGER | {FuseAttention: dict.fromkeys(FAMILIES, (0, 0))}


@pytest.fixture(scope="module", params=FAMILIES)
def eager(request):
    model = tiny(request.param, attn_implementation="eager")
    return request.param, model, capture(model), observe(model)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ONLY_WRITTEN_OUT])
def operator(request):
    model = tiny(request.param, attn_implementation="sdpa")
    return request.param, model, capture(model), observe(model)


def parameters(graph):
    return {name: tensor.detach().clone() for name, tensor in graphs.tensors(graph).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def count(graph, *targets):
    return len(list(graphs.calls(graph, *targets)))


def applied_of_found(transformation):
    return len(transformation.report.applied), transformation.report.found


def hold(subject, kind, expected):
    """Counts, promise, isolation, dynamic sizes, and the exact way back."""
    family, model, base, reference = subject
    transformation, graph = kind(), graphs.fork(base)
    hash_before, of_base, of_model = hashes.graph_hash(base), parameters(base), parameters(model)
    transformation(graph)
    if expected is not None:
        assert applied_of_found(transformation) == expected[kind][family]
    applied = transformation.report.applied
    assert all(refusal.reason.endswith(".") for refusal in transformation.report.refused)
    assert (hashes.graph_hash(graph) != hash_before) == bool(applied)
    assert bool(transformation.get_transformed_nodes(graph)) == bool(applied)
    verdict = check(reference, graph)
    assert verdict.kept, verdict
    if kind.promise is Bitwise:
        assert verdict.max_abs_error == 0
    assert all("val" in node.meta for node in transformation.get_transformed_nodes(graph))
    assert dynamic_dimensions(graph) == dynamic_dimensions(base)
    assert same(parameters(model), of_model)
    assert hashes.graph_hash(base) == hash_before
    transformation(graph, reverse=True)
    assert hashes.graph_hash(graph) == hash_before
    assert same(parameters(graph), of_base)
    assert history(graph) == ()
    return len(applied)


@pytest.mark.parametrize("kind", KINDS)
def test_written_out(eager, kind):
    applied = hold(eager, kind, EAGER if kind in EAGER else None)
    assert applied > 0 or kind in (FoldAttentionScale, HoistMask)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator(operator, kind):
    hold(operator, kind, OPERATOR if kind in OPERATOR else None)


def test_all_of_them_after_the_original_ones(eager):
    _, _, base, reference = eager
    recipe = compose(*(kind() for kind in (*KINDS, *ORIGINAL)), inplace=False)
    graph = recipe(base)
    assert check(reference, graph).kept
    assert (count(graph, SDPA), count(graph, aten.softmax.int)) == (2, 0)
    back = recipe(graph, reverse=True)
    assert hashes.graph_hash(back) == hashes.graph_hash(base)
    assert same(parameters(back), parameters(base))


def test_sizes_stay_dynamic_also_when_saved(eager, tmp_path):
    _, model, base, _ = eager
    graph = compose(*(kind() for kind in KINDS), inplace=False)(base)
    save(graph, tmp_path / "graph.pt2")
    again = read(tmp_path / "graph.pt2")
    assert count(again, SDPA) == 2
    for batch, length in ((1, 1), (1, 2), (3, 31), (2, 500)):
        inputs = text_inputs(model, batch, length)
        inputs["attention_mask"][0, length // 2 :] = 0
        with torch.inference_mode():
            expected, *others = (graphs.output_tensors(each(**inputs)) for each in (base, graph, again))
        for found in others:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_listings_and_diffs_say_who_made_what(eager):
    _, _, base, _ = eager
    text = listing(FuseAttention()(graphs.fork(base)))
    assert text.count("; by FuseAttention") >= 2
    (step,) = step_diffs(base, FuseAttention())
    added = [line for line in step.diff.splitlines() if line.startswith("+ ") and "= aten.scaled_dot_product" in line]
    assert len(added) == 2
    assert all("float32[batch, 4, length, " in line for line in added)


def test_hashes_are_the_same_in_every_process():
    program = (
        "from families import tiny; from bert_evaluation import capture, compose, hashes;"
        "from bert_evaluation.transformations import *;"
        "recipe = compose(FuseAttention(), EliminateCommonSubexpressions(), HoistMask(), FoldAttentionScale());"
        "print(hashes.graph_hash(recipe(capture(tiny('mpnet', num_hidden_layers=1)))))"
    )
    code = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(code, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    recipe = compose(FuseAttention(), EliminateCommonSubexpressions(), HoistMask(), FoldAttentionScale())
    assert run.stdout.split()[-1] == hashes.graph_hash(recipe(capture(tiny("mpnet", num_hidden_layers=1))))


def test_they_are_registered_and_not_among_the_original_recipes():
    assert set(KINDS) <= set(REGISTRY)
    names = " ".join(recipe.name for recipe in original_recipes())
    assert not [kind for kind in KINDS if kind.__name__ in names]


# Attentions written by hand.


class Written(nn.Module):
    """An attention whose parts can be written otherwise."""

    def __init__(self, heads=4, width=16, **parts):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = heads
        self.register_buffer("root", torch.tensor(math.sqrt(width // heads)))
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.parts = parts

    def part(self, name, *arguments):
        return self.parts[name](self, *arguments) if name in self.parts else arguments[0]

    def forward(self, x, mask):
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        keep = mask.bool()[:, None, None, :]
        scores = self.part("scores", self.part("q", query) @ self.part("k", key).transpose(-1, -2), keep)
        weights = self.part("softmax", scores)
        if "softmax" not in self.parts:
            weights = torch.softmax(scores, -1)
        result = self.part("weights", weights, value)
        if "weights" not in self.parts:
            result = weights @ value
        result = self.part("result", result, scores, weights)
        return result if isinstance(result, tuple) else result.transpose(1, 2).flatten(2)


def inputs(batch=3, length=5, width=16):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    mask[batch // 2] = 0
    return {"x": torch.randn(batch, length, width), "mask": mask}


def written(**parts):
    module = Written(**parts).eval()
    return module, capture(module, example_inputs=inputs())


def additive(keep, lowest=LOWEST):
    return torch.where(keep, 0.0, lowest)


FORMS = {
    "no scale, no mask": {},
    "factor on the scores": {"scores": lambda m, s, keep: s * 0.5 + additive(keep)},
    "divisor on the scores": {"scores": lambda m, s, keep: additive(keep) + s / 2.0},
    "factor on the query": {"q": lambda m, q: q * 0.25, "scores": lambda m, s, keep: s + additive(keep)},
    "divisor on the key": {"k": lambda m, k: k / 3, "scores": lambda m, s, keep: s + additive(keep)},
    "factors everywhere": {
        "q": lambda m, q: q * 0.5,
        "k": lambda m, k: k * 0.5,
        "scores": lambda m, s, keep: s / 0.25 + additive(keep),
    },
    "factor after a bias": {"scores": lambda m, s, keep: (s + keep.float()) * 0.5},
    "stored divisor": {"scores": lambda m, s, keep: s / m.root + additive(keep)},
    "in place": {"scores": lambda m, s, keep: (s / 2).add_(additive(keep)).mul_(0.5)},
    "masked_fill": {"scores": lambda m, s, keep: (s * 0.5).masked_fill(~keep, LOWEST)},
    "masked_fill in place": {"scores": lambda m, s, keep: s.masked_fill_(~keep, LOWEST)},
    "where": {"scores": lambda m, s, keep: torch.where(keep, s, LOWEST)},
    "where, the other way round": {"scores": lambda m, s, keep: torch.where(~keep, LOWEST, s)},
    "bias, then masked_fill": {
        "scores": lambda m, s, keep: (s * 0.5 + keep.float().expand(-1, -1, s.shape[-1], -1)).masked_fill(~keep, LOWEST)
    },
    "two masks": {"scores": lambda m, s, keep: s + additive(keep, -9.0) + keep.float()},
    "softmax in float32, dropout in eval": {
        "softmax": lambda m, s: nn.functional.dropout(torch.softmax(s, -1, dtype=torch.float32).to(s.dtype), 0.1, False)
    },
    "a copy of the probabilities": {"weights": lambda m, w, v: w.contiguous() @ v},
    "key that is not transposed last": {"k": lambda m, k: k.permute(0, 1, 3, 2).contiguous().transpose(-1, -2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_written_form(form):
    module, base = written(**FORMS[form])
    graph, transformation = graphs.fork(base), FuseAttention()
    transformation(graph)
    assert applied_of_found(transformation) == (1, 1), transformation.report.refused
    assert (count(graph, SDPA), count(graph, aten.softmax.int, aten.matmul.default)) == (1, 0)
    probes = probe_inputs()
    assert verify(module, graph, probes).kept, verify(module, graph, probes)
    transformation(graph, reverse=True)
    assert hashes.graph_hash(graph) == hashes.graph_hash(base)
    assert same(parameters(graph), parameters(base))


def probe_inputs():
    return [Probe(f"batch {batch}", inputs(batch)) for batch in (1, 2, 7)]


REFUSED = {
    "scores are an output": ({"result": lambda m, r, s, w: (r, s)}, "The scores (matmul) are an output"),
    "scores read by another": ({"result": lambda m, r, s, w: (r, s.sum(-1))}, "are also read by sum"),
    "probabilities are an output": ({"result": lambda m, r, s, w: (r, w)}, "probabilities (softmax) are an output"),
    "probabilities read by another": ({"result": lambda m, r, s, w: (r, w.amax(-1))}, "are also read by amax"),
    "over the queries": ({"softmax": lambda m, s: torch.softmax(s, -2)}, "over dimension -2"),
    "a learned factor": ({"scores": lambda m, s, keep: s * m.factor}, "by something that is no constant"),
    "capped scores": ({"scores": lambda m, s, keep: torch.tanh(s)}, "come from tanh (aten.tanh.default)"),
    "-inf in a mask": ({"scores": lambda m, s, keep: s + additive(keep, -math.inf)}, "masks with -inf"),
    "-inf filled in": ({"scores": lambda m, s, keep: s.masked_fill(~keep, -math.inf)}, "masks with -inf"),
    "a small number filled in": ({"scores": lambda m, s, keep: s.masked_fill(~keep, -1e4)}, "fills in -10000"),
    "dropout": (
        {"softmax": lambda m, s: nn.functional.dropout(torch.softmax(s, -1), 0.1, True)},
        "drops probabilities out",
    ),
    "masked heads": ({"softmax": lambda m, s: torch.softmax(s, -1) * m.factor}, "stands between the softmax and"),
    "second factor": ({"weights": lambda m, w, v: w.mT @ w}, "read by"),
    "transposed probabilities": (
        {"weights": lambda m, w, v: v.mT @ w},
        "has the probabilities as its second factor",
    ),
    "a mask that widens": (
        {"scores": lambda m, s, keep: s + torch.zeros(2, 1, 1, 1, 1)},
        "widens the scores",
    ),
    "einsum": ({"weights": lambda m, w, v: torch.einsum("bhqk,bhkd->bhqd", w, v)}, "einsum"),
    "one key for all heads": ({"k": lambda m, k: k[:, :1]}, "do not fit one attention"),
    "type of the mask": ({"scores": lambda m, s, keep: s + keep.long()}, "is torch.int64 and the query torch.float32"),
    "a number added": ({"scores": lambda m, s, keep: s + 1.0}, "adds up no scores and mask"),
    "a vector added": ({"scores": lambda m, s, keep: s + m.root}, "by what is no matrix"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_must_not_fire_and_says_why(form):
    parts, reason = REFUSED[form]
    _, base = written(**parts)
    graph, transformation = graphs.fork(base), FuseAttention()
    transformation(graph)
    (refusal,) = transformation.report.refused
    assert reason in refusal.reason
    assert refusal.reason.endswith(".")
    assert hashes.graph_hash(graph) == hashes.graph_hash(base)


def test_a_softmax_that_nothing_multiplies_is_no_site():
    class Classifier(nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.mT, -1)

    transformation = FuseAttention()
    transformation(capture(Classifier(), example_inputs={"x": torch.randn(2, 3, 4)}))
    assert transformation.report.found == 0


def test_what_is_written_into_between_is_refused():
    class Writes(nn.Module):
        def forward(self, q, k, v, bias):
            bias = bias * 2
            weights = torch.softmax(q @ k.mT + bias, -1)
            bias.zero_()
            return weights @ v, bias.sum()

    tensors = {name: torch.randn(2, 3, 4, 4) for name in ("q", "k", "v", "bias")}
    transformation = FuseAttention()
    transformation(capture(Writes(), example_inputs=tensors))
    assert "zero_ writes into mul in place" in transformation.report.refused[0].reason


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4, 8, 16]),
    factor=st.floats(0.01, 4) | st.floats(-2, -0.01),
    divides=st.booleans(),
    where=st.sampled_from(["q", "k", "scores"]),
)
def test_any_number_of_heads_and_any_factor(heads, factor, divides, where):
    def scaled(module, tensor, *keep):
        tensor = tensor / factor if divides else tensor * factor
        return tensor + additive(keep[0]) if keep else tensor

    module, base = written(heads=heads, **{where: scaled})
    for recipe in (FuseAttention(), FoldAttentionScale(), compose(FuseAttention(), FoldAttentionScale())):
        graph = compose(recipe, inplace=False)(base)
        assert recipe.report.applied
        assert not recipe.report.refused
        assert verify(module, graph, probe_inputs()).kept


# Folding the factor.


def folded(graph):
    transformation = FoldAttentionScale()
    transformation(graph)
    return transformation


def test_the_default_scale_is_folded_too_and_a_scale_of_1_is_no_site():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(self.query(x), x, x)

    module = Attention()
    graph = capture(module, example_inputs={"x": torch.randn(2, 3, 8)})
    assert applied_of_found(folded(graph)) == (1, 1)
    assert next(graphs.calls(graph, SDPA)).kwargs["scale"] == 1.0
    torch.testing.assert_close(graphs.get_tensor(graph, "query.weight"), module.query.weight / math.sqrt(8))
    assert verify(module, graph).kept
    assert folded(graph).report.found == 0


def test_of_merged_linears_only_the_rows_of_the_query_are_multiplied(bert, bert_graph):
    graph = compose(MergeLinears(), inplace=False)(bert_graph)
    name = "bert.encoder.layer.0.attention.self.query_key_value.weight"
    before = graphs.get_tensor(graph, name).detach().clone()
    assert applied_of_found(folded(graph)) == (2, 2)
    after = graphs.get_tensor(graph, name)
    torch.testing.assert_close(after[:32], before[:32] / math.sqrt(8))
    assert torch.equal(after[32:], before[32:])
    assert verify(bert, graph).kept


def test_a_query_that_is_rotated_is_refused():
    transformation = folded(written(q=lambda m, q: (q + q.flip(-1)) * 0.5)[1])
    assert "comes from add (aten.add.Tensor), through which no factor moves" in transformation.report.refused[0].reason


def test_a_query_that_another_reads_is_refused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x):
            query = self.query(x)
            return nn.functional.scaled_dot_product_attention(query, x, x) + query

    transformation = folded(capture(Both(), example_inputs={"x": torch.randn(2, 3, 8)}))
    assert "is read by more than one" in transformation.report.refused[0].reason


def test_weights_of_another_linear_too_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(self.query(x), self.query(x), x)

    transformation = folded(capture(Tied(), example_inputs={"x": torch.randn(2, 3, 8)}))
    assert "query.weight is also read by" in transformation.report.refused[0].reason


def test_a_factor_behind_a_bias_is_none_of_the_query():
    assert folded(written(scores=lambda m, s, keep: (s + keep.float()) * 0.5)[1]).report.found == 0


# Masks.


def test_a_hoisted_mask_has_one_row_for_all_queries(base, built_in):
    graph = HoistMask()(graphs.fork(base))
    masks = {node.args[3] for node in graphs.calls(graph, SDPA)}
    (mask,) = masks
    assert mask.meta["val"].dtype == torch.float32
    assert mask.meta["val"].shape[1:3] == (1, 1)
    assert count(graph, aten.expand.default) == 0


class TwoLayers(nn.Module):
    """Two attentions with masks made by `mask`."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, mask):
        made = self.mask(mask.bool()[:, None, None, :], x)
        for _ in range(2):
            x = nn.functional.scaled_dot_product_attention(x, x, x, made)
        return x


def hoisted(mask):
    module = TwoLayers(mask)
    example = {"x": torch.randn(3, 2, 5, 8), "mask": inputs()["mask"]}
    base = capture(module, example_inputs=example)
    transformation = HoistMask()
    return module, base, transformation, transformation(graphs.fork(base))


def test_a_mask_that_differs_from_query_to_query_is_only_made_additive():
    def causal(keep, x):
        return keep & torch.ones(5, 5, dtype=torch.bool).tril()

    _, base, transformation, graph = hoisted(causal)
    assert applied_of_found(transformation) == (1, 1)
    (mask,) = {node.args[3] for node in graphs.calls(graph, SDPA)}
    assert mask.meta["val"].shape[1:] == (1, 5, 5)
    example = {"x": torch.randn(3, 2, 5, 8), "mask": inputs()["mask"]}
    assert torch.equal(base(**example), graph(**example))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda keep, x: torch.where(keep, 0.0, LOWEST), "is additive already"),
        (lambda keep, x: (keep & keep).logical_and_(keep), "is written into in place"),
    ],
)
def test_masks_that_stay(mask, reason):
    _, base, transformation, graph = hoisted(mask)
    assert reason in transformation.report.refused[0].reason
    assert hashes.graph_hash(graph) == hashes.graph_hash(base)


def test_only_what_is_true_everywhere_is_taken_out_of_a_mask():
    for least, rows in ((0, 1), (1, 5)):

        def mask(keep, x, least=least):
            return (torch.arange(5)[None, None, :, None] >= least) & keep

        _, base, _, graph = hoisted(mask)
        (made,) = {node.args[3] for node in graphs.calls(graph, SDPA)}
        assert made.meta["val"].shape[2] == rows
        example = {"x": torch.randn(3, 2, 5, 8), "mask": inputs()["mask"]}
        assert torch.equal(base(**example), graph(**example))


@pytest.mark.parametrize(("family", "floors"), [("bert", 1), ("mpnet", 2)])  # layers share a mask, but no bias
def test_on_cuda_what_is_added_stays_finite_times_any_factor(family, floors):
    graph = capture(tiny(family, attn_implementation="eager"))
    for node in graph.graph.nodes:  # as if it were there
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_like(value, device="cuda")
    FuseAttention()(graph)
    found = list(graphs.calls(graph, aten.clamp_min.default))
    assert len(found) == floors
    assert {node.args[3] for node in graphs.calls(graph, SDPA)} == set(found)
    lowest = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min).clamp_min(found[0].args[1])
    assert (1.5 * lowest).isfinite().all()
    assert torch.equal(lowest + 1e6, lowest)
