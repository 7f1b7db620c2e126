"""Sensitivity of every family: what a site costs is what plain torch measures, and those that cost most are left."""

import math
import re

import pytest
import torch
from families import FAMILIES, batches, lively
from promises import applied_and_kept, undone
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, hashes, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Calibration, calibrate, calibration_of
from bert_evaluation.errors import UsageError
from bert_evaluation.probes import text_probes
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import Site, Transformation
from bert_evaluation.transformations import (
    REGISTRY,
    CastToBFloat16,
    CastToFloat16,
    QuantizeLinears,
    QuantizeToFloat8,
    parse_recipe,
)
from bert_evaluation.transformations.sensitivity import sensitivities
from bert_evaluation.verification import observe

aten = torch.ops.aten
SENTENCE = re.compile(
    r"Alone it moves the outputs by ([\d.]+(?:e-\d+)?)% of their standard deviation, more than (\d+) other sites"
)
KINDS = (QuantizeLinears, QuantizeToFloat8, CastToBFloat16, CastToFloat16)
# Sites left of those that nothing else speaks against, of tiny models with two layers.
LEFT = dict.fromkeys(FAMILIES, (3, 12)) | {"albert": (1, 7), "modernbert": (2, 9), "mobilebert": (7, 30)}
LEFT_OF_CASTS = dict.fromkeys(FAMILIES, (7, 14)) | {
    "albert": (7, 15),
    "mpnet": (6, 12),
    "deberta-v2": (8, 16),
    "modernbert": (5, 11),
    "mobilebert": (16, 32),
}
IN_BERT = dict.fromkeys(KINDS[:2], 12) | dict.fromkeys(KINDS[2:], 14)


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = lively(request.param)
    return request.param, model, calibrate(capture(model), Calibration(batches(model)))


@pytest.fixture(scope="module")
def bert_subject():
    model = lively("bert")
    torch.manual_seed(2)
    return model, calibrate(capture(model), Calibration(batches(model)))


def logits(model, inputs):
    """Both logits of every real token, one below the other."""
    with torch.inference_mode():
        found = model(**inputs)
    return torch.stack([found[name][inputs["attention_mask"].bool()] for name in ("start_logits", "end_logits")])


def share_moved(model, base, inputs):
    """How far a model is from the base on these batches: a share of the variance, the mean of both outputs'."""
    before, after = (torch.cat([logits(each, batch) for batch in inputs], 1).double() for each in (base, model))
    spread = (before - before.mean(1, keepdim=True)).square().sum(1)
    return float(((after - before).square().sum(1) / spread).mean())


def hold_leave(some, left_of, model, base):
    """That a transformation leaves so many sites, those that cost most, and keeps its promise by the others."""
    constants, every = hashes.constants_hash(base), type(some)(anyway=True)
    costs = sensitivities(base, every)
    whole = every(graphs.fork(base))
    graph = applied_and_kept(some, base, observe(model, text_probes(model, 16)))
    assert hashes.constants_hash(base) == constants

    left = {refusal.site: refusal.reason for refusal in some.report.refused if "Alone" in refusal.reason}
    assert (len(left), len(costs)) == left_of
    assert set(costs) == set(every.report.applied) == {*some.report.applied, *left}
    assert all(cost > 0 for cost in costs.values())
    assert min(costs[site] for site in left) >= max(costs[site] for site in some.report.applied)
    for site, reason in left.items():
        percent, others = SENTENCE.match(reason).groups()
        assert float(percent) == pytest.approx(100 * math.sqrt(costs[site]), rel=0.01)
        assert int(others) == sum(cost < costs[site] for cost in costs.values())
    inputs = calibration_of(base).batches
    assert share_moved(graph, base, inputs) < share_moved(whole, base, inputs)

    undone(some, graph, base)
    assert hashes.constants_hash(graph) == constants


def test_those_that_cost_most_are_left(subject):
    family, model, base = subject
    hold_leave(QuantizeLinears(anyway=True, leave=0.25), LEFT[family], model, base)


def test_of_casts(subject):
    """Half of them: what lies between two is rounded too, which in so small a model may outweigh a few."""
    family, model, base = subject
    hold_leave(CastToBFloat16(anyway=True, leave=0.5), LEFT_OF_CASTS[family], model, base)


def test_of_the_other_types(bert_subject):
    hold_leave(QuantizeToFloat8(anyway=True, leave=0.25), LEFT["bert"], *bert_subject)
    hold_leave(CastToFloat16(anyway=True, leave=0.5), LEFT_OF_CASTS["bert"], *bert_subject)


def test_a_site_costs_what_plain_torch_measures(bert_subject):
    model, base = bert_subject
    costs, inputs = sensitivities(base, QuantizeLinears(anyway=True)), calibration_of(base).batches
    measured = {}

    def quantized(module, arguments, _):
        (x, steps), (weight, scales) = kernels.quantize(arguments[0]), kernels.quantize(module.weight)
        return F.linear(x * steps, weight * scales, module.bias)

    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            hook = module.register_forward_hook(quantized)
            measured[name] = share_moved(model, base, inputs)
            hook.remove()
    assert len(measured) == len(costs) == 12
    for name, cost in measured.items():
        (site,) = (each for each in costs if name in each)
        assert costs[site] == pytest.approx(cost, rel=1e-2)


