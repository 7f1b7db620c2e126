import copy
import itertools
import os

import pytest
import torch
from families import tiny

from bert_evaluation import aot_inductor, capture, compose, hashes, measure
from bert_evaluation import compiled as compiled_graphs
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.errors import TransformationError
from bert_evaluation.listing import step_diffs
from bert_evaluation.memory import memory
from bert_evaluation.streams import Streams
from bert_evaluation.transformation import history, promise_of
from bert_evaluation.transformations import (
    PRESETS,
    REGISTRY,
    Compile,
    DeepCopy,
    EliminateCommonSubexpressions,
    FoldConstants,
    FuseAttention,
    FuseLinearActivation,
    FuseResidual,
    MergeLinears,
    PackLinears,
    RemoveDropout,
    RemovePadding,
    parse_recipe,
)
from bert_evaluation.verification import check, default_probes, in_double, judge, observe, results

SHAPES = [(1, 1), (1, 7), (3, 1), (2, 64), (5, 130), (1, 512)]


def inputs_of(model, batch, length):
    inputs = text_inputs(model, batch, length)
    inputs["input_ids"] = torch.randint(99, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    inputs["attention_mask"][:, max(1, length - 3) :] = 0
    return inputs


@pytest.fixture(scope="module")
def plain(bert_graph):
    """The preset, with packed parts where this processor has them, and not compiled."""
    return parse_recipe("exact", REGISTRY, PRESETS)(graphs.fork(bert_graph))


@pytest.fixture(scope="module")
def compiled(plain):
    graph = Compile()(graphs.fork(plain))
    if graphs.stand_in(graph) is None:
        pytest.skip(history(graph)[-1].report.refused[0].reason)
    return graph


def distance(one, other):
    pairs = zip(graphs.output_tensors(one), graphs.output_tensors(other), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_it_keeps_its_promise_at_all_sizes_compiled_once(bert, compiled, plain):
    assert history(compiled)[-1].report.applied == ("the whole graph",)
    verdict = check(observe(bert), compiled)
    assert verdict.kept, verdict
    seconds = graphs.stand_in(compiled).seconds
    assert seconds > 0
    for (batch, length), mode in itertools.product(SHAPES, (torch.inference_mode, torch.no_grad, torch.enable_grad)):
        inputs = inputs_of(bert, batch, length)
        with mode():
            assert distance(plain(**inputs), compiled(**inputs)) < 1e-5
    assert graphs.stand_in(compiled).seconds == seconds


def test_it_is_right_in_several_threads_and_with_any_number_of_them(bert, compiled, plain):
    batches = [inputs_of(bert, 1 + number % 4, 5 + 11 * number) for number in range(12)]
    threads = torch.get_num_threads()
    with torch.no_grad():
        expected = [plain(**inputs) for inputs in batches]

    def read_one(number):
        with torch.inference_mode():
            return distance(expected[number], compiled(**batches[number]))

    # More than can be at work at once: lookups take Python's lock, which one that waits for its turn must not have.
    with Streams(2 + os.cpu_count()) as workers:
        assert max(workers.map(read_one, 3 * list(range(12)))) < 1e-5
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert max(map(read_one, range(3))) < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_outputs_and_inputs_are_as_before(bert, compiled, plain):
    inputs = inputs_of(bert, 3, 8)
    assert type(compiled(**inputs)) is type(plain(**inputs))
    assert distance(compiled(*(inputs[name] for name in graphs.input_names(compiled))), plain(**inputs)) < 1e-5
    twice = {name: tensor.repeat_interleave(2, dim=1)[:, ::2] for name, tensor in inputs.items()}
    assert not twice["input_ids"].is_contiguous()
    assert distance(compiled(**twice), plain(**inputs)) < 1e-5


def test_what_does_not_fit_is_an_error_and_never_read(bert, compiled):
    inputs = inputs_of(bert, 3, 8)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(3, 7\)"):
        compiled(**inputs | {"attention_mask": inputs["attention_mask"][:, :7]})
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 8\).* to be \(3, 8\)"):
        compiled(**inputs | {"attention_mask": inputs["attention_mask"][:1]})
    with pytest.raises(ValueError, match=r"input_ids has the shape \(3,\)"):
        compiled(**inputs | {"input_ids": inputs["input_ids"][:, 0]})
    with pytest.raises(ValueError, match=r"torch.int32 on cpu; compiled was for torch.int64"):
        compiled(**inputs | {"input_ids": inputs["input_ids"].int()})
    with pytest.raises(ValueError, match="without token_type_ids"):
        compiled(inputs["input_ids"], inputs["attention_mask"])
    # Behind the end of what positions are counted with, anything may lie.
    with pytest.raises(ValueError, match=r"The graph reads a length of 530 at most, not of 531\."):
        compiled(**inputs_of(bert, 1, 531))
    # In a loop of Inductor's own, this would end the process.
    with pytest.raises((RuntimeError, IndexError), match="index out of range"):
        compiled(**inputs | {"input_ids": inputs["input_ids"] + 1000})


def test_all_that_reads_nodes_finds_them(bert, compiled, plain):
    assert hashes.graph_hash(compiled) != hashes.graph_hash(plain)
    assert hashes.constants_hash(compiled) == hashes.constants_hash(plain)
    inputs = inputs_of(bert, 2, 16)
    assert memory(compiled, inputs) == memory(plain, inputs)
    assert promise_of(compiled) == Compile.promise
    (step,) = step_diffs(plain, Compile())
    changed = [line for line in step.diff.splitlines()[2:] if line.startswith("+")]
    assert len(changed) == 1
    assert changed[0].endswith("# by Compile")
    assert Compile().get_transformed_nodes(compiled) == [compiled.graph.output_node()]


def test_it_is_not_saved(tmp_path, bert, compiled, plain):
    save(compiled, tmp_path / "graph.pt2")
    again, inputs = read(tmp_path / "graph.pt2"), inputs_of(bert, 2, 9)
    assert graphs.stand_in(again) is None
    assert distance(again(**inputs), plain(**inputs)) < 1e-5


def test_forks_share_what_was_compiled(bert_graph, compiled):
    fork = graphs.fork(compiled)
    assert graphs.stand_in(fork) is graphs.stand_in(compiled)
    assert hashes.graph_hash(fork) == hashes.graph_hash(compiled)
    assert graphs.stand_in(DeepCopy()(compiled)) is graphs.stand_in(compiled)
    assert graphs.stand_in(copy.deepcopy(Compile()(graphs.fork(bert_graph)))) is None
    assert graphs.stand_in(in_double(compiled)) is None


def test_it_is_the_last_step(compiled):
    graph = graphs.fork(compiled)
    before = hashes.graph_hash(graph), history(graph)
    for step in (RemoveDropout(), Compile()):
        with pytest.raises(TransformationError, match="Compile has to be the last step"):
            step(graph)
        assert (hashes.graph_hash(graph), history(graph)) == before
        assert graphs.stand_in(graph) is graphs.stand_in(compiled)


def test_undo_gives_the_graph_back(bert, compiled, plain):
    graph = Compile()(graphs.fork(compiled), reverse=True)
    assert graphs.stand_in(graph) is None
    assert hashes.graph_hash(graph) == hashes.graph_hash(plain)
    inputs = inputs_of(bert, 2, 9)
    assert distance(graph(**inputs), plain(**inputs)) == 0
    # A step in front of it: both are undone, and it is applied again.
    graph = compose(RemoveDropout(), Compile(), inplace=False)(capture(bert))
    RemoveDropout()(graph, reverse=True)
    assert [step.transformation.name for step in history(graph)] == ["Compile"]
    assert graphs.stand_in(graph) is not None


def test_a_graph_is_as_it_was_after_an_error(compiled):
    graph = graphs.fork(compiled)

    class Failing(Compile):
        def rewrite(self, graph, site):
            super().rewrite(graph, site)
            raise ValueError("no")

    Compile()(graph, reverse=True)
    with pytest.raises(ValueError, match="no"):
        Failing()(graph)
    assert graphs.stand_in(graph) is None


def test_the_first_call_of_a_measurement_has_the_time_of_compiling(bert, compiled, plain):
    found = measure({"Base": plain, "Compiled": compiled}, inputs_of(bert, 1, 4), rounds=1, warm_up=1)
    assert found.first_calls["Compiled"] >= graphs.stand_in(compiled).seconds


def refused(graph):
    step = Compile()
    step(graph)
    assert graphs.stand_in(graph) is None
    assert step.report.applied == ()
    return step.report.refused[0].reason


def moved(graph, device):
    """The graph as if it were on that device."""
    twin = graphs.fork(graph)
    for node in twin.graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape, device=device)
    return twin


