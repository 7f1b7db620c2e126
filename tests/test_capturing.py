import subprocess
import sys

import pytest
import torch
from torch import nn

from bert_evaluation import capture, compose, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import example_inputs, read, save, text_inputs
from bert_evaluation.errors import CaptureError
from bert_evaluation.transformations import MergeLinears, RemoveDropout


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (3, 31), (2, 500)])
def test_equals_the_model_at_other_shapes(family, batch, length):
    model, graph = family
    inputs = text_inputs(model, batch, length)
    expected, got = model(**inputs), graph(**inputs)
    assert type(got) is type(expected)
    assert torch.equal(got.start_logits, expected.start_logits)
    assert torch.equal(got.end_logits, expected.end_logits)


def test_shares_the_parameters_under_their_names(family):
    model, graph = family
    own = dict(model.named_parameters(remove_duplicate=False))
    captured = dict(graph.named_parameters(remove_duplicate=False))
    assert captured
    assert all(own[name] is parameter for name, parameter in captured.items())


def test_same_after_save_and_read(family, tmp_path):
    model, graph = family
    save(graph, tmp_path / "graph.pt2")
    again = read(tmp_path / "graph.pt2")
    for batch, length in ((1, 1), (5, 40)):
        inputs = text_inputs(model, batch, length)
        assert torch.equal(again(**inputs).start_logits, model(**inputs).start_logits)
    assert type(again(**inputs)) is type(model(**inputs))


def test_a_transformed_graph_is_saved_too(bert, bert_graph, tmp_path):
    graph = compose(RemoveDropout(), MergeLinears(), inplace=False)(bert_graph)
    save(graph, tmp_path / "graph.pt2")
    inputs = text_inputs(bert, 2, 11)
    assert torch.equal(read(tmp_path / "graph.pt2")(**inputs).end_logits, graph(**inputs).end_logits)


def test_leaves_the_training_mode_as_it_was():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    module[0].eval()
    graph = capture(nn.ModuleDict({"m": module})["m"], {"input": torch.randn(1, 3)})
    assert module.training
    assert module[1].training
    assert not module[0].training
    assert not graph.training
    x = torch.randn(5, 3)
    assert torch.equal(graph(input=x), module[0](x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Linear(4, 2)

    def forward(self, x, y):
        return {"sum": self.table(x) + y.float().sum(), "pair": (x, y)}


def test_any_module_with_example_inputs():
    module = Two()
    graph = capture(module, example_inputs={"x": torch.randn(1, 4), "y": torch.ones(3, dtype=torch.int64)})
    for rows in (1, 2, 9):
        x, y = torch.randn(rows, 4), torch.arange(rows + 2)
        got, expected = graph(x=x, y=y), module(x=x, y=y)
        assert torch.equal(got["sum"], expected["sum"])
        assert torch.equal(got["pair"][1], y)
    assert graphs.input_names(graph) == ("x", "y")
    assert set(example_inputs(graph)) == {"x", "y"}


def test_says_what_cannot_be_captured():
    with pytest.raises(CaptureError, match="example_inputs"):
        capture(nn.Linear(2, 2))

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, 2) if x.shape[0] == 4 else x

    with pytest.raises(CaptureError, match="Fixed cannot be exported"):
        capture(Fixed(), {"x": torch.randn(4, 2)})


def test_says_what_cannot_be_read(tmp_path):
    with pytest.raises(CaptureError, match="no file"):
        read(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(CaptureError, match="not an archive"):
        read(tmp_path / "text.pt2")


def test_graphs_without_parameters_of_their_own_cost_no_memory(bert, bert_graph):
    twin = graphs.fork(bert_graph)
    assert all(a is b for a, b in zip(twin.parameters(), bert_graph.parameters(), strict=True))
    assert hashes.graph_hash(twin) == hashes.graph_hash(bert_graph) == hashes.graph_hash(capture(bert))


def test_a_graph_is_read_in_a_process_that_has_seen_no_model(bert_graph, tmp_path):
    save(bert_graph, tmp_path / "graph.pt2")
    program = (
        f"from bert_evaluation.capturing import read; print(len(read({str(tmp_path / 'graph.pt2')!r}).graph.nodes))"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) > 10
