"""Memory is counted tensor by tensor."""

import torch
from families import tiny
from torch import nn

from bert_evaluation import capture
from bert_evaluation.capturing import text_inputs
from bert_evaluation.memory import memory
from bert_evaluation.transformations import MergeLinears


class TwoSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(4, 100, bias=False)
        self.narrow = nn.Linear(100, 4, bias=False)

    def forward(self, x):
        return torch.relu(self.narrow(self.wide(x)))


def test_weights_and_what_is_alive_at_once():
    graph = capture(TwoSteps(), example_inputs={"x": torch.randn(3, 4)})
    found = memory(graph, {"x": torch.randn(10, 4)})
    assert found.weights == 4 * 800
    # At its fullest: the wide result (10 × 100) beside the input or the narrow one (10 × 4).
    assert found.peak == found.weights + 4 * 10 * (4 + 100)


def test_views_and_shared_weights_count_once():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.linear(self.linear(x).view(-1, 2, 4).transpose(0, 1).reshape(-1, 8))

    graph = capture(Views(), example_inputs={"x": torch.randn(3, 8)})
    assert memory(graph, {"x": torch.randn(2, 8)}).weights == 4 * 64


def test_merging_moves_weights_and_doubles_none():
    model = tiny("bert")
    base = capture(model)
    before = memory(base, text_inputs(model, 2, 16))
    after = memory(MergeLinears()(base), text_inputs(model, 2, 16))
    assert after.weights == before.weights
    assert memory(base, text_inputs(model, 4, 16)).peak > after.peak > after.weights
