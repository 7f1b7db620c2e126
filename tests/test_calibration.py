"""What there is to calibrate with, what nodes return for it, and that who scores the same questions is told."""

import subprocess
import sys

import pytest
import torch
from families import tiny
from family_tokenizers import checkpoint, left_padded
from torch import nn

from bert_evaluation import capture, hashes, load
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import (
    QUESTIONS,
    Calibration,
    activations,
    at_tokens,
    calibrate,
    calibration_of,
    from_questions,
)
from bert_evaluation.capturing import read, save, text_inputs
from bert_evaluation.errors import CalibrationError
from bert_evaluation.experiment import run
from bert_evaluation.outcome import Experiment
from bert_evaluation.squad import Example
from bert_evaluation.squad.dataset import Dataset
from bert_evaluation.store import Store
from bert_evaluation.transformations import MergeLinears, PruneHeads, RemovePadding

TEXT = Dataset(
    "two", (Example("a", "Who won?", "The king won.", ()), Example("b", "When was it built?", "In the first year.", ()))
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a tiny checkpoint."""
    return checkpoint("bert", tmp_path_factory.mktemp("small"))


def test_a_captured_checkpoint_has_built_in_questions(base):
    found = calibration_of(base)
    assert len(found.questions) == QUESTIONS
    assert all(tuple(batch) == graphs.input_names(base) for batch in found.batches)
    assert found is calibration_of(MergeLinears()(graphs.fork(base)))  # tokenised once


def test_a_folder_of_ones_own_is_tokenised_with_its_own_tokenizer(small):
    model, tokenizer = load(small)
    found = calibration_of(capture(model))
    assert max(int(batch["input_ids"].max()) for batch in found.batches) < len(tokenizer)
    assert {int(batch["input_ids"][0, 0]) for batch in found.batches} == {tokenizer.cls_token_id}


def test_a_tokenizer_that_pads_in_front(tmp_path):
    _, tokenizer = load(left_padded(tmp_path))
    (batch,) = from_questions(tokenizer, TEXT, ["input_ids", "attention_mask"]).batches
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][:, 0].all()


def test_what_is_given_goes_first(base):
    own = Calibration(({"input_ids": torch.ones(1, 2, dtype=torch.int64)},))
    graph = calibrate(graphs.fork(base), own)
    assert calibration_of(graph) is own
    assert calibration_of(graphs.fork(graph)) is own
    assert calibration_of(base) is not own


def test_a_model_that_no_checkpoint_is_of_has_none(bert_graph, base, tmp_path):
    with pytest.raises(CalibrationError, match="give it inputs with calibrate"):
        calibration_of(bert_graph)
    save(base, tmp_path / "graph.pt2")
    with pytest.raises(CalibrationError, match="no checkpoint"):
        calibration_of(read(tmp_path / "graph.pt2"))
    prune = PruneHeads(budget=0.5)
    before = hashes.graph_hash(bert_graph)
    graph = prune(graphs.fork(bert_graph))
    assert hashes.graph_hash(graph) == before
    assert prune.report.found == 8
    assert {refusal.reason for refusal in prune.report.refused} == {
        "There is no text to calibrate with: the graph is of no checkpoint; give it inputs with calibrate."
    }


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    graph = capture(type(model).from_pretrained(tmp_path))
    with pytest.raises(CalibrationError, match=r"nothing|There is no text to calibrate with: .*tokenizer"):
        calibration_of(graph)


def test_what_nodes_return_is_what_the_model_computes(bert, bert_graph):
    seen = []
    hook = bert.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *each: seen.append(each[2]))
    node = next(
        node
        for node in graphs.calls(bert_graph, torch.ops.aten.linear.default)
        if graphs.layer(node) == "bert.encoder.layer.1.output.dense"
    )
    batches = [text_inputs(bert, 2, 5), text_inputs(bert, 3, 9)]
    with torch.no_grad():
        for batch in batches:
            bert(**batch)
    hook.remove()
    found = list(activations(bert_graph, [node], batches))
    assert [list(values) for _, values in found] == [[node], [node]]
    assert all(torch.equal(values[node], expected) for (_, values), expected in zip(found, seen, strict=True))
    assert not found[0][1][node].requires_grad


def test_what_is_written_into_later_is_kept_as_it_was():
    class Writes(nn.Module):
        def forward(self, x):
            return (x * 2).add_(1)

    graph = capture(Writes(), {"x": torch.ones(2, 3)})
    node = next(graphs.calls(graph, torch.ops.aten.mul.Tensor))
    ((_, values),) = activations(graph, [node], [{"x": torch.ones(2, 3)}])
    assert torch.equal(values[node], torch.full((2, 3), 2.0))


def test_an_input_that_is_missing_is_named(bert, bert_graph):
    inputs = text_inputs(bert, 1, 4)
    del inputs["attention_mask"]
    with pytest.raises(CalibrationError, match="lacks the input attention_mask"):
        list(activations(bert_graph, [], [inputs]))


def test_padding_is_left_out():
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(at_tokens(x, {"attention_mask": mask}), x[mask.bool()])
    assert at_tokens(x, {}).shape == (6, 2)
    assert at_tokens(x[:1], {"attention_mask": mask}).shape == (3, 2)  # packed
    assert at_tokens(x[:, 0], {"attention_mask": mask}).shape == (2, 2)  # of the first token only


def test_pruned_after_padding_was_removed(bert, bert_graph):
    inputs = text_inputs(bert, 2, 6)
    inputs["attention_mask"][0, 3:] = 0
    graph = RemovePadding()(calibrate(graphs.fork(bert_graph), Calibration((inputs,))))
    prune = PruneHeads(budget=0.5)
    prune(graph)
    assert not prune.report.applied  # attention is another operator there


@pytest.mark.parametrize(("dataset", "told"), [("built-in", True), ("other", False)])
def test_who_scores_what_was_calibrated_on_is_told(small, tmp_path, dataset, told):
    if dataset == "other":
        dataset = str(tmp_path / "other.json")
        answers = '"answers": [{"text": "king", "answer_start": 4}]'
        question = f'{{"id": "1", "question": "Who?", {answers}}}'
        text = f'{{"data": [{{"paragraphs": [{{"context": "The king won.", "qas": [{question}]}}]}}]}}'
        (tmp_path / "other.json").write_text(text)
    experiment = Experiment(
        evaluate=True,
        transform=True,
        model=str(small),
        device="cpu",
        dataset=dataset,
        samples=20 if told else 1,
        recipes=("PruneHeads(budget=0.5)", "MergeLinears"),
    )
    with Store(":memory:") as store:
        base, pruned, merged = run(experiment, store).rows
    assert base.alarm is None
    assert merged.alarm is None
    if told:
        assert "PruneHeads was calibrated on" in pruned.alarm
        assert "of these 20 questions: on others quality may be lower" in pruned.alarm
    else:
        assert pruned.alarm is None


def test_the_same_in_every_process(small):
    program = (
        "import sys; from bert_evaluation import capture, compose, graph, hashes, load\n"
        "from bert_evaluation.transformations import PruneFeedForward, PruneHeads\n"
        "made = compose(PruneHeads(budget=0.5), PruneFeedForward(budget=0.5))(capture(load(sys.argv[1])[0]))\n"
        "print(hashes.graph_hash(made), hashes.constants_hash(made), len(graph.read_names(made)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(small)]
    one, other = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == other
