"""Balancing: where columns can be divided where they are made, the same function, and less lost by QuantizeLinears."""

import pytest
import torch
from families import FAMILIES, batches, lively
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, compose, hashes, verify
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Calibration, activations, at_tokens, calibrate, calibration_of
from bert_evaluation.errors import UsageError
from bert_evaluation.probes import text_probes
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import REGISTRY, BalanceLinears, MergeLinears, QuantizeLinears, parse_recipe

aten = torch.ops.aten
# Tensors that linears read, of models with two layers; and those whose columns can be divided where they are made.
FOUND = dict.fromkeys(FAMILIES, 9) | {"electra": 10, "albert": 10, "deberta-v2": 11, "modernbert": 10, "mobilebert": 26}
DIVIDED = dict.fromkeys(FAMILIES, 0) | {"albert": 1, "modernbert": 6, "mobilebert": 8}
NO_BETTER = "Balanced and quantised"


def with_outliers(model):
    """The same function, with columns of outliers in what ModernBERT's linears read behind a LayerNorm."""
    first, last = model.model.layers
    with torch.no_grad():
        for norm, linear in (
            (first.mlp_norm, first.mlp.Wi),
            (last.mlp_norm, last.mlp.Wi),
            (last.attn_norm, last.attn.Wqkv),
        ):
            for column, times in ((3, 20.0), (17, -10.0)):
                norm.weight[column] *= times
                linear.weight[:, column] /= times
    return model