def test_it_refuses_what_it_cannot_compile(bert_graph, monkeypatch):
    assert refused(moved(bert_graph, "mps")) == "Compile is for cpu and cuda, and the graph is on mps:0."
    unknown = graphs.fork(bert_graph)
    next(iter(unknown.graph.find_nodes(op="placeholder"))).meta.pop("val")
    assert refused(unknown) == "The graph does not know the shape of its input input_ids."
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refused(graphs.fork(bert_graph)) == (
        "TorchInductor needs a C++ compiler, and no-such-compiler is not there; install it, or name another as CXX."
    )


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this torch looks for a GPU that is not there",
)
def test_it_refuses_a_gpu_without_what_compiles_for_it(bert_graph, monkeypatch):
    on_cuda = moved(bert_graph, "cuda")
    monkeypatch.setattr(compiled_graphs, "find_spec", lambda name: None)
    assert refused(on_cuda) == "triton, which TorchInductor writes kernels for CUDA in, is not installed."
    monkeypatch.setattr(compiled_graphs, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert refused(on_cuda) == (
        "Triton needs a C compiler, and no-such-compiler is not there; install it, or name another as CC."
    )


def test_it_refuses_a_graph_that_writes_into_its_inputs():
    class Writes(torch.nn.Module):
        def forward(self, x):
            return x.add_(1) * 2

    step = Compile()
    step(capture(Writes(), {"x": torch.ones(2, 3)}))
    assert step.report.refused[0].reason == "add_ writes in place into what the graph is given or keeps."


@pytest.mark.skipif(not aot_inductor.is_there(), reason="this torch has a loader of libraries that is not used")
def test_what_inductor_cannot_compile_is_told_in_a_sentence(bert, bert_graph, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing was compiled before

    def broken(*args, **kwargs):
        raise RuntimeError("no such luck\nand more")

    graph = Compile()(graphs.fork(bert_graph))
    for name, why in (("aoti_compile_and_package", "no such luck"), ("why_not_built", "no compiler")):
        monkeypatch.setattr(aot_inductor, name, broken if name.startswith("aoti") else lambda: "no compiler")
        with pytest.raises(TransformationError, match=rf"TorchInductor cannot compile this graph: {why}$"):
            graph(**inputs_of(bert, 1, 4))


def test_weights_that_onednn_has_packed_are_compiled_by_torch_compile(bert, bert_graph):
    recipe = compose(MergeLinears(), FuseLinearActivation(anyway=True), FuseResidual(), PackLinears(), Compile())
    graph = recipe(graphs.fork(bert_graph))
    assert recipe.reports[-2].applied
    assert not aot_inductor.takes(graph)
    assert check(observe(bert), graph).kept


def test_as_torch_compile_calls_it_where_launches_are_recorded(bert, plain, monkeypatch):
    """CUDA's way, which nothing keeps from a CPU."""
    graph = Compile()(graphs.fork(plain))
    monkeypatch.setattr(compiled_graphs, "_library", compiled_graphs._in_time)
    with torch.inference_mode():
        graph(**inputs_of(bert, 3, 8))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, length in SHAPES:
                inputs = inputs_of(bert, batch, length)
                assert type(graph(**inputs)) is type(plain(**inputs))
                assert distance(plain(**inputs), graph(**inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v2", "modernbert"])
def test_other_families(family):
    model = tiny(family)
    graph = Compile()(capture(model))
    verdict = check(observe(model), graph)
    assert verdict.kept, verdict


@pytest.mark.slow
def test_an_operator_that_is_made_of_others_is_taken_as_such():
    library = torch.library.Library("made_up", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    graph = capture(torch.nn.Linear(4, 3), {"input": torch.ones(2, 4)})
    (node,) = graphs.calls(graph, torch.ops.aten.linear.default)
    with graph.graph.inserting_after(node):
        after = graph.graph.call_function(torch.ops.made_up.twice.default, (node,))
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    after.meta["val"] = node.meta["val"]
    graph.recompile()
    x = torch.randn(5, 4)
    assert torch.allclose(Compile()(graphs.fork(graph))(input=x), graph(input=x), atol=1e-6)


@pytest.mark.slow
def test_behind_packed_sequences(bert, bert_graph):
    steps = (RemoveDropout(), FoldConstants(), EliminateCommonSubexpressions(), FuseAttention(), RemovePadding())
    graph = compose(*steps, Compile(), inplace=False)(bert_graph)
    verdict = check(observe(bert), graph)
    assert verdict.kept, verdict


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "int8", "CastToBFloat16(anyway=True)", "CastToFloat16(anyway=True)"])
def test_in_lower_precision(bert, bert_graph, recipe):
    """It is held against the float64 of the graph before it, which inference mode may have made."""
    with torch.inference_mode():
        before = parse_recipe(recipe, REGISTRY, PRESETS)(graphs.fork(bert_graph))
    reference = observe(before, default_probes(bert))
    graph = Compile()(graphs.fork(before))
    verdict = judge(reference, results(graph, reference.probes), Compile.promise)
    assert verdict.kept, verdict
