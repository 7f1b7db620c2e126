"""Recordings: which calls share one, what is copied in and out, and (where there is a GPU) that they are right."""

import contextlib
import copy
import itertools
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from families import FAMILIES, SIZES, tiny
from torch import nn

from bert_evaluation import capture, compiled, compose, cuda_graphs, hashes, measure
from bert_evaluation import graph as graphs
from bert_evaluation.buckets import paddable
from bert_evaluation.capturing import CHECKPOINT, longest_input, read, save, text_inputs
from bert_evaluation.cuda_graphs import Replayed
from bert_evaluation.errors import TransformationError
from bert_evaluation.promise import Reassociates
from bert_evaluation.signature import BATCH, MASK, Signature
from bert_evaluation.transformation import history, promise_of
from bert_evaluation.transformations import (
    PRESETS,
    REGISTRY,
    Compile,
    FuseAttention,
    RemoveDropout,
    RemovePadding,
    parse_recipe,
)
from bert_evaluation.verification import check, observe

SHAPES = [(1, 1), (1, 128), (3, 31), (8, 384), (1, 512), (1, 1), (3, 32), (3, 31), (2, 31)]
BUCKETS = {(1, 32), (1, 128), (3, 32), (8, 384), (1, 512), (2, 32)}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


class StandIn:
    """Stands in for what records CUDA graphs: a call is made again, and its results are written where they were."""

    def __init__(self, device=None):
        self.recorded = self.followed = self.replayed = 0
        self.at_work = False

    def record(self, call):
        self.recorded += 1
        returned = call()

        def replay():
            assert not self.at_work, "two recordings that share memory are replayed at once"
            self.at_work = True
            for old, new in zip(graphs.output_tensors(returned), graphs.output_tensors(call()), strict=True):
                old.copy_(new)
            self.replayed += 1
            self.at_work = False

        return replay, returned

    def follow(self):
        self.followed += 1


