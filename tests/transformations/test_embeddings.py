"""Tables of embeddings in float16: on every family, undone exactly, by how much results move and memory falls."""

import pytest
import torch
from families import FAMILIES, tiny
from promises import applied_and_kept, undone
from torch import nn

from bert_evaluation import capture, compose, hashes, verify
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.memory import memory
from bert_evaluation.probes import text_probes
from bert_evaluation.promise import Approximates
from bert_evaluation.stages import MEMORY_SHAPE
from bert_evaluation.transformation import promise_of
from bert_evaluation.transformations import (
    PRESETS,
    REGISTRY,
    CastEmbeddings,
    CastToBFloat16,
    CastToFloat16,
    FoldConstants,
    QuantizeLinears,
    RemovePadding,
    parse_recipe,
)
from bert_evaluation.verification import check, observe

aten = torch.ops.aten
UNIT = 2.0**-11  # what rounding to float16 may change, relatively

# Lookups of tiny models: words, positions and types, where a family has them.
LOOKUPS = dict.fromkeys(FAMILIES, 3) | {"distilbert": 2, "deberta-v2": 2, "modernbert": 1}


def lookups(graph):
    return list(graphs.calls(graph, aten.embedding.default))


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model)


@pytest.fixture(scope="module")
def reference(subject):
    """What the model makes of inputs that are chosen to break things, short ones."""
    return observe(subject[2], text_probes(subject[1], 31))


def test_every_family(subject, reference):
    family, model, base = subject
    cast, before = CastEmbeddings(), dict(base.named_parameters())
    graph = applied_and_kept(cast, base, reference)
    assert (len(cast.report.applied), cast.report.found) == (LOOKUPS[family], LOOKUPS[family])
    assert isinstance(promise_of(graph), Approximates)
    for node in lookups(graph):
        table = graphs.get_tensor(graph, str(node.args[0].target))
        assert table.dtype is node.meta["val"].dtype is torch.float16
        (wide,) = node.users  # and all else is float32
        assert wide.target is aten.to.dtype
        assert wide.meta["val"].dtype is torch.float32
    inputs = text_inputs(model, 3, 17)
    with torch.inference_mode():
        assert (graph(**inputs)["end_logits"] - base(**inputs)["end_logits"]).abs().max() <= 32 * UNIT
    undone(cast, graph, base)
    restored = dict(graph.named_parameters())
    assert all(restored[name] is before[name] for name in before)  # not even copies


class Looks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.table, self.kind = nn.Embedding(5, 4, padding_idx=0), kind

    def forward(self, ids):
        match self.kind:
            case "tied":
                return nn.functional.linear(self.table(ids), self.table.weight)
            case "computed":
                return nn.functional.embedding(ids, self.table.weight * 2)
            case "written into":
                self.table.weight[0] = 0
                return self.table(ids)
            case "twice":
                return self.table(ids) + self.table(ids.flip(0))
        return self.table(ids)


def of(kind, change=lambda module: module):
    module = Looks(kind).requires_grad_(requires_grad=False)
    change(module)
    return capture(module, {"ids": torch.tensor([[1, 2], [3, 0]])})


def set_to(number):
    def change(module):
        module.table.weight[1, 0] = number

    return change


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lambda: of("tied"), "table.weight is also read by linear, which would keep the old copy."),
        (lambda: of("written into"), "table.weight is also read by select, which would keep the old copy."),
        (lambda: of("computed"), "embedding reads mul, which the graph computes: it is no stored parameter."),
        (lambda: of("plain", set_to(1e5)), "table.weight has a number of size 100000, and float16 none beyond 65504."),
        (
            lambda: of("plain", set_to(-65519)),
            "table.weight has a number of size 65519, and float16 none beyond 65504.",
        ),
        (
            lambda: of("plain", set_to(torch.nan)),
            "table.weight has a number of size nan, and float16 none beyond 65504.",
        ),
        (lambda: of("plain", nn.Module.double), "table.weight is in torch.float64, not in float32."),
    ],
)
def test_refuses_what_it_cannot_cast(graph, reason):
    graph, cast = graph(), CastEmbeddings()
    before = hashes.graph_hash(graph)
    cast(graph)
    assert [refusal.reason for refusal in cast.report.refused] == [reason]
    assert hashes.graph_hash(graph) == before


@pytest.mark.parametrize("number", [65504.0, -65504.0, 0.0, 2.0**-25, 3e-8])
def test_the_largest_and_the_smallest_numbers(number):
    graph = CastEmbeddings()(base := graphs.fork(of("plain", set_to(number))))
    with torch.inference_mode():
        found = graph(ids=torch.tensor([[1]]))
    assert graph is base
    assert found.dtype is torch.float32
    assert abs(found[0, 0, 0].item() - number) <= 2.0**-25


