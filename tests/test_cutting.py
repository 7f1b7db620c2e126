"""A graph cut in two computes what it computed in one piece."""

import pytest
import torch
from families import FAMILIES, tiny

from bert_evaluation import capture, compose, varlen
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.cutting import cut
from bert_evaluation.transformations import FuseAttention, RemoveDropout, RemovePadding


def padded(model):
    inputs = text_inputs(model, 3, 31)
    inputs["attention_mask"][1, 20:] = 0
    inputs["attention_mask"][2] = 0
    return inputs


def same(graph, first, rest, inputs):
    with torch.inference_mode():
        expected = graphs.output_tensors(graph(**inputs))
        found = rest(**inputs, **first(**inputs))
    assert len(found) == len(expected) > 0
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_padding_goes(family):
    model = tiny(family)
    graph = compose(RemoveDropout(), FuseAttention(), RemovePadding())(capture(model))
    place = next(graphs.calls(graph, varlen.PLACES), None)
    if place is None:
        pytest.skip("nothing is packed in this family")
    first, rest = cut(graph, place)
    assert same(graph, first, rest, padded(model))
    # Nothing is computed twice, and the rest does not count tokens.
    assert not list(graphs.calls(rest, varlen.PLACES))
    computed = {node.name for node in first.graph.nodes if node.op == "call_function"}
    again = {node.name for node in rest.graph.nodes if node.op == "call_function"} & computed
    assert all("sym_size" in name for name in again)


def test_anywhere(bert, bert_graph):
    nodes = [node for node in bert_graph.graph.nodes if node.op == "call_function" and "val" in node.meta]
    tensors = [node for node in nodes if isinstance(node.meta["val"], torch.Tensor)]
    for place in tensors[::9]:
        first, rest = cut(bert_graph, place)
        assert place.name in dict(first.graph.output_node().args[0])
        assert same(bert_graph, first, rest, padded(bert)), place.name


def test_the_halves_read_the_same_parameters(bert_graph):
    place = next(node for node in bert_graph.graph.nodes if node.op == "call_function" and "linear" in node.name)
    for half in cut(bert_graph, place):
        for name in graphs.read_names(half):
            assert graphs.get_tensor(half, name) is graphs.get_tensor(bert_graph, name)