def inputs_of(model, batch, length):
    inputs = text_inputs(model, batch, length)
    ids = torch.randint(99, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    inputs["input_ids"] = ids.to(inputs["input_ids"].device)
    inputs[MASK][0, max(1, length - 3) :] = 0
    return inputs


def distance(one, other, where=...):
    """The largest difference where a mask is 1."""
    pairs = zip(graphs.output_tensors(one), graphs.output_tensors(other), strict=True)
    return max(float((a - b)[where].detach().abs().max()) for a, b in pairs)


class Calls:
    """A graph, replayed; with what it was given at each call."""

    def __init__(self, graph, recorder, longest=None, limit=cuda_graphs.LIMIT):
        self.signature, self.seen = Signature(graph), []
        self.most = paddable(graph, self.signature, longest)
        self.graph = graph
        self.replayed = Replayed(self.function, self.signature, self.most, recorder, limit)

    def function(self, **inputs):
        self.seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return self.graph(**inputs)

    def __call__(self, **inputs):
        ready, sizes = self.signature.checked((), inputs)
        with torch.no_grad():
            return self.replayed(ready, sizes)


@pytest.fixture
def recorder():
    return StandIn()


@pytest.fixture
def calls(bert_graph, recorder):
    return Calls(bert_graph, recorder)


def test_shapes_share_recordings_and_results_are_those_of_the_function(bert, bert_graph, calls, recorder):
    modes = itertools.cycle((torch.inference_mode, torch.no_grad, torch.enable_grad))
    for number, ((batch, length), mode) in enumerate(zip(SHAPES, modes, strict=False), 1):
        inputs = inputs_of(bert, batch, length)
        with mode():
            found, expected = calls(**inputs), bert_graph(**inputs)
            assert type(found) is type(expected)
            assert found.start_logits.shape == (batch, length)
            assert distance(expected, found, inputs[MASK].bool()) < 1e-5
        assert (recorder.followed, recorder.replayed) == (number, number)
    assert recorder.recorded == len(BUCKETS)
    assert {tuple(each["input_ids"].shape) for each in calls.seen} == BUCKETS


def test_padding_is_all_zeros_whatever_was_there_before(bert, calls):
    for batch, length in ((3, 32), (3, 5), (3, 31), (3, 31)):
        inputs = inputs_of(bert, batch, length)
        calls(**inputs)
        for name, tensor in calls.seen[-1].items():
            assert tensor.shape == (3, 32)
            assert tensor[:, :length].equal(inputs[name])
            assert not tensor[:, length:].any()
    inputs = inputs_of(bert, 9, 5)
    calls(**inputs)
    for name, tensor in calls.seen[-1].items():
        assert tensor.shape == (10, 32)
        assert tensor[:9, :5].equal(inputs[name])
        assert tensor.sum() == inputs[name].sum()


def test_a_row_without_a_real_token_disturbs_no_other(bert, bert_graph, calls):
    inputs = inputs_of(bert, 3, 19)
    inputs[MASK][1] = 0
    found = calls(**inputs)
    assert all(tensor.isfinite().all() for tensor in graphs.output_tensors(found))
    assert distance(bert_graph(**inputs), found, inputs[MASK].bool()) < 1e-5


def test_results_are_the_callers_own(bert, calls):
    first = calls(**inputs_of(bert, 2, 32))
    kept = copy.deepcopy(first)
    second = calls(**inputs_of(bert, 2, 30))
    assert distance(first, kept) == 0
    assert first.start_logits.data_ptr() != second.start_logits.data_ptr()
    assert not {id(each) for each in graphs.output_tensors(second)} & {
        id(each) for each in graphs.output_tensors(first)
    }


def test_the_recording_that_was_not_used_for_longest_goes(bert, bert_graph, recorder):
    calls = Calls(bert_graph, recorder, limit=2)
    for length, recorded in ((32, 1), (64, 2), (20, 2), (96, 3), (31, 3), (64, 4), (96, 5), (64, 5)):
        inputs = inputs_of(bert, 1, length)
        assert distance(bert_graph(**inputs), calls(**inputs), inputs[MASK].bool()) < 1e-5
        assert recorder.recorded == recorded


def test_large_inputs_are_not_recorded(bert, bert_graph, calls, recorder, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LARGE", 60)
    for length, recorded in ((20, 1), (21, 1)):
        inputs = inputs_of(bert, 3, length)
        assert distance(bert_graph(**inputs), calls(**inputs), inputs[MASK].bool()) < 1e-5
        assert recorder.recorded == recorded
    assert calls.seen[-1]["input_ids"].shape == (3, 21)


def test_what_cannot_be_recorded_is_told_in_a_sentence_and_tried_again(bert, bert_graph, recorder, monkeypatch):
    calls, inputs = Calls(bert_graph, recorder), inputs_of(bert, 1, 3)
    record = recorder.record

    def fail(error):
        def failing(call):
            raise error

        monkeypatch.setattr(recorder, "record", failing)

    fail(RuntimeError("operation not permitted when stream is capturing\nand more"))
    with pytest.raises(
        TransformationError,
        match=r"cannot be recorded as a CUDA graph \(operation not permitted when stream is capturing\); apply Compile",
    ):
        calls(**inputs)
    fail(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        calls(**inputs)
    monkeypatch.setattr(recorder, "record", record)
    assert distance(bert_graph(**inputs), calls(**inputs)) < 1e-5


def test_threads_take_turns(bert, bert_graph, recorder):
    calls = Calls(bert_graph, recorder, limit=3)
    batches = [inputs_of(bert, 1 + number % 3, 3 + 17 * number) for number in range(8)]
    with torch.no_grad():
        expected = [bert_graph(**inputs) for inputs in batches]

    def off(number):
        return distance(expected[number], calls(**batches[number]), batches[number][MASK].bool())

    with ThreadPoolExecutor(4) as workers:
        assert max(workers.map(off, 4 * list(range(8)))) < 1e-5


class Stream:
    """Stands in for a stream; keeps what it has waited for."""

    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def streams(monkeypatch):
    """Two streams, in a list whose first is the current one."""
    found = [Stream(), Stream()]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[0])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay="replay"))
    # Only a build of torch with CUDA has it; tests on a GPU call the real one.
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return found


def test_a_stream_waits_for_another_that_was_used_before(streams):
    recorder, (one, other) = cuda_graphs.CudaRecorder("cuda"), streams
    for current, waited_for in ((one, []), (other, [one]), (other, [one]), (one, [other])):
        streams[0] = current
        recorder.follow()
        assert current.waited_for == waited_for


