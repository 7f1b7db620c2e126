"""On a GPU: what other tests hold on a CPU, and what only a GPU has.

Alone and fast: `pytest tests/test_cuda.py --numprocesses 12 --dist loadgroup`.
"""

import json

import pytest
import torch
from families import FAMILIES, tiny
from family_tokenizers import checkpoint
from promises import applied_and_kept, undone
from test_cli import run
from torch import nn

from bert_evaluation import capture, compose, evaluate, load, load_dataset, products
from bert_evaluation.device import is_idle, machine, synchronize
from bert_evaluation.errors import BertEvaluationError
from bert_evaluation.measurement import timed
from bert_evaluation.squad.batches import Batching
from bert_evaluation.squad.dataset import sample
from bert_evaluation.transformation import ReversibleTransformation
from bert_evaluation.transformations import (
    PRESETS_ON_CUDA,
    REGISTRY,
    Compile,
    PruneFeedForward,
    PruneHeads,
    recipes,
)
from bert_evaluation.verification import check, observe

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
COMPILED = ("bert",)  # it takes long
NEAR_TIE = 1e-3  # logits


def grouped(names):
    """Each with the tests of one group, which share what is costly to make, in one process."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.fixture(scope="module", params=grouped(FAMILIES))
def subject(request):
    """A tiny model of each family on the device, its graph, and what it returns."""
    model = tiny(request.param).to(DEVICE)
    return request.param, capture(model), observe(model)


def test_capture(subject):
    _, base, reference = subject
    assert check(reference, base).kept
    assert {tensor.device.type for outputs in reference.outputs for tensor in outputs} == {DEVICE.type}


@pytest.mark.parametrize("kind", REGISTRY)
def test_each_transformation_is_kept_and_undone(subject, kind):
    family, base, reference = subject
    if kind is Compile and family not in COMPILED:
        pytest.skip(f"Compile takes long, and is tried with {' and '.join(COMPILED)}")
    transformation = kind()
    graph = applied_and_kept(transformation, base, reference)
    if kind is Compile and not transformation.report.applied:
        pytest.skip(transformation.report.refused[0].reason)
    if isinstance(transformation, ReversibleTransformation):
        undone(transformation, graph, base)


@pytest.mark.parametrize("preset", {steps: name for name, steps in PRESETS_ON_CUDA.items()}.values())
def test_each_preset_is_kept_and_undone(subject, preset):
    family, base, reference = subject
    (named,) = recipes([preset], DEVICE)
    recipe = compose(*(step for step in named.steps if family in COMPILED or not isinstance(step, Compile)))
    graph = applied_and_kept(recipe, base, reference)
    assert recipe.report.applied
    undone(recipe, graph, base)


@pytest.mark.parametrize("kind", [PruneHeads, PruneFeedForward])
def test_what_calibrates_is_kept_and_undone(tmp_path, kind):
    model, _ = load(checkpoint("bert", tmp_path), DEVICE)
    base, pruning = capture(model), compose(kind(budget=0.5))
    graph = applied_and_kept(pruning, base, observe(model))
    assert pruning.report.applied
    undone(pruning, graph, base)


def test_the_built_in_checkpoint_answers_as_on_a_cpu():
    questions = sample(load_dataset(), 96, 42)
    of_cpu, found = (
        evaluate(*load(device=device), questions, batching=Batching(tokens=2048))
        for device in (torch.device("cpu"), DEVICE)
    )
    others = [each for each, answer in found.answers.items() if answer != of_cpu.answers[each]]
    assert all(of_cpu.details[each].margin < NEAR_TIE for each in others), others
    assert found.f1 == pytest.approx(of_cpu.f1, abs=0.2)
    assert found.f1 > 40


class Long(nn.Module):
    """Products that take much longer than it takes to ask for them, between two events."""

    def __init__(self, stream=None):
        super().__init__()
        self.stream = stream
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def forward(self, x):
        with torch.cuda.stream(self.stream):
            self.begin.record()
            for _ in range(10):
                y = x @ x
            self.end.record()
        return y

    @property
    def seconds(self):
        return self.begin.elapsed_time(self.end) / 1000


@pytest.fixture(scope="module")
def large():
    return torch.rand(4096, 4096, device=DEVICE)


@pytest.mark.parametrize("apart", [False, True])
def test_the_clock_is_read_after_the_device_is_done(large, apart):
    """Also with what another stream than the current one has to do."""
    model = Long(torch.cuda.Stream() if apart else None)
    timed(lambda: model(large), DEVICE)  # the first call sets the library up
    seconds, result = timed(lambda: model(large), large.device)
    assert seconds >= model.seconds > 0
    assert result.shape == large.shape


def test_a_device_at_work_is_not_idle(large):
    model, other = Long(), torch.cuda.Stream()
    for _ in range(2):  # the first call sets the library up
        synchronize(DEVICE)
        assert is_idle(DEVICE)
        model(large)
    assert not is_idle(DEVICE)
    assert not is_idle(large.device)
    with torch.cuda.stream(other):
        assert not is_idle(DEVICE)  # the default stream is at work, though the current one is not
        synchronize(DEVICE)
        assert is_idle(DEVICE)
        model(large)
        assert not is_idle(DEVICE)
    synchronize(DEVICE)
    assert is_idle(large.device)


def test_what_ends_on_a_cpu_is_not_timed(large):
    with pytest.raises(BertEvaluationError, match="Outputs are on cpu and inputs on cuda"):
        timed(lambda: large[:2, :2].cpu(), large.device)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_what_ends_on_another_gpu_is_not_timed(large):
    with pytest.raises(BertEvaluationError, match="Outputs are on cuda:1 and inputs on cuda:0"):
        timed(lambda: large[:2, :2].to("cuda:1"), large.device)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A folder with a store that has an examination of the machine, and two experiments; and a checkpoint."""
    folder = tmp_path_factory.mktemp("session")
    checkpoint("bert", folder / "tiny")
    succeeds(folder, "doctor", "--model", "built-in", "--json", folder / "doctor.json", "--device", DEVICE)
    options = ("--recipe", "exact", "--recipe", "bf16", "--samples", 24, "--batch-tokens", 2048, "--rounds", 12)
    for number in (1, 2):
        files = ("--json", folder / f"{number}.json", "--html", folder / f"{number}.html")
        succeeds(folder, "--infer", "--evaluate", "--transform", *options, *files, "--device", DEVICE)
    return folder


