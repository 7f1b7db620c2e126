import pytest
import torch
from family_tokenizers import checkpoint
from torch import nn

from bert_evaluation import capture, load, verify
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import longest_input
from bert_evaluation.errors import UsageError
from bert_evaluation.probes import TextProbes, text_probes
from bert_evaluation.promise import Approximates, Bitwise, Reassociates
from bert_evaluation.squad.dataset import Dataset, Example
from bert_evaluation.transformation import Site, Transformation
from bert_evaluation.transformations import MergeLinears, RemoveDropout
from bert_evaluation.verification import Probe, default_probes, observe

aten = torch.ops.aten


class Scale(Transformation):
    """Multiplies the weights of the second layer's output by `by`, under a promise that may not hold."""

    def __init__(self, by, kind):
        self.by, self.kind = by, kind.kind
        self._promise = kind()

    @property
    def promise(self):
        return self._promise

    def sites(self, graph):
        return [Site(node) for node in graph.graph.nodes if node.target == "bert.encoder.layer.1.output.dense.weight"]

    def rewrite(self, graph, site):
        name = site.node.target
        graphs.set_tensor(graph, name, nn.Parameter(graphs.get_tensor(graph, name) * self.by))


@pytest.mark.parametrize(
    ("by", "kind", "verdict"),
    [
        (1.01, Reassociates, "broken"),
        (1 + 1e-3, Reassociates, "broken"),
        (1 + 1e-7, Bitwise, "broken"),
        (1 + 1e-7, Reassociates, "kept"),
        (1.0, Bitwise, "kept"),
        (1.5, Approximates, "kept"),
        (float("nan"), Approximates, "broken"),
    ],
)
def test_a_promise_is_held_against_what_it_says(bert, bert_graph, by, kind, verdict):
    graph = Scale(by, kind)(graphs.fork(bert_graph))
    found = verify(bert, graph)
    assert (found.verdict, found.promise) == (verdict, kind.kind)
    assert found.probes == len(default_probes(bert))
    if verdict == "broken":
        if by != 1 + 1e-7:  # which of so small a difference's probes shows it depends on the processor
            assert found.failing_probe.startswith("batch 1, length ")
        assert found.error > found.tolerance or found.error != found.error
        assert "layer.1.output" in found.first_difference


def test_a_wrong_slice_is_found(bert, bert_graph):
    graph = MergeLinears()(graphs.fork(bert_graph))
    first = next(graphs.calls(graph, aten.split_with_sizes.default))
    pieces = sorted(first.users, key=lambda node: node.args[1])
    pieces[0].args, pieces[1].args = (first, 1), (first, 0)
    graph.recompile()
    found = verify(bert, graph)
    assert not found.kept
    assert "layer.0" in found.first_difference


def test_a_node_that_fails_is_named_with_what_it_says(bert, bert_graph):
    """And not the first node that an approximation changed."""
    graph = Scale(1.5, Approximates)(graphs.fork(bert_graph))
    gelu = list(graphs.calls(graph, aten.gelu.default))[-1]
    with graph.graph.inserting_after(gelu):
        halves = graph.graph.call_function(aten.view.default, (gelu, [2, -1, gelu.meta["val"].shape[-1]]))
    halves.meta = dict(gelu.meta)
    gelu.replace_all_uses_with(halves, delete_user_cb=lambda user: user is not halves)
    graph.recompile()
    found = verify(bert, graph)
    assert (found.verdict, found.error, found.failing_probe) == ("broken", float("inf"), "batch 1, length 1")
    assert found.first_difference.startswith("bert.encoder.layer.1.intermediate")
    assert "(view_default), which fails: shape '[2, -1," in found.first_difference


def test_against_a_graph_as_against_the_model(bert, bert_graph):
    graph = RemoveDropout()(graphs.fork(bert_graph))
    probes = default_probes(bert)
    assert verify(bert_graph, graph, probes).kept
    assert verify(bert, graph, probes[:1]).probes == 1


def test_probes_are_what_breaks_things(family):
    model, _ = family
    probes = {probe.name: probe.inputs for probe in text_probes(model)}
    shapes = {tuple(inputs["input_ids"].shape) for inputs in probes.values()}
    assert {(1, 1), (1, 2), (1, longest_input(model))} <= shapes
    assert {batch for batch, _ in shapes} == set(range(1, 9))
    assert {length % 2 for _, length in shapes if length > 2} == {0, 1}
    assert not probes["a fully masked row"]["attention_mask"][1].any()
    assert probes["padding on the left"]["attention_mask"][0, 0] == 0
    assert probes["padding on the right"]["attention_mask"][0, -1] == 0
    assert set(probes["extreme ids"]["input_ids"].unique().tolist()) == {0, model.config.vocab_size - 1}
    assert not any(tensor.is_contiguous() for tensor in probes["non-contiguous"].values())
    assert max(probe.inputs["input_ids"].shape[1] for probe in default_probes(model)) == 512