def test_what_is_said_of_a_failure_is_where_it_began(streams, monkeypatch):
    @contextlib.contextmanager
    def capturing(graph, pool, stream, capture_error_mode):
        try:
            yield
        finally:
            if failing:
                raise RuntimeError("the capture was invalidated")

    def call():
        calls.append(len(calls))
        if failing and calls[-1] == cuda_graphs.WARM_UP:
            raise RuntimeError("not permitted while capturing")
        return calls[-1]

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    recorder, failing, calls = cuda_graphs.CudaRecorder("cuda"), True, []
    before = recorder._stream, recorder._pool
    with pytest.raises(RuntimeError, match="not permitted while capturing"):
        recorder.record(call)
    assert before[0] is not recorder._stream
    assert before[1] is not recorder._pool
    failing, calls = False, []
    assert recorder.record(call) == ("replay", cuda_graphs.WARM_UP)


def test_without_a_mask_each_shape_is_recorded_as_it_is(recorder):
    class Doubled(nn.Module):
        def forward(self, x):
            return {"twice": torch.cat([x, x]), "rows": x.shape[0], "same": x}

    graph = capture(Doubled(), {"x": torch.ones(2, 3)})
    calls = Calls(graph, recorder)
    assert calls.most == {}
    for rows in (5, 1, 9, 5):
        x = torch.randn(rows, 3)
        found = calls(x=x)
        assert found["twice"].equal(torch.cat([x, x]))
        assert found["rows"] == rows
        assert found["same"].equal(x)
        assert found["same"] is not x
    assert recorder.recorded == 3


# The transformation, where a graph on a CPU is recorded by the stand-in, and Inductor leaves it as it is.


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", StandIn)
    monkeypatch.setattr(cuda_graphs, "why_not", lambda graph: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def replaying(model, recipe="LintAndRecompile"):
    """A graph of a model, with CUDA graphs; it knows how much the model reads at most, as one of a checkpoint does."""
    graph = capture(model)
    graph.meta[CHECKPOINT] = ("made up", longest_input(model))
    return parse_recipe(f"{recipe}+Compile(cuda_graphs=True)", REGISTRY, PRESETS)(graph)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("made_up")
def test_the_promise_is_kept_in_every_family(family):
    """Where nothing but the batch is rounded up, it is about fully masked rows too."""
    model = tiny(family)
    graph = replaying(model)
    assert promise_of(graph) == Reassociates(where=None if family == "mobilebert" else MASK)
    verdict = check(observe(model), graph)
    assert verdict.kept, verdict


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertModel", "RobertaForTokenClassification"])
@pytest.mark.usefixtures("made_up")
def test_the_promise_is_kept_where_a_row_has_one_result(kind):
    """Where attention is written out, a row without a real token attends to all tokens alike, the bucket's too."""
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**SIZES | {"num_labels": 3, "attn_implementation": "eager"})).eval()
    graph = replaying(model)
    assert promise_of(graph) == Reassociates(where=MASK)
    verdict = check(observe(model), graph)
    assert verdict.kept, verdict


@pytest.mark.usefixtures("made_up")
def test_the_transformation_is_as_without_them(tmp_path, bert, bert_graph):
    before = hashes.graph_hash(bert_graph)
    step = Compile(cuda_graphs=True)
    graph = step(graphs.fork(bert_graph))
    call, inputs = graphs.stand_in(graph), inputs_of(bert, 2, 9)
    assert isinstance(call, compiled.Compiled)
    assert history(graph)[-1].report.applied == ("the whole graph",)
    assert compiled.is_pending(graph)
    compiled.prepare([graph])
    assert not compiled.is_pending(graph)
    assert compiled.seconds(graph) > 0
    assert distance(bert_graph(**inputs), graph(**inputs), inputs[MASK].bool()) < 1e-5
    assert graphs.stand_in(graphs.fork(graph)) is call
    save(graph, tmp_path / "graph.pt2")
    assert distance(bert_graph(**inputs), read(tmp_path / "graph.pt2")(**inputs)) < 1e-5
    step(graph, reverse=True)
    assert graphs.stand_in(graph) is None
    assert hashes.graph_hash(graph) == before


