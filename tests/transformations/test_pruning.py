"""Pruning on every family: what goes, what stays, and that the rest computes what it did."""

import re

import pytest
import torch
from families import FAMILIES, batches, lively

from bert_evaluation import capture, compose, hashes, verify
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Calibration, activations, calibrate, calibration_of
from bert_evaluation.capturing import dynamic_dimensions, read, save, text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.memory import memory
from bert_evaluation.probes import text_probes
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    PRESETS,
    REGISTRY,
    FuseAttention,
    FuseLinearActivation,
    MergeLinears,
    PackLinears,
    PruneFeedForward,
    PruneHeads,
    RemoveDropout,
    parse_recipe,
)
from bert_evaluation.transformations.head_weights import attentions, read_heads
from bert_evaluation.transformations.linear import weight_and_bias

aten = torch.ops.aten
# Heads and feed-forwards found, of tiny models with two layers of four heads; half of each may go.
HEADS = dict.fromkeys(FAMILIES, (4, 8)) | {"albert": (2, 4), "deberta-v2": (0, 2), "modernbert": (0, 2)}
PAIRS = dict.fromkeys(FAMILIES, (2, 2)) | {"albert": (1, 1), "modernbert": (0, 3), "mobilebert": (8, 8)}


@pytest.fixture(scope="module", params=[(family, eager) for family in FAMILIES for eager in (False, True)], ids=str)
def subject(request):
    family, eager = request.param
    model = lively(family, **({"attn_implementation": "eager"} if eager else {}))
    torch.manual_seed(2)
    base = calibrate(capture(model), Calibration(batches(model)))
    return family, model, base


def logits(graph, inputs):
    with torch.inference_mode():
        return graph(**inputs)["start_logits"]


def mean_ablated(base, groups):
    """The base with columns of linears put out of action: what they read is replaced by its mean on the calibration.

    `groups` are linears that share one weight, and the columns. Nothing of the transformation is used.
    """
    graph = graphs.fork(base)
    for linears, columns in groups:
        weight, bias = (graphs.get_tensor(base, str(node.target)).detach() for node in weight_and_bias(linears[0]))
        means = []
        for linear in linears:
            seen = [
                values[linear.args[0]][inputs["attention_mask"].bool()]
                for inputs, values in activations(base, [linear.args[0]], calibration_of(base).batches)
            ]
            means.append(torch.cat(seen).double().mean(0))
        mean = torch.stack(means).mean(0)[columns]
        new = weight.clone()
        new[:, columns] = 0
        moved = (bias.double() + weight[:, columns].double() @ mean).float()
        for node, tensor in zip(weight_and_bias(linears[0]), (new, moved), strict=True):
            graphs.set_tensor(graph, str(node.target), torch.nn.Parameter(tensor))
    return graph


def by_weight(nodes):
    found = {}
    for node in nodes:
        found.setdefault(str(weight_and_bias(node)[0].target), []).append(node)
    return list(found.values())


def check_restored(transformation, graph, base):
    before = dict(base.named_parameters(remove_duplicate=False))
    back = transformation(graph, reverse=True)
    assert hashes.graph_hash(back) == hashes.graph_hash(base)
    restored = dict(back.named_parameters(remove_duplicate=False))
    assert restored.keys() == before.keys()
    assert all(restored[name] is before[name] for name in before)  # not even copies
    assert graphs.tensors(back).keys() == graphs.tensors(base).keys()
    assert not transformation.get_transformed_nodes(back)


def test_heads(subject, tmp_path):
    family, model, base = subject
    hash_before, constants = hashes.graph_hash(base), hashes.constants_hash(base)
    prune = PruneHeads(budget=0.5)
    graph = prune(graphs.fork(base))
    assert (len(prune.report.applied), prune.report.found) == HEADS[family]
    assert all(refusal.reason.endswith(".") for refusal in prune.report.refused)
    assert (hashes.graph_hash(base), hashes.constants_hash(base)) == (hash_before, constants)
    if not prune.report.applied:
        assert hashes.graph_hash(graph) == hash_before
        return
    assert isinstance(promise_of(graph), Approximates)
    assert verify(model, graph, text_probes(model, 16)).kept

    gone = {}  # heads by the attention that the site names
    for site in prune.report.applied:
        name, head = re.fullmatch(r".* \((\w+)\), head (\d+)", site).groups()
        gone.setdefault(name, []).append(int(head))
    heads = [read_heads(node) for node in attentions(base)]
    groups = []
    for linears in by_weight(each.read_by for each in heads):
        of = [each for each in heads if each.read_by in linears]
        width, removed = of[0].widths[2], gone.get(of[0].node.name, [])
        assert len(removed) < of[0].count
        groups.append((linears, [head * width + i for head in removed for i in range(width)]))
    expected = mean_ablated(base, groups)
    for batch, length in ((1, 1), (1, 2), (3, 31)):  # sizes are dynamic still
        inputs = text_inputs(model, batch, length)
        assert torch.allclose(logits(graph, inputs), logits(expected, inputs), atol=1e-4)
    assert not torch.allclose(logits(graph, inputs), logits(base, inputs), atol=1e-2)

    count = sum(parameter.numel() for parameter in graph.parameters())
    assert count < sum(parameter.numel() for parameter in base.parameters())
    assert dynamic_dimensions(graph) == dynamic_dimensions(base)
    save(graph, tmp_path / "graph.pt2")
    assert torch.equal(logits(read(tmp_path / "graph.pt2"), inputs), logits(graph, inputs))
    check_restored(prune, graph, base)


