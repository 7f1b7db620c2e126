import os
import tempfile

import pytest
import torch

from bert_evaluation import capture
from bert_evaluation.aot_inductor import library, why_not_built

pytestmark = pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 16)
        self.register_buffer("scale", torch.full((16,), 2.0), persistent=False)

    def forward(self, x):
        return self.linear(x) * self.scale, x + 1


def test_it_reads_the_tensors_that_the_graph_has():
    model = Scaled()
    graph = capture(model, {"x": torch.ones(2, 4)})
    call = library(graph, {"x": torch.ones(3, 4)}, {"x": [0]}, {})
    with torch.no_grad():
        for rows in (1, 5):
            x = torch.randn(rows, 4)
            for change in (lambda: None, lambda: model.linear.weight.add_(1), lambda: model.scale.mul_(3)):
                change()
                for found, expected in zip(call({"x": x}), graph(x=x), strict=True):
                    assert torch.allclose(found, expected, atol=1e-6)


def test_a_size_that_would_be_fixed_is_an_error():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x + torch.ones(3, 1)

    graph = capture(Fixed(), {"x": torch.ones(3, 4)}, {"x": {}})
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        library(graph, {"x": torch.ones(3, 4)}, {"x": [0]}, {})


def test_nothing_is_left_in_the_folder_for_temporary_files():
    before = set(os.listdir(tempfile.gettempdir()))
    call = library(capture(Scaled(), {"x": torch.ones(2, 4)}), {"x": torch.ones(3, 4)}, {"x": [0]}, {})

    def made():
        return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("aotinductor")} - before

    assert made()  # where it is loaded from
    del call
    assert not made()
