import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bert_evaluation import measure
from bert_evaluation.device import choose_device, is_idle, is_on, machine
from bert_evaluation.errors import BertEvaluationError, UsageError
from bert_evaluation.measurement import LEAST, Measurement, Plan, sample


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
    rounds = [tuple(names[i : i + 4]) for i in range(9, len(names), 4)]
    assert names[:9] == list("abcaabbcc")
    assert len(rounds) == len(told) == 20
    assert all(sorted(each) == list("aabc") for each in rounds)
    assert len(set(rounds)) > 3
    assert all(not collecting and inference for _, collecting, inference in calls)
    assert gc.isenabled()
    assert {name: len(samples) for name, samples in found.seconds.items()} == dict.fromkeys("abc", 20)
    assert found.base == "a"
    assert list(found.ratios) == ["b", "c"]
    assert found.latency("b").estimate > 0
    assert len(found.again) == 20
    assert found.first_calls.keys() == {"a", "b", "c"}


def test_nothing_to_time():
    with pytest.raises(UsageError, match="nothing to time"):
        measure({}, {"x": torch.ones(1)})
    with pytest.raises(UsageError, match="nothing to time"):
        measure({"a": nn.Identity()}, {"input": torch.ones(1)}, rounds=0)
    with pytest.raises(UsageError, match="above 0"):
        measure({"a": nn.Identity()}, {"input": torch.ones(1)}, precision=0)


class Machine:
    """A clock and calls that take what they are said to, each round as fast as the machine is at that moment."""

    def __init__(self, times, noise=0.005, first=None, wander=0.02, seed=0):
        self.times, self.noise, self.first, self.wander = times, noise, first or {}, wander
        self.rng, self.now, self.pace = np.random.default_rng(seed), 0.0, 1.0

    def call(self, name):
        self.pace *= np.exp(self.rng.normal(0, self.wander / 10))
        seconds = self.times[name] * self.pace * np.exp(self.rng.normal(0, self.noise)) + self.first.pop(name, 0.0)
        self.now += seconds
        return seconds

    def measure(self, seed=0, **plan):
        return sample(self.call, list(self.times), Plan(**plan), seed, clock=lambda: self.now)


def test_rounds_are_added_until_the_interval_is_narrow():
    quiet = Machine({"a": 0.01, "b": 0.01}).measure()
    noisy = Machine({"a": 0.01, "b": 0.01}, noise=0.05).measure()
    assert LEAST <= len(quiet.again) < len(noisy.again)
    for found in (quiet, noisy):
        ratio = found.speedup("b")
        assert (ratio.high - ratio.low) / 2 <= 0.01
    assert len(Machine({"a": 0.01, "b": 0.01}).measure(precision=0.001).again) > len(quiet.again)


def test_the_time_limit_ends_it():
    machine = Machine({"a": 1.0, "b": 1.0}, noise=0.5)
    found = machine.measure(time_limit=100)
    in_rounds = sum(map(sum, found.seconds.values())) + sum(found.again)  # what came before was to warm up
    assert 100 <= in_rounds < 105


def test_what_is_the_same_is_seldom_called_different():
    different = sum(
        Machine({"a": 0.01, "b": 0.01}, seed=seed).measure(seed).speedup("b").verdict != "cannot tell"
        for seed in range(200)
    )
    assert different <= 0.05 * 200


def test_two_percent_are_found():
    found = sum(
        Machine({"a": 0.0102, "b": 0.01}, seed=seed).measure(seed).speedup("b").verdict == "faster"
        for seed in range(200)
    )
    assert found >= 0.80 * 200


def test_a_machine_that_differs_from_itself_gives_no_verdict():
    seconds = {"a": (1.0,) * 20, "b": (0.98,) * 20}
    assert Measurement(seconds, (1.0,) * 20).speedup("b").verdict == "faster"
    biased = Measurement(seconds, (0.97,) * 20)
    assert biased.speedup("b").verdict == "cannot tell"
    assert "Base differs from itself here by 3.1%: the machine is not quiet." in biased.remarks


def test_drift_and_outliers_are_told():
    rng = np.random.default_rng(0)
    steady = tuple(rng.normal(1, 0.01, 30))
    assert Measurement({"a": steady}).remarks == []
    warm = tuple(value * (1 + 0.005 * i) for i, value in enumerate(steady))
    assert any("drifted by +" in remark for remark in Measurement({"a": warm}).remarks)
    assert "2 of Base's 30 samples lie far from the others." in Measurement({"a": (*steady[:28], 3.0, 2.0)}).remarks


def test_the_first_call_is_reported_apart_with_when_it_pays():
    found = Machine({"a": 0.02, "b": 0.01}, noise=1e-4, first={"b": 1.0}, wander=0).measure()
    assert found.first_calls["b"] == pytest.approx(1.01, rel=0.01)
    assert max(found.seconds["b"]) < 0.02
    assert found.pays_after("b") == pytest.approx(100, rel=0.02)
    assert Machine({"a": 0.01, "b": 0.02}, first={"b": 1.0}).measure().pays_after("b") is None
    assert Machine({"a": 0.01, "b": 0.01}, first={"a": 1.0}).measure().pays_after("b") == 0


def test_warm_up_lasts_until_the_median_settles():
    times = iter([*(0.1 / 2**i for i in range(8)), *[0.0005] * 1000])
    found = sample(lambda name: next(times), ["a"], Plan(rounds=10))
    assert max(found.seconds["a"]) == 0.0005


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


def test_where_outputs_are_by_the_number_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    one, other, cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu"))
    assert is_on(one, torch.device("cuda:0"))
    assert not is_on(other, torch.device("cuda:0"))
    assert is_on(other, torch.device("cuda"))  # the current one
    assert not is_on(one, torch.device("cuda"))
    assert is_on(cpu, torch.device("cpu"))
    assert not is_on(cpu, torch.device("cuda"))
    assert not is_on(one, torch.device("cpu"))
    assert is_on(SimpleNamespace(device=torch.device("mps:0")), torch.device("mps"))


@pytest.mark.parametrize("at_work", ["current_stream", "default_stream"])
def test_a_device_is_idle_when_both_streams_are_that_have_a_name(monkeypatch, at_work):
    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(
            torch.cuda, stream, lambda _, stream=stream: SimpleNamespace(query=lambda: stream != at_work)
        )
    assert not is_idle(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, at_work, lambda _: SimpleNamespace(query=lambda: True))
    assert is_idle(torch.device("cuda"))


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_present(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == best
