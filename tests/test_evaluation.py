import json
import subprocess
import sys
import time

import pytest
import torch
from families import FAMILIES
from family_tokenizers import checkpoint, left_padded

from bert_evaluation import capture, compose, evaluate, load
from bert_evaluation import evaluation as evaluations
from bert_evaluation.answering import TOKENS, BatchResult, Reader, cheapest_batching
from bert_evaluation.errors import UsageError
from bert_evaluation.evaluation import evaluate_together
from bert_evaluation.squad import Dataset, Example
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.squad.batches import Batching
from bert_evaluation.squad.windows import Windowing, windows
from bert_evaluation.transformations import original_recipes

PASSAGE = "The first king built the city by the river in 1874. “Who won it?” was the question of the year; Zoë won."
QUESTIONS = ("Who built the city?", "When was it built?", "   what won?", "W" * 90, "")
CASES = [(question, context) for context in (PASSAGE, PASSAGE * 4, "", " ", "king") for question in QUESTIONS]
DATA = Dataset(
    "cases",
    tuple(
        Example(str(index), question, context, ("the city",) if "city" in context and index % 2 else ())
        for index, (question, context) in enumerate(CASES)
    ),
)
RULE, WINDOWING, BATCHING = AnswerRule(null_threshold=1e9), Windowing(96, 24), Batching(tokens=400)


class Interruption(Exception):
    pass


class Kept(dict):
    """Results in memory, which refuses to take more than `limit`."""

    def __init__(self, limit=None):
        super().__init__()
        self.limit = limit

    def put(self, number, result):
        if len(self) == self.limit:
            raise Interruption
        self[number] = result


class Counting(Reader):
    """A reader that counts what it reads."""

    read_windows = 0

    def read(self, group, session=0):
        type(self).read_windows += len(group)
        return super().read(group, session)


