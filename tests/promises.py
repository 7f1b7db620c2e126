"""What every transformation has to hold, of whatever model on whatever device."""

import torch

from bert_evaluation import graph as graphs
from bert_evaluation import hashes
from bert_evaluation.transformation import ReversibleTransformation, history
from bert_evaluation.verification import check


def parameters(graph):
    return {name: parameter.detach().clone() for name, parameter in graph.named_parameters(remove_duplicate=False)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def applied_and_kept(transformation, base, reference):
    """Apply it to a fork of `base`: it keeps its promise to the reference's model, and touches neither of the two."""
    model, graph = reference.model, graphs.fork(base)
    hash_before, of_model = hashes.graph_hash(base), parameters(model)

    transformation(graph)

    applied, refused = transformation.report.applied, transformation.report.refused
    assert all(refusal.reason.endswith(".") for refusal in refused)
    assert (hashes.graph_hash(graph) != hash_before) == bool(applied)
    verdict = check(reference, graph)
    assert verdict.kept, verdict
    assert same(of_model, parameters(model))
    assert hashes.graph_hash(base) == hash_before
    return graph


def undone(transformation, graph, base):
    """Undo it: nodes, parameters and history are those of `base`."""
    assert isinstance(transformation, ReversibleTransformation)
    transformation(graph, reverse=True)
    assert hashes.graph_hash(graph) == hashes.graph_hash(base)
    assert same(parameters(base), parameters(graph))
    assert history(graph) == history(base)
