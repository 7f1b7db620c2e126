import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation import compose, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.errors import TransformationError, UsageError
from bert_evaluation.promise import Approximates, Reassociates
from bert_evaluation.recipe import ReversibleRecipe, parse_recipe
from bert_evaluation.transformation import Site, Transformation, history
from bert_evaluation.transformations import PRESETS, PRESETS_ON_CUDA, REGISTRY, MergeLinears, RemoveDropout, recipes

aten = torch.ops.aten


@given(st.lists(st.sampled_from(REGISTRY), min_size=1, max_size=6))
def test_the_text_form_reads_back(kinds):
    recipe = compose(*(kind() for kind in kinds))
    again = parse_recipe(repr(recipe), REGISTRY)
    assert repr(again) == repr(recipe)
    assert again.signature == recipe.signature
    assert parse_recipe(recipe.name, REGISTRY).signature == recipe.signature


@pytest.mark.parametrize("text", ["", "+", "a b", "MergeLinears-RemoveDropout", "MergeLinears(1)", "1", "x.y()"])
def test_what_is_no_recipe(text):
    with pytest.raises(UsageError, match="is not a recipe"):
        parse_recipe(text, REGISTRY)


def test_compose_in_place_or_not(bert_graph):
    before = hashes.graph_hash(bert_graph)
    recipe = compose(RemoveDropout(), compose(MergeLinears()), inplace=False)
    graph = recipe(bert_graph)
    assert hashes.graph_hash(bert_graph) == before != hashes.graph_hash(graph)
    assert recipe.name == "RemoveDropout+MergeLinears"
    assert [len(report.applied) for report in recipe.reports] == [5, 2]
    assert recipe.report.found == 7
    assert isinstance(recipe.promise, Reassociates)
    assert recipe.preserves_computation
    assert len(recipe.get_transformed_nodes(graph)) > 5
    twin = graphs.fork(bert_graph)
    assert compose(RemoveDropout())(twin) is twin


class Breaks(Transformation):
    """Rewrites one site and then fails."""

    def sites(self, graph):
        return [Site(node) for node in graphs.calls(graph, aten.linear.default)]

    def rewrite(self, graph, site):
        site.node.replace_all_uses_with(site.node.args[0])
        raise RuntimeError("broken on purpose")


def test_a_failure_leaves_the_graph_as_it_was(bert_graph):
    graph = graphs.fork(bert_graph)
    before, held = hashes.graph_hash(graph), graphs.tensors(graph)
    with pytest.raises(RuntimeError, match="on purpose"):
        compose(MergeLinears(), Breaks())(graph)
    assert hashes.graph_hash(graph) == before
    assert all(graphs.tensors(graph)[name] is tensor for name, tensor in held.items())
    assert history(graph) == ()


class OptimumStyle(Transformation):
    """As written for optimum.fx: overrides transform."""

    preserves_computation = True

    def transform(self, graph_module):
        for node in list(graphs.calls(graph_module, aten.dropout.default)):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        return graph_module


def test_a_transformation_written_for_optimum_works(bert_graph):
    change = OptimumStyle()
    graph = change(graphs.fork(bert_graph))
    assert not list(graphs.calls(graph, aten.dropout.default))
    assert isinstance(change.promise, Reassociates)
    assert change.report.applied == ("the whole graph",)
    assert isinstance(Transformation().promise, Approximates)


def test_what_cannot_be_undone_is_said(bert_graph):
    merge, graph = MergeLinears(), graphs.fork(bert_graph)
    OptimumStyle()(merge(graph))
    after = hashes.graph_hash(graph)
    with pytest.raises(TransformationError, match="cannot be undone"):
        merge(graph, reverse=True)
    assert hashes.graph_hash(graph) == after
    assert not isinstance(compose(merge, OptimumStyle()), ReversibleRecipe)


def test_edits_by_hand_are_not_lost(bert_graph):
    merge, graph = MergeLinears(), graphs.fork(bert_graph)
    merge(graph)
    node = next(graphs.calls(graph, aten.gelu.default))
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(TransformationError, match="was edited after"):
        merge(graph, reverse=True)


def test_marks(bert_graph):
    remove, graph = RemoveDropout(), graphs.fork(bert_graph)
    remove(graph)
    node = remove.get_transformed_nodes(graph)[0]
    assert remove.transformed(node)
    assert not MergeLinears().transformed(node)
    remove.mark_as_restored(node)
    assert not remove.transformed(node)
    with pytest.raises(ValueError, match="was not transformed"):
        remove.mark_as_restored(node)
    remove.mark_as_transformed(node)
    assert remove.transformed(node)


def test_recipes_are_named_as_they_are_written():
    written = ["QuantizeLinears", "QuantizeLinears(keep='logits') + DeepCopy()", "QuantizeLinears(keep='pooler')"]
    names = [recipe.name for recipe in recipes([*written, "QuantizeLinears()"])]
    assert names == ["QuantizeLinears", "QuantizeLinears(keep='logits')+DeepCopy", "QuantizeLinears(keep='pooler')"]


def test_a_preset_is_its_steps_under_its_name():
    exact = parse_recipe("exact", REGISTRY, PRESETS)
    assert exact.name == "exact"
    assert [type(step) for step in exact.steps] == list(PRESETS["exact"])
    assert parse_recipe(repr(exact), REGISTRY).signature == exact.signature
    more = parse_recipe("exact + DeepCopy", REGISTRY, PRESETS)
    assert len(more.steps) == len(exact.steps) + 1
    assert more.name == "exact+DeepCopy"
    with pytest.raises(UsageError, match="exact"):
        parse_recipe("exakt", REGISTRY, PRESETS)


def test_what_has_to_be_last_in_a_preset_is_last_of_all():
    def last_two(text):
        return [repr(step) for step in parse_recipe(text, REGISTRY, PRESETS_ON_CUDA).steps][-2:]

    assert last_two("exact") == ["MergeLinears()", "Compile()"]
    assert last_two("exact+DeepCopy") == ["DeepCopy()", "Compile()"]
    assert last_two("exact+bf16+DeepCopy") == ["DeepCopy()", "Compile()"]
    assert last_two("exact+DeepCopy+Compile(cuda_graphs=True)") == ["DeepCopy()", "Compile(cuda_graphs=True)"]