@pytest.fixture(scope="module", params=FAMILIES)
def family_checkpoint(request, tmp_path_factory):
    return load(checkpoint(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def bert_checkpoint(tmp_path_factory):
    return load(checkpoint("bert", tmp_path_factory.mktemp("bert")))


def answers_of(models, tokenizer, **more):
    readers = {name: Reader(model, tokenizer, RULE) for name, model in models.items()}
    return evaluate_together(readers, DATA, BATCHING, WINDOWING, **more)


def test_every_family_is_captured_transformed_evaluated_and_restored(family_checkpoint):
    model, tokenizer = family_checkpoint
    base = capture(model)
    *_, recipe = original_recipes()
    together = compose(*recipe.steps, inplace=False)
    transformed = together(base)
    restored = compose(*recipe.steps)(together(base), reverse=True)
    found = answers_of({"model": model, "graph": base, "transformed": transformed, "restored": restored}, tokenizer)
    assert together.report.applied
    assert found["model"].details == found["graph"].details == found["restored"].details
    assert found["model"].answers == found["transformed"].answers
    assert found["model"].scores["f1"] == pytest.approx(found["transformed"].scores["f1"])
    for example in DATA.examples:
        given = found["graph"].details[example.id]
        assert given.text in example.context
        assert given.text == given.text.strip()
    assert any(given.text for given in found["graph"].details.values())
    assert all(found["graph"].details[each.id].text == "" for each in DATA.examples if not each.context.strip())


def test_batches_do_not_change_answers(family_checkpoint):
    model, tokenizer = family_checkpoint
    one = evaluate(model, tokenizer, DATA, RULE, WINDOWING, batch_size=1)
    many = evaluate(model, tokenizer, DATA, RULE, WINDOWING, batching=Batching(tokens=2000))
    assert one.answers == many.answers
    assert {each.id: one.details[each.id].score for each in DATA.examples} == pytest.approx(
        {each.id: many.details[each.id].score for each in DATA.examples}, abs=1e-4
    )


def test_a_tokenizer_that_pads_in_front_has_the_passage_first(tmp_path):
    model, tokenizer = load(left_padded(tmp_path))
    cut = windows(tokenizer, [Example("a", "Who won?", PASSAGE * 4, ())], WINDOWING)
    assert all(window.first == 1 for window in cut)
    assert all(window.last < len(window) - 4 for window in cut)
    places = [tuple(place) for window in cut for place in window.offsets]
    assert {i for one, other in places for i in range(one, other)} >= set(range(len("The first king"))) - {3, 9}
    one = evaluate(model, tokenizer, DATA, RULE, WINDOWING, batch_size=1)
    assert any(one.answers.values())
    many = evaluate(model, tokenizer, DATA, RULE, WINDOWING, batch_size=7)
    assert one.answers.keys() == many.answers.keys()


def test_taken_up_where_it_was_cut_off(bert_checkpoint, monkeypatch):
    model, tokenizer = bert_checkpoint
    monkeypatch.setattr(evaluations, "CHUNK", 4)
    whole, part = Kept(), Kept(limit=5)
    once = answers_of({"model": model}, tokenizer, results={"model": whole})["model"]
    assert len(whole) > 10
    with pytest.raises(Interruption):
        answers_of({"model": model}, tokenizer, results={"model": part})
    part.limit = None
    Counting.read_windows = 0
    readers = {"model": Counting(model, tokenizer, RULE)}
    again = evaluate_together(readers, DATA, BATCHING, WINDOWING, {"model": part}, session=1)["model"]
    assert again.details == once.details
    assert again.scores == once.scores
    rest = sum(len(result.spans) for number, result in part.items() if number >= 5)
    assert Counting.read_windows == rest + len(part[5].spans)  # the first batch is read once more, to warm up
    assert [session for session, _ in again.times] == [0] * 5 + [1] * (len(whole) - 5)


def test_nothing_is_computed_that_is_known(bert_checkpoint):
    model, tokenizer = bert_checkpoint
    kept = Kept()
    once = answers_of({"model": model}, tokenizer, results={"model": kept})["model"]
    Counting.read_windows = 0
    readers = {"model": Counting(model, tokenizer, RULE)}
    again = evaluate_together(readers, DATA, BATCHING, WINDOWING, {"model": kept}, session=1)["model"]
    assert Counting.read_windows == 0
    assert (again.details, again.scores, again.times) == (once.details, once.scores, once.times)


def test_times_of_different_sessions_are_not_compared(bert_checkpoint):
    model, tokenizer = bert_checkpoint
    kept = Kept()
    answers_of({"Base": model}, tokenizer, results={"Base": kept})
    results = {"Base": kept, "other": Kept()}
    found = answers_of({"Base": model, "other": model}, tokenizer, results=results, session=1)
    assert found["other"].speedup(found["Base"]) is None
    assert found["other"].details == found["Base"].details
    del kept[0], kept[1]
    found = answers_of({"Base": model, "third": model}, tokenizer, results={"Base": kept, "third": Kept()}, session=2)
    assert found["third"].speedup(found["Base"]).verdict == "cannot tell"  # two pairs are too few


def test_work_is_accounted_for(bert_checkpoint):
    model, tokenizer = bert_checkpoint
    done = []
    found = answers_of({"model": model}, tokenizer, on_questions=lambda name, count: done.append(count))["model"]
    cut = windows(tokenizer, list(DATA.examples), WINDOWING)
    assert found.work.tokens == sum(map(len, cut))
    assert 0 < found.work.padding_share < 1
    assert sum(done) == pytest.approx(len(DATA))
    assert found.work.model + found.work.extract == pytest.approx(sum(found.seconds) / found.work.streams)
    assert min(found.work.tokenise, found.work.model, found.work.extract, found.work.score) > 0
    assert found.tokens_per_second == pytest.approx(found.work.tokens * found.work.streams / sum(found.seconds))


def test_streams_change_no_answer_and_leave_the_threads_as_they_were(bert_checkpoint):
    model, tokenizer = bert_checkpoint
    threads = torch.get_num_threads()
    found = {streams: answers_of({"a": model, "b": model}, tokenizer, streams=streams) for streams in (1, 2, 5)}
    assert found[1]["a"].answers == found[2]["a"].answers == found[2]["b"].answers == found[5]["b"].answers
    assert {streams: each["a"].work.streams for streams, each in found.items()} == {1: 1, 2: 2, 5: 5}
    assert torch.get_num_threads() == threads
    with pytest.raises(UsageError, match="at least 1"):
        answers_of({"a": model}, tokenizer, streams=0)


def test_a_stream_that_fails_stops_the_others(bert_checkpoint, monkeypatch):
    model, tokenizer = bert_checkpoint
    threads, reads = torch.get_num_threads(), []

    def read(self, group, session=0):
        reads.append(group)
        if len(reads) == 5:
            raise Interruption
        time.sleep(0.01)
        return BatchResult((), 1.0, 1.0)

    monkeypatch.setattr(Reader, "read", read)
    with pytest.raises(Interruption):
        answers_of({"a": model, "b": model, "c": model}, tokenizer, streams=2)
    assert len(reads) < 15
    assert torch.get_num_threads() == threads


def test_the_batch_size_is_measured_where_there_is_enough_to_measure(bert_checkpoint, monkeypatch):
    model, tokenizer = bert_checkpoint
    reader = Reader(model, tokenizer, RULE)
    cut = windows(tokenizer, [Example("a", "Who?", PASSAGE, ())] * 40, WINDOWING)
    assert cheapest_batching(reader, cut) == Batching(tokens=TOKENS)

    def a_batch_costs(seconds):
        def read(self, group, session=0):
            return BatchResult((), seconds(sum(map(len, group))), 0.0)

        monkeypatch.setattr(Reader, "read", read)
        return cheapest_batching(reader, cut * 100)

    assert a_batch_costs(lambda tokens: tokens) == Batching(tokens=512)
    assert a_batch_costs(lambda tokens: 100 + tokens if tokens <= 1024 else 2 * tokens) == Batching(tokens=1024)
    assert a_batch_costs(lambda tokens: 1.0).tokens > 2048  # a device that never fills up


def test_questions_are_tokenised_once_for_all(bert_checkpoint, monkeypatch):
    model, tokenizer = bert_checkpoint
    asked = []
    monkeypatch.setattr(evaluations, "CHUNK", 10)
    monkeypatch.setattr(evaluations, "windows", lambda *args: asked.append(len(args[1])) or windows(*args))
    answers_of({"one": model, "two": model, "three": model}, tokenizer)
    assert asked == [10, 10, 5]


PEAK = """
import resource, sys
from bert_evaluation import evaluate, load
from bert_evaluation.squad import read_squad
from bert_evaluation.squad.batches import Batching
model, tokenizer = load(sys.argv[1])
evaluate(model, tokenizer, read_squad(sys.argv[2]), batching=Batching(tokens=2048))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_times_the_questions_take_the_same_memory(tmp_path):
    folder, peaks = checkpoint("bert", tmp_path / "model"), []
    for times in (1, 10):
        passages = [
            {"context": PASSAGE, "qas": [{"id": f"{i}-{j}", "question": "Who won?", "answers": []} for j in range(5)]}
            for i in range(500 * times)
        ]
        file = tmp_path / f"{times}.json"
        file.write_text(json.dumps({"data": [{"paragraphs": passages}]}))
        command = [sys.executable, "-c", PEAK, str(folder), str(file)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.10 * peaks[0], peaks


def test_inference_mode_is_used(bert_checkpoint):
    model, tokenizer = bert_checkpoint
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    answers_of({"model": model}, tokenizer)
    handle.remove()
    assert all(seen)