def test_what_sites_cost_adds_up(bert_subject):
    _, base = bert_subject
    quantize = QuantizeLinears(anyway=True)
    together = share_moved(quantize(graphs.fork(base)), base, calibration_of(base).batches)
    assert math.fsum(sensitivities(base, quantize).values()) == pytest.approx(together, rel=0.5)


def test_padding_does_not_count(bert_subject):
    _, base = bert_subject
    (first, *_), quantize = calibration_of(base).batches, QuantizeLinears(anyway=True)
    longer = {name: F.pad(each, (0, 5)) for name, each in first.items()}
    longer["input_ids"] = longer["input_ids"].where(longer["attention_mask"].bool(), 7)
    alone, padded = (
        sensitivities(calibrate(graphs.fork(base), Calibration((batch,))), quantize) for batch in (first, longer)
    )
    assert padded == pytest.approx(alone, rel=1e-2)


class Sum(nn.Module):
    """Two terms, and what is no float."""

    def forward(self, x):
        return x.relu() + x.tanh(), x > 0, x.exp()


class Times(Transformation):
    """Every relu and tanh of the graph is multiplied by a number; nothing else."""

    promise = Reassociates()

    def __init__(self, factor):
        self.factor = factor

    def sites(self, graph):
        return [Site(node) for node in graphs.calls(graph, aten.relu.default, aten.tanh.default, aten.exp.default)]

    def why_not(self, site):
        return "It is an exponential." if site.node.target is aten.exp.default else None

    def rewrite(self, graph, site):
        with graph.graph.inserting_after(site.node):
            product = graph.graph.call_function(aten.mul.Tensor, (site.node, self.factor))
        site.node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def test_what_is_known_by_arithmetic():
    """A tenth more of one term, in one of two outputs of floats."""
    x = torch.randn(50, 3, dtype=torch.float64)
    graph = calibrate(capture(Sum(), {"x": x}), Calibration(({"x": x[:20]}, {"x": x[20:]})))
    spread = (x.relu() + x.tanh()).var(correction=0)
    expected = [float((0.1 * term).square().mean() / spread / 2) for term in (x.relu(), x.tanh())]
    assert list(sensitivities(graph, Times(1.1)).values()) == pytest.approx(expected)
    assert list(sensitivities(graph, Times(1.0)).values()) == [0, 0]
    assert list(sensitivities(graph, Times(math.nan)).values()) == [math.inf, math.inf]


def test_outputs_that_are_infinite_or_all_the_same_count_for_nothing():
    x = torch.zeros(4, 3)
    graph = calibrate(capture(Sum(), {"x": torch.randn(4, 3)}), Calibration(({"x": x},)))
    assert list(sensitivities(graph, Times(2.0)).values()) == [0, 0]
    x = torch.tensor([[math.inf, 0.5, 1.0]])
    graph = calibrate(graph, Calibration(({"x": x},)))
    assert all(math.isfinite(cost) and cost > 0 for cost in sensitivities(graph, Times(2.0)).values())


def test_float8_behind_bfloat16(bert_subject):
    """As it is on a GPU: what is left stays in bfloat16."""
    _, base = bert_subject
    cast, quantize = CastToBFloat16(anyway=True), QuantizeToFloat8(anyway=True, leave=0.25)
    graph = quantize(cast(graphs.fork(base)))
    assert len(quantize.report.applied) == 9
    assert sum(bool(SENTENCE.match(refusal.reason)) for refusal in quantize.report.refused) == 3
    types = [node.meta["val"].dtype for node in graphs.calls(graph, aten.linear.default)]
    assert types == [torch.bfloat16] * 3 + [torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_not_among_them(bert_subject, kind):
    _, base = bert_subject
    some = kind(keep=("layer.0", "logits"), anyway=True, leave=0.5)
    some(graphs.fork(base))
    reasons = [refusal.reason for refusal in some.report.refused]
    others = [int(SENTENCE.match(reason)[2]) for reason in reasons if "Alone" in reason]
    of_a_layer = IN_BERT[kind] // 2
    assert len(some.report.applied) == of_a_layer - of_a_layer // 2
    assert sorted(others) == list(range(of_a_layer))[-(of_a_layer // 2) :]
    assert sum("keep list" in reason for reason in reasons) == of_a_layer + 1 == len(reasons) - len(others)


@pytest.mark.parametrize("kind", KINDS)
def test_less_than_one_site_is_none(bert_subject, kind):
    _, base = bert_subject
    some = kind(anyway=True, leave=0.05)
    some(graphs.fork(base))
    assert len(some.report.applied) == IN_BERT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_without_texts_nothing_is_rounded(kind):
    graph = capture(lively("bert"))
    some = kind(anyway=True, leave=0.1)
    some(graph)
    assert not some.report.applied
    assert all(refusal.reason.startswith("There is no text") for refusal in some.report.refused)
    assert some.calibrates
    assert not kind().calibrates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", [1, -0.1, 1.5, "0.1", True, None])
def test_shares_that_are_none(kind, leave):
    with pytest.raises(UsageError, match="a share of the sites, 0 or more and below 1, not ") as error:
        kind(leave=leave)
    assert str(error.value).endswith(f"{leave!r}.")


@pytest.mark.parametrize("kind", KINDS)
def test_text_form(kind):
    text = f"{kind.__name__}(anyway=False, keep=('logits',), leave=0.1)"
    assert repr(parse_recipe(text, REGISTRY)) == text
