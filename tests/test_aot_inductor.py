import ctypes
import os
import tempfile

import pytest
import torch

from bert_evaluation import aot_inductor, capture, kernels
from bert_evaluation.aot_inductor import library, why_not_built


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own, where nothing was compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bert-evaluation"


pytestmark = [
    pytest.mark.skipif(not aot_inductor.is_there(), reason="this torch has a loader of libraries that is not used"),
    pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built())),
]


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


class OurOperators(torch.nn.Module):
    """Each of them, with all that may be given and with nothing that need not be."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", kernels.pack(torch.randn(8, 8)))
        for name in ("bias", "norm_weight", "norm_bias"):
            self.register_buffer(name, torch.randn(8))

    def forward(self, x, mask):
        normed = (self.norm_weight, self.norm_bias, 1e-5)
        y = kernels.LINEAR(x, self.weight, None, self.bias, 8, "gelu", x, *normed)
        z = kernels.LINEAR(y, self.weight, None, None, 8)
        links = [self.weight, None, self.bias, *normed[:2], self.weight, None, None, None, None]
        z = kernels.LINEARS(z, links, [8, 8], "gelu none", x, [0, 1], [1e-5, 0.0])
        z = kernels.LINEARS(z, links[5:], [8], "relu", None, [-1], [0.0])
        seen = mask.bool()[:, None, None, :]
        attended = (kernels.ATTENTION(x, y, z, seen, 2, 0.5), kernels.ATTENTION(x, y, z, None, 2, 0.5))
        return *attended, kernels.PACKED_ATTENTION(x[:1], y[:1], z[:1], mask[:1], 2, 0.5)


def test_our_operators_are_called_as_c_functions(tmp_path, monkeypatch):
    there = ctypes.CDLL(None)
    names = [operator._schema.name.rpartition("::")[2] for operator in kernels.TWINS]
    assert all(hasattr(there, f"aoti_torch_cpu_{name}") for name in names)
    assert len(names) == 4
    model = OurOperators()
    dynamic = {"x": [0, 1], "mask": [0, 1]}
    shapes = {name: dict.fromkeys(each, torch.export.Dim.DYNAMIC) for name, each in dynamic.items()}
    examples = {"x": torch.randn(3, 6, 8), "mask": torch.ones(3, 6, dtype=torch.long)}
    graph = capture(model, examples, shapes)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    call = library(graph, examples, dynamic, {})
    (code,) = (file.read_text() for file in (tmp_path / "inductor").rglob("*.wrapper.cpp"))
    assert "proxy_executor_call" not in code
    for batch, length in ((1, 1), (2, 5), (4, 40)):
        inputs = {"x": torch.randn(batch, length, 8), "mask": torch.ones(batch, length, dtype=torch.long)}
        inputs["mask"][1:, length // 2 :] = 0
        for found, expected in zip(call(inputs), graph(**inputs), strict=True):
            assert torch.equal(found, expected)
    inputs["mask"][0, 0] = 0
    if kernels.why_not(torch.int8, torch.device("cpu")) is None:  # plain PyTorch has other words for it
        with pytest.raises(RuntimeError, match="There are as many tokens as the mask has ones"):
            call(inputs)


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


def test_the_same_graph_is_compiled_once(cache, monkeypatch):
    def graph_of(model):
        return capture(model, {"x": torch.ones(2, 4)})

    def compiled(graph, rows=3, columns=4, dynamic=(0,)):
        x = torch.ones(rows, columns)
        assert torch.allclose(library(graph, {"x": x}, {"x": list(dynamic)}, {})({"x": x})[0], graph(x=x)[0], atol=1e-6)

    monkeypatch.setattr(aot_inductor, "MOST", 2)
    model = Scaled()
    compiled(graph_of(model))
    (package,) = cache.glob("*.pt2")
    real, asked = aot_inductor.aoti_compile_and_package, []

    def counted(*args, **kwargs):
        asked.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(aot_inductor, "aoti_compile_and_package", counted)
    compiled(graph_of(model))
    assert not asked
    # The same numbers, lying otherwise; other numbers; other inputs.
    with torch.no_grad():
        model.linear.weight = torch.nn.Parameter(model.linear.weight.t().contiguous().t())
    compiled(graph_of(model))
    assert len(asked) == 1
    with torch.no_grad():
        model.scale.mul_(2)
    compiled(graph_of(model))
    compiled(graph_of(model), rows=5)
    assert len(asked) == 3
    assert len(list(cache.glob("*.pt2"))) == 2  # those that were used last
    assert not package.exists()
