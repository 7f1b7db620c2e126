"""Planted faults are found and named to the site; sound recipes raise no alarm."""

import json
import shlex

import faults
import pytest
import torch
import typer
from families import FAMILIES, tiny
from family_tokenizers import checkpoint
from typer.testing import CliRunner

from bert_evaluation import capture, compose, transformations
from bert_evaluation import graph as graphs
from bert_evaluation.blame import WHOLE, SaveAndRead, guilty, verify_steps
from bert_evaluation.cli.verify import verify
from bert_evaluation.errors import BertEvaluationError, UsageError
from bert_evaluation.probes import TextProbes, text_probes
from bert_evaluation.promise import Approximates, Bitwise
from bert_evaluation.transformations import (
    ORIGINAL,
    PRESETS,
    REGISTRY,
    ChangeTrueDivToMulByInverse,
    FuseBiasInLinear,
    MergeLinears,
    RemoveDropout,
    parse_recipe,
)
from bert_evaluation.verification import observe

SEEDS = 200
PADDED = "batch 1, length 2, padding on the right"
# What is planted, and the smallest probe that shows it.
PLANTED = [
    (faults.WrongSlice(1), "batch 1, length 2"),
    (faults.DroppedMask(1), PADDED),
    (faults.SwappedBias(3), "batch 1, length 1"),
    (faults.ChangedEps(4), "batch 1, length 2"),
    (faults.ScaledTwice(1), "batch 1, length 2"),
    (faults.TransposedHeads(4), "batch 1, length 2"),
    (faults.Cast(8), "batch 1, length 1"),
    (faults.FixedBatch(2), "batch 2, length 1"),
    (faults.ForgottenStride(0), "batch 1, length 2, non-contiguous"),
    (faults.LastIdMissing(0), "batch 1, length 1"),
    (faults.ApproximateGelu(1), "batch 1, length 1"),
    (faults.FewKeys(0), f"batch 1, length {faults.FewKeys.KEYS + 1}"),
]


def observed(name):
    # Weights of the usual initialisation are so small that every attention is nearly the same.
    model = tiny(name, initializer_range=0.2)
    return observe(capture(model), text_probes(model, 64))


@pytest.fixture(scope="module")
def of_bert():
    return observed("bert")


def broken(reference, *steps):
    return [check for check in verify_steps(reference, compose(*steps), saved=False) if not check.kept]


def planted_in(reference, fault):
    """The one broken step of a recipe that has the fault between two sound steps, and the site it should name."""
    before = RemoveDropout()(graphs.fork(reference.model))
    (check,) = broken(reference, RemoveDropout(), fault, FuseBiasInLinear())
    return check, fault.guilty_in(before)


@pytest.mark.parametrize(("fault", "probe"), PLANTED, ids=[type(fault).__name__ for fault, _ in PLANTED])
def test_faults_are_found_and_named_to_the_site(of_bert, fault, probe):
    check, site = planted_in(of_bert, fault)
    assert (check.number, check.blame.step, check.blame.site) == (2, repr(fault), site)
    assert len(check.report.applied) > 1
    assert check.blame.probe == probe
    assert check.blame.layer
    assert check.verification.first_difference == f"{check.blame.layer} ({check.blame.node})"
    assert shlex.split(check.blame.command) == [
        *("bert-evaluation", "verify", "--recipe", f"RemoveDropout()+{fault!r}+FuseBiasInLinear()", "--probe", probe)
    ]


def test_a_site_applied_to_a_shared_parameter():
    reference = observed("albert")
    check, site = planted_in(reference, faults.SharedParameter(1))
    assert (check.number, check.blame.site) == (2, site)
    assert "attention.query" in check.blame.layer
    assert any(refusal.reason.startswith("albert.") for refusal in check.report.refused)


def test_a_fault_without_sites_is_one_of_the_whole_graph(of_bert):
    (check,) = broken(of_bert, MergeLinears(), faults.OfTheWholeGraph())
    assert (check.number, check.blame.site, check.blame.node) == (2, WHOLE, "split")


class Rounding(FuseBiasInLinear):
    promise = Bitwise()


def test_a_step_is_held_to_its_own_promise_not_to_the_recipes(of_bert):
    recipe = compose(MergeLinears(), Rounding())
    assert recipe.promise.kind == "reassociates"
    (check,) = broken(of_bert, *recipe.steps)
    assert (check.number, check.verification.promise) == (2, "bitwise")


class Approximated(faults.Cast):
    promise = Approximates()


def test_what_follows_an_approximation_is_checked_behind_it_and_without_it(of_bert):
    checks = list(verify_steps(of_bert, compose(Approximated(0), MergeLinears(), RemoveDropout()), saved=False))
    assert [(check.recipe, check.number) for check in checks] == [
        *(("Approximated(at=0)+MergeLinears()+RemoveDropout()", number) for number in (1, 2, 3)),
        *(("MergeLinears()+RemoveDropout()", number) for number in (1, 2)),
    ]
    assert all(check.kept for check in checks)
    # bfloat16 hides a small fault, but not a large one.
    small, large = (broken(of_bert, Approximated(0), fault) for fault in (faults.ChangedEps(4), faults.ScaledTwice(1)))
    assert [check.recipe for check in small] == ["ChangedEps(at=4)"]
    assert [check.recipe for check in large] == ["Approximated(at=0)+ScaledTwice(at=1)", "ScaledTwice(at=1)"]