@pytest.mark.usefixtures("made_up")
def test_a_first_call_has_the_time_of_recording(bert, bert_graph, monkeypatch):
    def slow(self, call):
        time.sleep(0.2)
        return StandIn.slow(self, call)

    monkeypatch.setattr(StandIn, "slow", StandIn.record, raising=False)
    monkeypatch.setattr(StandIn, "record", slow)
    graph = Compile(cuda_graphs=True)(graphs.fork(bert_graph))
    found = measure({"Base": bert_graph, "Replayed": graph}, inputs_of(bert, 1, 4), rounds=2, warm_up=1)
    assert found.first_calls["Replayed"] >= 0.2 + compiled.seconds(graph)
    assert max(found.seconds["Replayed"]) < 0.2


@pytest.mark.usefixtures("made_up")
def test_what_compiled_code_could_not_count_is_refused(bert, bert_graph, monkeypatch):
    graph = Compile(cuda_graphs=True)(graphs.fork(bert_graph))
    graphs.stand_in(graph)._on_cpu = False  # as if it were for CUDA
    monkeypatch.setattr(compiled, "COUNTABLE", 10 * 32 * 64)  # a bucket's tokens, in the intermediate layer
    graph(**inputs_of(bert, 9, 20))
    with pytest.raises(ValueError, match=r"A tensor would have 24,576 numbers; compiled code counts to 20,480 only\."):
        graph(**inputs_of(bert, 12, 20))


def test_arguments_are_told_and_the_default_is_as_it_was():
    assert repr(Compile()) == repr(parse_recipe("Compile(autotune=False)", REGISTRY)) == "Compile()"
    for text in ("Compile(cuda_graphs=True)", "Compile(autotune=True)", "Compile(autotune=True, cuda_graphs=True)"):
        (step,) = parse_recipe(text, REGISTRY).steps
        assert repr(step) == text
        assert step.signature != Compile().signature
    assert Compile().promise == Compile.promise == Reassociates()
    assert Compile(cuda_graphs=True).promise == Reassociates(where=MASK)


def test_it_refuses_what_cannot_be_recorded(bert_graph):
    def reason(graph):
        step = Compile(cuda_graphs=True)
        step(graph)
        assert graphs.stand_in(graph) is None
        assert promise_of(graph).where is None
        return step.report.refused[0].reason

    assert reason(graphs.fork(bert_graph)) == (
        "CUDA graphs are for cuda, and the graph is on cpu; apply Compile() without cuda_graphs."
    )
    packed = compose(RemoveDropout(), FuseAttention(), RemovePadding(), inplace=False)(bert_graph)
    inputs = list(packed.graph.find_nodes(op="placeholder"))
    with inputs[0].meta["val"].fake_mode:
        for node in inputs:  # as if it were there
            node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=torch.int64, device="cuda")
    assert cuda_graphs.why_not(packed) == (
        "places_default waits for the device to count its tokens, and what waits cannot be recorded;"
        " apply Compile() without cuda_graphs, or leave RemovePadding out."
    )


# On a GPU, as it is.


@pytest.fixture(scope="module")
def on_cuda():
    """A model, its graph, that compiled, and that compiled with CUDA graphs."""
    model = tiny("bert").cuda()
    plain = parse_recipe("exact", REGISTRY, PRESETS)(capture(model))
    steps = Compile(), Compile(cuda_graphs=True)
    found = [step(graphs.fork(plain)) for step in steps]
    assert [step.report.refused for step in steps] == [(), ()]
    compiled.prepare(found)
    return model, plain, *found


@pytest.fixture
def replays(on_cuda):
    """Makes what replays the graph that is compiled already."""
    _, plain, compiled_graph, _ = on_cuda
    signature = Signature(plain)

    def make(recorder, limit=cuda_graphs.LIMIT):
        replayed = Replayed(
            lambda **inputs: compiled_graph(**inputs), signature, paddable(plain, signature), recorder, limit
        )
        return lambda **inputs: replayed(*signature.checked((), inputs))

    return make


