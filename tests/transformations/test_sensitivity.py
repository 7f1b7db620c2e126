"""Sensitivity of every family: what a site costs is what plain torch measures, and those that cost most are left."""

import math
import re

import pytest
import torch
from families import FAMILIES, batches, lively
from torch import nn
from torch.nn import functional as F

from bert_evaluation import capture, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Calibration, calibrate, calibration_of
from bert_evaluation.errors import UsageError
from bert_evaluation.transformation import Reassociates, Site, Transformation
from bert_evaluation.transformations import REGISTRY, CastToBFloat16, QuantizeLinears, parse_recipe
from bert_evaluation.transformations.sensitivity import sensitivities

aten = torch.ops.aten
SENTENCE = re.compile(
    r"Alone it moves the outputs by ([\d.]+)% of their standard deviation, more than (\d+) other sites"
)
# Sites left of those that nothing else speaks against, of tiny models with two layers.
LEFT = dict.fromkeys(FAMILIES, (3, 12)) | {"albert": (1, 7), "modernbert": (2, 9), "mobilebert": (7, 30)}


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


def test_those_that_cost_most_are_left(subject):
    family, _, base = subject
    before, constants = graphs.graph_hash(base), graphs.constants_hash(base)
    some, every = QuantizeLinears(anyway=True, leave=0.25), QuantizeLinears(anyway=True)
    costs = sensitivities(base, every)
    graph, whole = some(graphs.fork(base)), every(graphs.fork(base))
    assert (graphs.graph_hash(base), graphs.constants_hash(base)) == (before, constants)

    left = {refusal.site: refusal.reason for refusal in some.report.refused if "Alone" in refusal.reason}
    assert (len(left), len(costs)) == LEFT[family]
    assert set(costs) == set(every.report.applied) == {*some.report.applied, *left}
    assert all(cost > 0 for cost in costs.values())
    assert min(costs[site] for site in left) >= max(costs[site] for site in some.report.applied)
    for site, reason in left.items():
        percent, others = SENTENCE.match(reason).groups()
        assert float(percent) == pytest.approx(100 * math.sqrt(costs[site]), abs=0.01)
        assert int(others) == sum(cost < costs[site] for cost in costs.values())
    inputs = calibration_of(base).batches
    assert share_moved(graph, base, inputs) < share_moved(whole, base, inputs)

    some(graph, reverse=True)
    assert graphs.graph_hash(graph) == before
    assert graphs.constants_hash(graph) == constants


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


def test_of_other_transformations(bert_subject):
    _, base = bert_subject
    cast = CastToBFloat16(anyway=True)
    costs = sensitivities(base, cast)
    cast(graphs.fork(base))
    assert set(costs) == set(cast.report.applied)
    assert all(0 < cost < 1e-2 for cost in costs.values())


def test_what_is_kept_is_not_among_them(bert_subject):
    _, base = bert_subject
    quantize = QuantizeLinears(keep=("layer.0", "logits"), anyway=True, leave=0.5)
    quantize(graphs.fork(base))
    assert len(quantize.report.applied) == 3
    reasons = [refusal.reason for refusal in quantize.report.refused]
    assert sum("keep list" in reason for reason in reasons) == 7
    assert sorted(SENTENCE.match(reason)[2] for reason in reasons if "Alone" in reason) == ["3", "4", "5"]


def test_less_than_one_site_is_none(bert_subject):
    _, base = bert_subject
    quantize = QuantizeLinears(anyway=True, leave=0.05)
    quantize(graphs.fork(base))
    assert len(quantize.report.applied) == 12


def test_without_texts_nothing_is_quantised():
    graph = capture(lively("bert"))
    quantize = QuantizeLinears(anyway=True, leave=0.1)
    quantize(graph)
    assert not quantize.report.applied
    assert all(refusal.reason.startswith("There is no text") for refusal in quantize.report.refused)
    assert quantize.calibrates
    assert not QuantizeLinears().calibrates


@pytest.mark.parametrize("leave", [1, -0.1, 1.5, "0.1", True, None])
def test_shares_that_are_none(leave):
    with pytest.raises(UsageError, match="a share of the sites"):
        QuantizeLinears(leave=leave)


def test_text_form():
    text = "QuantizeLinears(anyway=False, keep=('logits',), leave=0.1)"
    assert repr(parse_recipe(text, REGISTRY)) == text
