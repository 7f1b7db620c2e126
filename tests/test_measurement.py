import gc

import pytest
import torch
from torch import nn

from bert_evaluation import measure
from bert_evaluation.device import choose_device, machine
from bert_evaluation.errors import BertEvaluationError, UsageError


class Counted(nn.Module):
    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, gc.isenabled(), torch.is_inference_mode_enabled()))
        return x


def test_variants_take_turns_in_random_order_after_warm_up():
    calls, told = [], []
    variants = {name: Counted(name, calls) for name in "abc"}
    found = measure(variants, {"x": torch.ones(1)}, rounds=20, warm_up=2, on_round=lambda: told.append(1))
    names = [name for name, _, _ in calls]
    rounds = [tuple(names[i : i + 3]) for i in range(6, len(names), 3)]
    assert names[:6] == list("aabbcc")
    assert len(rounds) == len(told) == 20
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 3
    assert all(not collecting and inference for _, collecting, inference in calls)
    assert gc.isenabled()
    assert {name: len(samples) for name, samples in found.seconds.items()} == dict.fromkeys("abc", 20)
    assert found.base == "a"
    assert list(found.ratios) == ["b", "c"]
    assert found.latency("b").estimate > 0


def test_nothing_to_time():
    with pytest.raises(UsageError, match="nothing to time"):
        measure({}, {"x": torch.ones(1)})
    with pytest.raises(UsageError, match="nothing to time"):
        measure({"a": nn.Identity()}, {"input": torch.ones(1)}, rounds=0)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cuda", "mps", "cpu")
    with pytest.raises(UsageError, match="did you mean cuda"):
        choose_device("cda")
    with pytest.raises(UsageError, match="no kind of device"):
        choose_device("cuda:x")
    with pytest.raises(BertEvaluationError, match="no device cuda:99"):
        choose_device("cuda:99")
    assert {"processor", "threads", "torch", "device"} <= machine(torch.device("cpu")).keys()


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_present(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == best