DEVICE = torch.device("cuda", 0)


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_replays_are_the_compiled_graph(on_cuda):
    model, plain, compiled_graph, replaying = on_cuda
    modes = itertools.cycle((torch.inference_mode, torch.no_grad, torch.enable_grad))
    for (batch, length), mode in zip((*SHAPES, *SHAPES), modes, strict=False):
        inputs = inputs_of(model, batch, length)
        real = inputs[MASK].bool()
        with mode():
            found = replaying(**inputs)
            assert found.start_logits.shape == (batch, length)
            assert distance(plain(**inputs), found, real) < 1e-3
            assert distance(compiled_graph(**inputs), found, real) < 1e-3
    inputs = inputs_of(model, 3, 19)
    inputs[MASK][1] = 0
    assert distance(plain(**inputs), replaying(**inputs), inputs[MASK].bool()) < 1e-3


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_the_promise_is_kept_and_the_graph_can_be_saved_and_given_back(tmp_path, on_cuda):
    model, plain, compiled_graph, replaying = on_cuda
    assert promise_of(replaying) == Reassociates(where=MASK)
    reference = observe(model)
    for graph in (compiled_graph, replaying):
        verdict = check(reference, graph)
        assert verdict.kept, verdict
    inputs = inputs_of(model, 2, 9)
    save(replaying, tmp_path / "graph.pt2")
    assert distance(plain(**inputs), read(tmp_path / "graph.pt2")(**inputs)) < 1e-3
    restored = Compile(cuda_graphs=True)(graphs.fork(replaying), reverse=True)
    assert graphs.stand_in(restored) is None
    assert hashes.graph_hash(restored) == hashes.graph_hash(plain)


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_recordings_go_and_come_back_and_memory_does_not_grow(on_cuda, replays):
    model, plain, *_ = on_cuda
    call = replays(cuda_graphs.CudaRecorder(DEVICE), limit=2)
    batches = [inputs_of(model, 1, length) for length in (5, 40, 70, 100, 5)]
    used = []
    with torch.no_grad():
        expected = [plain(**inputs) for inputs in batches]
        for _ in range(4):
            for inputs, right in zip(batches, expected, strict=True):
                assert distance(right, call(**inputs), inputs[MASK].bool()) < 1e-3
            torch.cuda.synchronize()
            used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        for _ in range(500):
            call(**batches[-1])
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    for later in used[2:]:
        assert later[0] <= used[1][0]
        assert later[1] <= used[1][1]


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_threads_and_streams_take_turns(on_cuda, replays):
    model, plain, *_ = on_cuda
    call = replays(cuda_graphs.CudaRecorder(DEVICE))
    batches = [inputs_of(model, 1 + number % 3, 30 * (number + 1)) for number in range(6)]
    with torch.no_grad():
        expected = [plain(**inputs) for inputs in batches]
    torch.cuda.synchronize()

    def off(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            which = number % len(batches)
            return distance(expected[which], call(**batches[which]), batches[which][MASK].bool())

    assert max(map(off, range(len(batches)))) < 1e-3  # recorded, each on a stream
    with ThreadPoolExecutor(2) as workers:
        assert max(workers.map(off, range(60))) < 1e-3


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_it_is_refused_behind_remove_padding(on_cuda):
    model, *_ = on_cuda
    graph = compose(RemoveDropout(), FuseAttention(), RemovePadding(), Compile(cuda_graphs=True))(capture(model))
    assert graphs.stand_in(graph) is None
    assert "waits for the device to count its tokens" in history(graph)[-1].report.refused[0].reason


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_a_recording_that_fails_says_why_and_others_go_on(on_cuda, replays):
    model, plain, *_ = on_cuda
    recorder = cuda_graphs.CudaRecorder(DEVICE)
    call, inputs = replays(recorder), inputs_of(model, 1, 9)
    assert distance(plain(**inputs), call(**inputs), inputs[MASK].bool()) < 1e-3
    graph = capture(Waits().cuda(), {"x": torch.ones(2, 3, device="cuda")})
    failing = Replayed(Waits(), Signature(graph), {}, recorder)
    with pytest.raises(TransformationError, match="cannot be recorded as a CUDA graph"):
        failing({"x": torch.ones(2, 3, device="cuda")}, {BATCH: 2})
    for length in (9, 40):  # recorded before, and anew
        inputs = inputs_of(model, 1, length)
        assert distance(plain(**inputs), call(**inputs), inputs[MASK].bool()) < 1e-3


class Waits(nn.Module):
    """Waits for the device, but not where it is captured."""

    def forward(self, x):
        if not torch.compiler.is_exporting():
            x.sum().item()
        return x + 1