def test_feed_forward(subject):
    family, model, base = subject
    prune = PruneFeedForward(budget=0.5)
    graph = prune(graphs.fork(base))
    assert (len(prune.report.applied), prune.report.found) == PAIRS[family]
    assert all(refusal.reason.endswith(".") for refusal in prune.report.refused)
    if not prune.report.applied:
        assert any("gated" in refusal.reason for refusal in prune.report.refused)
        return
    assert verify(model, graph, text_probes(model, 16)).kept
    assert all(site.endswith(", 32 of 64 neurons") for site in prune.report.applied)

    groups = []
    for group in by_weight(graphs.calls(base, aten.linear.default)):
        weight = graphs.get_tensor(base, str(weight_and_bias(group[0])[0].target))
        left = graphs.get_tensor(graph, str(weight_and_bias(group[0])[0].target))
        if left.shape[1] < weight.shape[1]:
            kept = [i for i, column in enumerate(weight.T) if (column == left.T).all(1).any()]
            groups.append((group, [i for i in range(weight.shape[1]) if i not in kept]))
    assert [len(columns) for _, columns in groups] == [32] * PAIRS[family][0]
    expected = mean_ablated(base, groups)
    for batch, length in ((1, 1), (3, 31)):
        inputs = text_inputs(model, batch, length)
        assert torch.allclose(logits(graph, inputs), logits(expected, inputs), atol=1e-4)
    assert not torch.allclose(logits(graph, inputs), logits(base, inputs), atol=1e-2)
    check_restored(prune, graph, base)


@pytest.fixture(scope="module")
def bert_subject():
    model = lively("bert")
    torch.manual_seed(2)
    return model, calibrate(capture(model), Calibration(batches(model)))