def driver_tells():
    """Whether torch can ask the driver, which takes nvidia-ml-py."""
    try:
        return torch.cuda.clock_rate(DEVICE) > 0
    except Exception:  # noqa: BLE001
        return False


def succeeds(folder, *arguments):
    result = run(*arguments, *(() if arguments[0] in ("verify", "diff") else ("--store", folder / "results.sqlite")))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.mark.xdist_group("session")
def test_what_the_doctor_tells(session):
    content = json.loads((session / "doctor.json").read_text())
    assert content["machine"]["device_name"] == machine(DEVICE)["device_name"]
    findings = {each["what"]: each for each in content["findings"]}
    assert "taken beside this process's tensors" in findings["Others on the GPU"]["found"]
    assert (findings["GPU"]["verdict"] == "unknown") == (not driver_tells())
    assert [each["share"] > 0 for each in content["reached"]] == [True] * 3


@pytest.mark.xdist_group("session")
def test_what_the_device_reaches(session):
    roofline = json.loads((session / "doctor.json").read_text())["roofline"]
    peaks = dict[str, float]()
    for each in roofline["peaks"]:
        peaks[each["precision"]] = max(each["gflops"]["estimate"], peaks.get(each["precision"], 0))
        assert each["gflops"]["low"] <= each["gflops"]["estimate"] <= each["gflops"]["high"]
    assert peaks["bf16"] > peaks["fp32"]
    assert peaks["fp16"] > peaks["fp32"]
    assert ("fp8" in peaks) == (torch.cuda.get_device_capability(DEVICE) >= (8, 9))
    assert peaks.get("fp8", torch.inf) > peaks["bf16"]
    assert all(each["gigabytes"]["estimate"] > 50 for each in roofline["bandwidths"])


def test_each_way_multiplies():
    """All of the precisions that the peaks are told in."""
    x, weight = torch.randint(0, 4, (16, 32)).float(), torch.randint(-4, 4, (16, 32)).float()
    computed = set()
    for way in products.ways(DEVICE):
        try:
            result = way.make(x.to(DEVICE), weight.to(DEVICE))()
        except RuntimeError:
            continue
        computed.add(way.precision)
        assert torch.equal(result.float().cpu(), x @ weight.T), way.name
    assert computed >= {"fp32", "bf16", "fp16"}


@pytest.mark.xdist_group("session")
def test_rows_and_the_conditions_that_they_were_timed_in(session):
    content = json.loads((session / "1.json").read_text())
    assert content["machine"]["device"] == str(DEVICE)
    assert content["machine"]["device_name"] == machine(DEVICE)["device_name"]
    base, exact, bfloat16 = content["rows"]
    assert exact["promise"]["verdict"] == bfloat16["promise"]["verdict"] == "kept"
    assert {row["answer"] for row in content["rows"]} == {base["answer"]}
    assert exact["quality"]["f1"] == pytest.approx(base["quality"]["f1"], abs=1e-6)
    assert all(row["latency_ms"]["samples"] == 12 for row in (base, exact))
    remarks = json.loads((session / "doctor.json").read_text())["roofline"]["remarks"]
    assert (base["share_of_peak"] is None) == bool(remarks)
    for stage in ("infer", "evaluate"):
        names = ("device_clock_mhz", "device_temperature_c", "device_power_w")
        told = [content["conditions"][stage][f"{name}_{when}"] for name in names for when in ("before", "after")]
        assert [each is None for each in told] == [not driver_tells()] * 6
        assert all(each is None or each > 0 for each in told)
    page = (session / "1.html").read_text()
    assert machine(DEVICE)["device_name"] in page


@pytest.mark.xdist_group("session")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("verify", "--recipe", "exact", "--recipe", "bf16", "--questions", 1, "--device", DEVICE), "promise kept"),
        (("map", "--recipe", "exact", "--batches", 1, "--lengths", 16, "--rounds", 3, "--device", DEVICE), "1×16 on "),
        (("diff", "--recipe", "exact"), "Base+exact"),
        (("history",), "exact"),
        (("history", 1), "Base+exact"),
        (("report", 1, "--html", "page.html"), "page.html"),
        (("compare", 1, 2), "exact"),
        (("compare", "1:exact", "1:bf16"), "exact"),
        (("check", 1, 2, "--max-slowdown", "95%", "--min-f1-ratio", "0.01"), "pass"),
    ],
)  # fmt: skip
def test_every_other_command(session, monkeypatch, arguments, part):
    monkeypatch.chdir(session)
    of_tiny = ("--model", "tiny") if arguments[0] in ("verify", "map", "diff") else ()
    assert part in succeeds(session, *arguments, *of_tiny)