def test_a_model_serves_as_well_as_its_graph(bert):
    reference = observe(bert, [TextProbes(bert).named("batch 2, length 7")])
    assert [check.kept for check in verify_steps(reference, MergeLinears(), saved=False)] == [True]


def test_the_guilty_site_is_the_one_that_turns_the_verdict():
    sites = [str(i) for i in range(13)]
    for wrong in sites:
        asked = []
        assert guilty(sites, lambda first: asked.append(first) or wrong in first) == wrong  # noqa: B023
        assert len(asked) <= 4


def test_sound_recipes_save_and_read_with_every_bit(family):
    model, graph = family
    recipe = compose(*(kind() for kind in ORIGINAL))
    checks = list(verify_steps(observe(graph, text_probes(model)), recipe))
    assert [check.step for check in checks] == [*(f"{kind.__name__}()" for kind in ORIGINAL), "SaveAndRead()"]
    assert all(check.kept and check.blame is None for check in checks)


def test_a_graph_that_does_not_read_back_is_blamed_on_that(monkeypatch, of_bert):
    turned = faults.OfTheWholeGraph()
    monkeypatch.setattr(SaveAndRead, "__call__", lambda self, graph: turned(graph))
    last = list(verify_steps(of_bert, RemoveDropout()))[-1]
    assert (last.kept, last.blame.step, last.blame.site) == (False, "SaveAndRead()", WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "seeds"),
    [
        (compose(MergeLinears(), FuseBiasInLinear(), ChangeTrueDivToMulByInverse(), RemoveDropout()), SEEDS),
        (parse_recipe("exact", REGISTRY, PRESETS), SEEDS // 4),
    ],
    ids=["original", "exact"],
)
def test_no_false_alarm_over_random_seeds_and_all_families(recipe, seeds):
    alarms, applied = [], dict.fromkeys(FAMILIES, 0)
    for index, family in enumerate(FAMILIES):
        model = tiny(family)
        graph, first = capture(model), {name: each.detach().clone() for name, each in model.named_parameters()}
        for seed in range(index, seeds, len(FAMILIES)):
            redraw(model, first, seed)
            for check in verify_steps(observe(graph, text_probes(model, seed=seed)), recipe, saved=False):
                applied[family] += len(check.report.applied)
                alarms += [] if check.kept else [(family, seed, check)]
    assert alarms == []
    assert all(applied.values())


def redraw(model, first, seed):
    """Weights as spread as the first ones, or up to five times as much; the graph shares them."""
    random = torch.Generator().manual_seed(seed)
    scale = 1 + 4 * torch.rand((), generator=random)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(first[name].mean() + scale * first[name].std(correction=0) * noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint("bert", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(monkeypatch, folder):
    monkeypatch.setattr(transformations, "REGISTRY", (*transformations.REGISTRY, faults.DroppedMask))
    app = typer.Typer()
    app.command()(verify)

    def call(*arguments):
        return CliRunner().invoke(app, ["--model", str(folder), "--device", "cpu", *map(str, arguments)])

    return call


def test_the_command_says_what_was_checked(run, tmp_path):
    file = tmp_path / "verified.json"
    result = run("--recipe", "RemoveDropout+MergeLinears", "--questions", 1, "--json", file)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    content = json.loads(file.read_text())
    probes = content["steps"][0]["promise"]["probes"]
    assert first.startswith(
        "RemoveDropout()+MergeLinears(), step 1, RemoveDropout(): 5 of 5 sites; bitwise promise kept"
    )
    assert f"reassociates promise kept on {probes} probes, max difference" in second
    assert "step 3, SaveAndRead(): bitwise promise kept" in third
    assert (content["verdict"], [step["blame"] for step in content["steps"]]) == ("kept", [None] * 3)


def test_the_command_that_is_printed_shows_it_again(run, folder):
    result = run("--recipe", "MergeLinears+DroppedMask", "--questions", 0, "--seed", 5)
    assert result.exit_code == 1, result.output
    assert f"smallest failing probe: {PADDED}\n" in result.stdout
    assert "caused by: step 2, DroppedMask(at=1), site bert.encoder.layer.1.attention.self (" in result.stdout
    command = shlex.split(result.stdout.partition("to see it again: ")[2].splitlines()[0])
    assert command[:2] == ["bert-evaluation", "verify"]
    assert command[command.index("--model") + 1] == str(folder)
    again = run(*command[2:])
    assert again.exit_code == 1
    assert f"smallest failing probe: {PADDED}\n" in again.stdout
    assert "on 1 probe, max" in again.stdout


@pytest.mark.parametrize(
    ("options", "kind", "part"),
    [
        (("--recipe", "MergeLinear"), UsageError, "did you mean MergeLinears"),
        (("--probe", "batch two"), UsageError, "names no probe"),
        (("--probe", "question x"), UsageError, "no question x"),
        (("--questions", -1), UsageError, "0 or more"),
        (("--json", "/nowhere/v.json"), BertEvaluationError, "no folder /nowhere"),
    ],
)
def test_bad_requests(run, options, kind, part):
    result = run(*options)
    assert type(result.exception) is kind
    assert part in str(result.exception)
