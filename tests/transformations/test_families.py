"""Each transformation on every family: it fires, keeps its promise, never touches the model, and is undone exactly."""

import pytest
from families import FAMILIES, tiny
from promises import applied_and_kept, parameters, same, undone

from bert_evaluation import capture, compose, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.transformation import history
from bert_evaluation.transformations import (
    ORIGINAL,
    ChangeTrueDivToMulByInverse,
    FuseBiasInLinear,
    LintAndRecompile,
    MergeLinears,
    RemoveDropout,
)
from bert_evaluation.verification import check, observe

# Sites applied of found, of tiny models with two layers. The families differ in how they are written.
MERGES = dict.fromkeys(FAMILIES, (2, 2)) | {
    "albert": (1, 1),  # its layers share their weights
    "deberta-v2": (0, 4),  # query and key of positions share their weights with those of words
    "modernbert": (0, 0),  # written with one linear already
    "mobilebert": (4, 4),
}
DROPOUTS = dict.fromkeys(FAMILIES, 5) | {
    "distilbert": 4,
    "albert": 3,
    "mpnet": 7,
    "deberta-v2": 9,
    "modernbert": 4,
    "mobilebert": 3,
}
DIVISIONS = dict.fromkeys(FAMILIES, (0, 0)) | {"mpnet": (4, 4), "deberta-v2": (1, 8)}


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    model = tiny(request.param)
    return request.param, model, capture(model), observe(model)


@pytest.mark.parametrize("kind", ORIGINAL)
def test_sites_promise_isolation_reverse(subject, kind):
    family, _, base, reference = subject
    transformation = kind()

    graph = applied_and_kept(transformation, base, reference)

    report = transformation.report
    counts = (len(report.applied), report.found)
    if kind is MergeLinears:
        assert counts == MERGES[family]
    elif kind is RemoveDropout:
        assert counts == (DROPOUTS[family],) * 2
    elif kind is ChangeTrueDivToMulByInverse:
        assert counts == DIVISIONS[family]
    elif kind is FuseBiasInLinear:
        assert counts[0] > 0
    else:
        assert (kind, counts) == (LintAndRecompile, (0, 0))
    assert bool(transformation.get_transformed_nodes(graph)) == bool(report.applied)

    undone(transformation, graph, base)

    assert not transformation.get_transformed_nodes(graph)
    assert check(reference, graph).max_abs_error == 0


def test_all_of_them_composed(subject):
    _, _, base, reference = subject
    steps = [kind() for kind in ORIGINAL]
    graph = compose(*steps, inplace=False)(base)
    assert check(reference, graph).kept
    assert len(history(graph)) == len(steps)
    undone(compose(*steps), graph, base)


def test_undone_one_step_at_a_time_in_any_order(subject):
    _, _, base, reference = subject
    steps = [RemoveDropout(), MergeLinears(), FuseBiasInLinear()]
    for order in ((2, 1, 0), (0, 1, 2), (1, 2, 0)):
        graph = compose(*steps, inplace=False)(base)
        for index in order:
            steps[index](graph, reverse=True)
            assert check(reference, graph).kept
        assert hashes.graph_hash(graph) == hashes.graph_hash(base)
        assert same(parameters(base), parameters(graph))


def test_untouched_parameters_stay_shared(subject):
    _, _, base, _ = subject
    graph = MergeLinears()(graphs.fork(base))
    own, shared = graphs.tensors(graph), graphs.tensors(base)
    assert all(own[name] is shared[name] for name in own.keys() & shared.keys())
    assert RemoveDropout()(graphs.fork(base)).state_dict().keys() == base.state_dict().keys()