@pytest.fixture(scope="module")
def modernbert():
    model = with_outliers(lively("modernbert"))
    torch.manual_seed(2)
    return model, calibrate(capture(model), Calibration(batches(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = lively(family)
    torch.manual_seed(2)
    base = calibrate(capture(model), Calibration(batches(model)))
    before, hash_before, constants = dict(base.named_parameters()), hashes.graph_hash(base), hashes.constants_hash(base)
    balance = BalanceLinears()
    graph = balance(graphs.fork(base))

    no_better = [refusal for refusal in balance.report.refused if refusal.reason.startswith(NO_BETTER)]
    assert balance.report.found == FOUND[family]
    assert len(balance.report.applied) + len(no_better) == DIVIDED[family]
    assert all(refusal.reason.endswith(".") for refusal in balance.report.refused)
    assert hashes.graph_hash(graph) == hash_before  # only numbers differ
    assert (hashes.constants_hash(graph) != constants) == bool(balance.report.applied)
    assert hashes.constants_hash(base) == constants
    if balance.report.applied:
        assert isinstance(promise_of(graph), Reassociates)
        assert verify(model, graph, text_probes(model, 16)).kept

    back = balance(graph, reverse=True)
    restored = dict(back.named_parameters())
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies
    assert not balance.get_transformed_nodes(back)


def distance(graph, base):
    """The squared distance of the logits at real tokens from the base's."""
    found = 0.0
    for inputs in calibration_of(base).batches:
        with torch.inference_mode():
            before, after = base(**inputs)["start_logits"], graph(**inputs)["start_logits"]
        found += float((before - after)[inputs["attention_mask"].bool()].square().sum())
    return found


def test_outliers_cost_less(modernbert):
    model, base = modernbert
    quantize, balance = QuantizeLinears(anyway=True), BalanceLinears()
    plain, balanced = quantize(graphs.fork(base)), compose(balance, quantize)(graphs.fork(base))
    applied = " ".join(balance.report.applied)
    assert all(name in applied for name in ("layers.0.mlp.Wi", "layers.1.mlp.Wi", "layers.1.attn.Wqkv"))
    assert distance(balanced, base) < distance(plain, base) / 4
    assert verify(model, balanced, text_probes(model, 16)).kept


def test_what_is_balanced(modernbert):
    """With a strength of 1/2, the largest of a column and the largest of its weights have one ratio for all columns."""
    _, base = modernbert
    balance = BalanceLinears()
    graph = balance(graphs.fork(base))
    seen = 0
    for site in balance.report.applied:
        linear = next(each for each in graphs.calls(graph, aten.linear.default) if f"({each.name})" in site)
        source = linear.args[0]
        largest = torch.stack(
            [
                at_tokens(values[source], inputs).abs().amax(0)
                for inputs, values in activations(graph, [source], calibration_of(base).batches)
            ]
        ).amax(0)
        ratio = largest / graphs.get_tensor(graph, str(linear.args[1].target)).abs().amax(0)
        # The weights' rows may have been divided for what comes next, after that.
        if "Wi" not in site:
            seen += 1
            assert torch.allclose(ratio, ratio.mean(), rtol=1e-3)
    assert seen > 0
    assert BalanceLinears(strength=0.3).signature != balance.signature


class Block(nn.Module):
    """A LayerNorm or two linears with something between them, before a linear that reads its result."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.both, self.bare, self.kind = nn.Linear(8, 16), nn.LayerNorm(8, elementwise_affine=False), kind
        self.norm.weight.data[2] *= 50
        self.two.weight.data[:, 2] /= 50
        self.one.weight.data[2] *= 50
        self.both.weight.data[10] *= 50

    def forward(self, x):
        match self.kind:
            case "norm":
                return self.two(self.norm(x))
            case "norm of two":
                return self.two(self.norm(y := x.tanh())) + self.one(self.norm(y))
            case "residual":
                return self.two(y := self.norm(x)) + y
            case "output":
                return self.two(y := self.norm(x)), y
            case "bare norm":
                return self.two(self.bare(x))
            case "relu":
                return self.two(F.relu(self.one(x)))
            case "gelu":
                return self.two(F.gelu(self.one(x)))
            case "relu of both":
                y = self.one(x)
                return self.two(F.relu(y)) + y
            case "gated":
                gate, y = self.both(x).chunk(2, -1)
                return self.two(F.gelu(gate) * y)
            case "gated, split":
                gate, y = self.both(x).split([8, 8], -1)
                return self.two(y * F.gelu(gate))
            case "gated, two linears":
                return self.two(F.gelu(self.both(x)[..., :8]) * self.one(x))
            case "gated by itself":
                y = self.one(x)
                return self.two(y * torch.sigmoid(y))
            case "squared":
                y = self.one(x)
                return self.two(y * y)
            case "one weight":
                return self.two(F.relu(self.two(x)))
            case "written into":
                y = self.norm(x)
                z = self.two(y)
                y.add_(1)
                return z
            case "input":
                return self.two(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("norm", None),
        ("norm of two", "also read by others than layer_norm."),
        ("residual", "add reads layer_norm too"),
        ("output", "output reads layer_norm too"),
        ("bare norm", "has no weight of its own"),
        ("relu", None),
        ("gelu", "gelu (aten.gelu.default), from which no factor moves."),
        ("relu of both", "add reads linear too"),
        ("gated", None),
        ("gated, split", None),
        ("gated, two linears", None),
        ("gated by itself", "No factor of mul is made by a linear for it alone."),
        ("squared", "No factor of mul is made by a linear for it alone."),
        ("one weight", "which would keep the old copy."),
        ("written into", "add_ reads layer_norm too"),
        ("input", "the result of x (x), from which no factor moves."),
    ],
)
def test_what_makes_the_columns(kind, reason):
    torch.manual_seed(0)
    module, x = Block(kind), torch.randn(40, 8)
    base = calibrate(capture(module, {"x": x}), Calibration(({"x": x},)))
    balance = BalanceLinears(keep=())
    graph = balance(graphs.fork(base))
    site = next(each for each in (*balance.report.applied, *map(str, balance.report.refused)) if "two" in each)
    assert (site in balance.report.applied) == (reason is None)
    if reason is not None:
        assert reason in site
        return
    assert verify(module, graph).kept
    with torch.inference_mode():
        exact = module.double()(x.double())
        module.float()
        plain, balanced = (QuantizeLinears(keep=(), anyway=True)(graphs.fork(each))(x=x) for each in (base, graph))
    assert (balanced - exact).square().sum() < (plain - exact).square().sum()


def test_what_would_not_gain_is_refused():
    """A column that is large in both, made larger in one alone."""
    torch.manual_seed(0)
    module, x = Block("norm"), torch.randn(40, 8)
    module.two.weight.data[:, 2] *= 2500
    graph = calibrate(capture(module, {"x": x}), Calibration(({"x": x},)))
    balance = BalanceLinears(strength=0, keep=())
    balance(graph)
    (refusal,) = balance.report.refused
    assert refusal.reason.startswith(NO_BETTER)


def test_before_and_behind_other_steps(modernbert):
    model, base = modernbert
    recipe = compose(MergeLinears(), BalanceLinears(), QuantizeLinears(anyway=True))
    graph = recipe(graphs.fork(base))
    assert recipe.reports[1].applied
    assert hashes.graph_hash(recipe(graph, reverse=True)) == hashes.graph_hash(base)
    late = BalanceLinears()
    late(QuantizeLinears(anyway=True)(graphs.fork(base)))
    assert not late.report.applied
    assert model.training is False


def test_without_texts_it_is_refused():
    balance = BalanceLinears()
    balance(capture(lively("modernbert")))
    assert not balance.report.applied
    assert any(refusal.reason.startswith("There is no text") for refusal in balance.report.refused)


@pytest.mark.parametrize("strength", [-0.1, 1.1, "0.5", True, None])
def test_strengths_that_are_none(strength):
    with pytest.raises(UsageError, match="from 0 to 1"):
        BalanceLinears(strength=strength)


def test_text_form():
    text = "BalanceLinears(keep=('logits',), strength=0.25)"
    assert repr(parse_recipe(text, REGISTRY)) == text