def test_a_name_makes_its_probe_again_and_the_seed_decides(bert):
    for probe in text_probes(bert, seed=3):
        again = TextProbes(bert, seed=3).named(probe.name)
        assert again.name == probe.name
        assert all(torch.equal(again.inputs[name], tensor) for name, tensor in probe.inputs.items())
    other = TextProbes(bert, seed=4).named("batch 2, length 7")
    assert not torch.equal(other.inputs["input_ids"], TextProbes(bert, seed=3).named(other.name).inputs["input_ids"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "names no probe"),
        ("batch 2", "names no probe"),
        ("length 2, batch 1", "names no probe"),
        ("batch 1, length 2, padding", "names no probe"),
        ("batch 0, length 2", "at least 1"),
        ("batch 1, length 531", "at most 530 tokens, not 531"),
        ("question 5", "needs a tokenizer"),
    ],
)
def test_names_that_are_none(bert, name, part):
    with pytest.raises(UsageError, match=part):
        TextProbes(bert).named(name)


def test_real_questions_are_probes_and_shrink_as_others_do(tmp_path):
    model, tokenizer = load(checkpoint("roberta", tmp_path))
    examples = [Example(f"a, {i}", "When was the city built?", "It was built by a king. " * 60, ()) for i in range(3)]
    maker = TextProbes(model, tokenizer=tokenizer, dataset=Dataset("own", examples))
    *_, first, second = maker.chosen(longest_input(model), questions=2)
    assert (first.name, second.name) == ("question a, 0", "question a, 1")
    rows, length = first.inputs["input_ids"].shape
    assert rows > 1
    assert first.inputs["attention_mask"].any(dim=1).all()
    cut = next(first.smaller())
    assert cut.name == f"question a, 0, batch {rows // 2}, length {length}"
    assert torch.equal(cut.inputs["input_ids"], first.inputs["input_ids"][: rows // 2])
    assert torch.equal(maker.named(cut.name).inputs["input_ids"], cut.inputs["input_ids"])
    assert [probe.name for probe in first.smaller()][-1] == f"batch {rows}, length {length}"
    with pytest.raises(UsageError, match="own has no question 9"):
        maker.named("question 9")


def test_a_graph_that_fails_or_changes_a_type_breaks_its_promise(bert, bert_graph):
    graph = graphs.fork(bert_graph)
    view = next(graphs.calls(graph, aten.view.default))
    view.update_arg(1, [1, *view.args[1][1:]])
    graph.recompile()
    found = verify(bert, graph)
    assert (found.verdict, found.failing_probe, found.error) == ("broken", "batch 2, length 7", float("inf"))

    cast = capture(Cast(), {"x": torch.randn(2, 3)})
    for node in graphs.calls(cast, aten.to.dtype):
        node.update_arg(1, torch.float64)
    cast.recompile()
    assert not verify(Cast(), cast).kept


class Cast(nn.Module):
    def forward(self, x):
        return x.to(torch.bfloat16)


def test_each_probe_has_its_own_tolerance(bert, bert_graph):
    together = observe(bert_graph, text_probes(bert))
    for probe, allowed in zip(together.probes, together.tolerances, strict=True):
        assert observe(bert_graph, [probe]).tolerances == (allowed,)
    assert len(set(together.tolerances)) > len(together.probes) / 2


def test_other_modules_need_their_graph_for_probes():
    module = nn.Linear(3, 3)
    graph = capture(module, {"input": torch.randn(2, 3)})
    assert verify(module, graph).kept
    with pytest.raises(UsageError, match="give probes"):
        default_probes(module)
    with pytest.raises(UsageError, match="at least one probe"):
        verify(module, graph, [])


def test_shapes_and_what_is_not_finite_are_compared():
    module = nn.ReLU()
    graph = capture(module, {"input": torch.randn(2, 3)})
    x = torch.tensor([[float("nan"), float("inf"), -1.0]])
    assert verify(module, graph, [Probe("odd", {"input": x})]).max_abs_error == 0


def test_a_model_in_float16():
    """Differences count in units of the last place even where their number is none of float16's."""
    module = nn.Linear(3, 3).half()
    graph = capture(module, {"input": torch.randn(2, 3).half()})
    found = verify(module, graph)
    assert (found.verdict, found.max_abs_error, found.max_ulp) == ("kept", 0, 0)
    reference = observe(graph, default_probes(module, graph))
    assert all(leaf.dtype is torch.float64 for leaves in reference.exact for leaf in leaves)
    assert all(1e-4 < allowed < 0.1 for allowed in reference.tolerances)
    for name in ("weight", "bias"):
        graphs.set_tensor(graph, name, nn.Parameter(100 * getattr(module, name).detach()))
    found = verify(module, graph)
    assert not found.kept
    assert torch.finfo(torch.float16).max < found.max_ulp < float("inf")