def test_what_varies_least_goes(bert_subject):
    """Measured anew, in plain torch: the variance, over real tokens, of what each head and neuron adds."""
    model, base = bert_subject
    read_, hooks = {}, []
    for number, layer in enumerate(model.bert.encoder.layer):
        for kind, dense in (("head", layer.attention.output.dense), ("neuron", layer.output.dense)):
            keep = read_.setdefault((kind, number), [])
            hooks.append(dense.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0])))
    masks = []
    with torch.no_grad():
        for inputs in base.meta["bert_evaluation.calibration"].batches:
            masks.append(inputs["attention_mask"].bool())
            model(**inputs)
    for hook in hooks:
        hook.remove()
    matters = {}
    for (kind, number), values in read_.items():
        x = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)]).double()
        layer = model.bert.encoder.layer[number]
        weight = (layer.attention.output.dense if kind == "head" else layer.output.dense).weight.double()
        size = 8 if kind == "head" else 1
        for unit in range(x.shape[1] // size):
            columns = slice(unit * size, (unit + 1) * size)
            added = x[:, columns] @ weight[:, columns].T
            matters[kind, number, unit] = float(added.var(0, correction=0).sum())

    prune = PruneHeads(budget=0.4)  # 3 of 8
    prune(graphs.fork(base))
    found = {tuple(map(int, re.search(r"layer\.(\d+)\..* head (\d+)", site).groups())) for site in prune.report.applied}
    ranked = sorted((value, number, unit) for (kind, number, unit), value in matters.items() if kind == "head")
    assert found == {(number, unit) for _, number, unit in ranked[:3]}
    last = max(value for value, *_ in ranked[:3])
    reasons = {refusal.site: refusal.reason for refusal in prune.report.refused}
    for value, number, unit in ranked[3:]:
        (reason,) = (
            text for site, text in reasons.items() if f"layer.{number}." in site and site.endswith(f"head {unit}")
        )
        assert reason == f"It matters {value / last:.2g} times as much as any within the budget."

    graph = PruneFeedForward(budget=0.5)(graphs.fork(base))
    for number in range(2):
        name = f"bert.encoder.layer.{number}.intermediate.dense.weight"
        weight, left = graphs.get_tensor(base, name), graphs.get_tensor(graph, name)
        ranked = sorted(range(64), key=lambda unit, number=number: matters["neuron", number, unit])
        assert torch.equal(left, weight[sorted(ranked[32:])])


def test_no_attention_loses_all_its_heads(bert_subject):
    _, base = bert_subject
    prune = PruneHeads(budget=0.99)
    graph = prune(graphs.fork(base))
    assert (len(prune.report.applied), prune.report.found) == (6, 8)
    assert {refusal.reason for refusal in prune.report.refused} == {"It is the last head of its attention."}
    assert [read_heads(node).count for node in attentions(graph)] == [1, 1]
    assert logits(graph, text_inputs(bert_subject[0], 2, 7)).isfinite().all()


def test_what_the_budget_has_no_room_for(bert_subject):
    _, base = bert_subject
    prune = PruneHeads(budget=0.1)
    prune(graphs.fork(base))
    assert {refusal.reason for refusal in prune.report.refused} == {"The budget is less than one of 8 heads."}
    prune = PruneFeedForward(budget=0.4)
    prune(graphs.fork(base))
    assert {refusal.reason for refusal in prune.report.refused} == {
        "All 64 neurons stay: their number is rounded up to a multiple of 32."
    }


@pytest.mark.parametrize("budget", [0, 1, -0.1, 1.5, "0.1", True, None])
def test_budgets_that_are_none(budget):
    for kind in (PruneHeads, PruneFeedForward):
        with pytest.raises(UsageError, match="between 0 and 1"):
            kind(budget=budget)


def test_text_form(bert_subject):
    recipe = parse_recipe("PruneHeads(budget=0.25)+PruneFeedForward", REGISTRY)
    assert repr(recipe) == "PruneHeads(budget=0.25)+PruneFeedForward(budget=0.1)"
    assert parse_recipe(repr(recipe), REGISTRY).signature == recipe.signature
    with pytest.raises(UsageError, match="between 0 and 1"):
        parse_recipe("PruneHeads(budget=2)", REGISTRY)


def test_steps_before_and_after(bert_subject):
    """Other steps may follow; what fuses, merges or packs is refused before, with a sentence."""
    model, base = bert_subject
    prune = [PruneHeads(budget=0.5), PruneFeedForward(budget=0.5)]
    pruned = compose(*prune, inplace=False)(base)
    inputs = text_inputs(model, 2, 9)
    after = compose(parse_recipe("exact", REGISTRY, PRESETS))(graphs.fork(pruned))
    assert torch.allclose(logits(after, inputs), logits(pruned, inputs), atol=1e-4)
    # Packed weights of a model as small as this one are mostly what fills their panels.
    assert memory(pruned, inputs).weights < memory(base, inputs).weights

    for first, heads, pairs in (
        (MergeLinears(), "prune before that", None),
        (PackLinears(), "prune before that", "fused or packed"),
        (FuseLinearActivation(anyway=True), None, "prune before FuseLinearActivation"),
    ):
        graph = first(graphs.fork(base))
        assert first.report.applied
        for step, said in zip(prune, (heads, pairs), strict=True):
            step(graphs.fork(graph))
            assert bool(step.report.applied) == (said is None)
            assert said is None or all(said in refusal.reason for refusal in step.report.refused)

    both = compose(RemoveDropout(), *prune, MergeLinears(), inplace=False)
    graph = both(base)
    assert all(step.report.applied for step in both.steps)
    assert torch.allclose(logits(graph, inputs), logits(pruned, inputs), atol=1e-5)
    check_restored(both, compose(*both.steps)(graphs.fork(base)), base)


def test_pruned_twice(bert_subject):
    model, base = bert_subject
    twice = compose(PruneHeads(budget=0.3), PruneHeads(budget=0.4), inplace=False)
    graph = twice(base)
    assert [len(report.applied) for report in twice.reports] == [2, 2]  # of 8, then of 6
    assert logits(graph, text_inputs(model, 1, 5)).isfinite().all()
    check_restored(compose(*twice.steps), graph, base)


def test_attention_whose_positions_share_weights():
    model = lively("deberta-v2")
    graph = FuseAttention()(calibrate(capture(model), Calibration(batches(model))))
    prune = PruneHeads(budget=0.5)
    prune(graph)
    assert (len(prune.report.applied), prune.report.found) == (0, 2)
    assert all(refusal.reason.endswith(".") for refusal in prune.report.refused)