def test_a_table_that_is_looked_up_twice_is_stored_once():
    cast = CastEmbeddings()
    graph = cast(of("twice"))
    assert len(cast.report.applied) == 2
    (table,) = graphs.tensors(graph).values()
    assert table.dtype is torch.float16
    assert cast(graph, reverse=True).table.weight.dtype is torch.float32


def test_casting_twice_is_once(bert_graph):
    graph = CastEmbeddings()(graphs.fork(bert_graph))
    before, again = hashes.graph_hash(graph), CastEmbeddings()
    again(graph)
    assert not again.report.applied
    assert all(refusal.reason.endswith("is in torch.float16, not in float32.") for refusal in again.report.refused)
    assert hashes.graph_hash(graph) == before


@pytest.mark.parametrize("kind", [CastToBFloat16, CastToFloat16, QuantizeLinears, RemovePadding, FoldConstants])
def test_beside_other_steps_in_either_order(kind, bert, bert_graph):
    """The same sites, the same results: what computes in a lower type reads sums and LayerNorms in float32 still."""
    make = lambda: kind(anyway=True) if kind not in (RemovePadding, FoldConstants) else kind()  # noqa: E731
    inputs, results = text_inputs(bert, 3, 11), []
    for steps in ((CastEmbeddings(), make()), (make(), CastEmbeddings())):
        recipe = compose(*steps)
        graph = recipe(graphs.fork(bert_graph))
        assert {step.name: len(step.report.applied) for step in recipe.steps}["CastEmbeddings"] == 3
        assert check(observe(bert, text_probes(bert, 31)), graph).kept
        with torch.inference_mode():
            results.append(graph(**inputs)["end_logits"])
        assert hashes.graph_hash(recipe(graph, reverse=True)) == hashes.graph_hash(bert_graph)
    assert torch.equal(*results)


def test_verify_and_the_float64_run(bert, bert_graph):
    graph = CastEmbeddings()(graphs.fork(bert_graph))
    found = verify(bert, graph)
    assert (found.promise, found.verdict) == ("approximates", "kept")
    assert found.max_abs_error > 0
    with torch.inference_mode():
        assert graphs.in_double(graph)(**text_inputs(bert, 2, 9))["start_logits"].dtype is torch.float64


def test_saved_and_read(bert, bert_graph, tmp_path):
    graph = CastEmbeddings()(graphs.fork(bert_graph))
    save(graph, tmp_path / "cast.pt2")
    inputs = text_inputs(bert, 2, 9)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path / "cast.pt2")(**inputs)["end_logits"], graph(**inputs)["end_logits"])


def test_tables_take_half_of_their_memory(base):
    """Of the built-in checkpoint's tables, the weights lose half, and so does the fullest moment of a call."""
    graph = CastEmbeddings()(graphs.fork(base))
    tables = sum(
        graphs.get_tensor(base, name).nbytes for name in graphs.read_names(base) if "embeddings.weight" in name
    )
    inputs = {name: torch.ones(1, 21, dtype=torch.int64) for name in graphs.input_names(base)}
    before, after = memory(base, inputs), memory(graph, inputs)
    assert before.weights - after.weights == tables // 2
    assert before.peak - after.peak == tables // 2


@pytest.mark.parametrize("preset", ["bf16", "int8"])
def test_a_preset_takes_less_than_half_of_bases_memory(preset, built_in, base):
    """With all its steps applied, as they are where the processor has the instructions, and counted as for a row."""
    steps = [kind(anyway=True) if "anyway" in vars(kind()) else kind() for kind in PRESETS[preset]]
    graph = compose(*steps)(graphs.fork(base))
    assert all(step.report.applied for step in steps if isinstance(step, (CastEmbeddings, CastToBFloat16)))
    inputs = text_inputs(built_in[0], *MEMORY_SHAPE)
    assert memory(graph, inputs).peak < memory(base, inputs).peak / 2


def test_a_checkpoint_that_was_kept_in_float16_loses_nothing(built_in, base):
    graph, inputs = CastEmbeddings()(graphs.fork(base)), text_inputs(built_in[0], 3, 17)
    with torch.inference_mode():
        found, expected = graph(**inputs), base(**inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_its_text_form_reads_back():
    assert repr(parse_recipe("CastEmbeddings", REGISTRY)) == "CastEmbeddings()"
