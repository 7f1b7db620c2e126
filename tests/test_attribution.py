"""What each step of a recipe does: parts run beside the whole, equal graphs once."""

import pytest
from families import tiny
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation import capture, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.attribution import Parts, verdict
from bert_evaluation.recipe import compose, parse_recipe
from bert_evaluation.rows import Effect
from bert_evaluation.stats import Difference, Ratio
from bert_evaluation.transformations import REGISTRY, MergeLinears, RemoveDropout


@pytest.fixture(scope="module")
def base():
    return capture(tiny("bert"))


def parts_of(base, *texts):
    made = {"Base": base}
    recipes = {f"Base+{text}": parse_recipe(text, REGISTRY) for text in texts}
    for row, recipe in recipes.items():
        made[row] = compose(*recipe.steps, inplace=False)(base)
    parts = Parts(made)
    for row, recipe in recipes.items():
        parts.add(row, recipe)
    return parts


def test_each_step_is_left_out_and_alone(base):
    row = "Base+RemoveDropout+MergeLinears"
    parts = parts_of(base, "RemoveDropout+MergeLinears")
    # Without one of two steps the other is alone: two graphs beside the whole and Base.
    assert len(parts.graphs) == 4
    assert [(part.step, part.way) for part in parts.parts] == [
        ("RemoveDropout", "left out"),
        ("RemoveDropout", "alone"),
        ("MergeLinears", "left out"),
        ("MergeLinears", "alone"),
    ]
    only = {step.__name__: hashes.graph_hash(step()(graphs.fork(base))) for step in (RemoveDropout, MergeLinears)}
    for part in parts.parts:
        other = {"RemoveDropout": "MergeLinears", "MergeLinears": "RemoveDropout"}[part.step]
        without, with_ = (hashes.graph_hash(parts.graphs[name]) for name in (part.without, part.with_))
        expected = (only[other], hashes.graph_hash(parts.graphs[row]))
        if part.way == "alone":
            expected = (hashes.graph_hash(base), only[part.step])
        assert (without, with_) == expected


def test_a_step_without_sites_does_nothing_and_is_not_run(base):
    parts = parts_of(base, "LintAndRecompile+MergeLinears")
    assert len(parts.graphs) == 2
    effects = parts.effects("Base+LintAndRecompile+MergeLinears", speedup=lambda *_: Ratio(1.1, 1.09, 1.11, "faster"))
    assert [(each.step, each.verdict) for each in effects] == [
        ("LintAndRecompile", "does nothing"),
        ("LintAndRecompile", "does nothing"),
        ("MergeLinears", "helps"),
        ("MergeLinears", "helps"),
    ]
    assert effects[0].speedup is None


def test_a_step_that_is_named_twice_is_told_apart(base):
    parts = parts_of(base, "MergeLinears+FuseBiasInLinear+MergeLinears")
    assert [part.step for part in parts.parts[::2]] == [
        "MergeLinears (step 1)",
        "FuseBiasInLinear",
        "MergeLinears (step 3)",
    ]


def test_a_row_shared_with_a_part_is_that_variant(base):
    parts = parts_of(base, "RemoveDropout", "RemoveDropout+FuseBiasInLinear")
    alone = next(part for part in parts.parts if (part.step, part.way) == ("RemoveDropout", "alone"))
    assert alone.with_ == "Base+RemoveDropout"
    assert not parts.effects("Base+RemoveDropout")


def test_the_graphs_given_stay_as_they_were(base):
    before = hashes.graph_hash(base)
    parts_of(base, "RemoveDropout+MergeLinears+FuseBiasInLinear")
    assert hashes.graph_hash(base) == before


def test_a_later_stage_adds_to_an_earlier_one(base):
    row = "Base+RemoveDropout+MergeLinears"
    parts = parts_of(base, "RemoveDropout+MergeLinears")
    first = parts.effects(row, speedup=lambda *_: Ratio(1.1, 1.05, 1.15, "faster"))
    both = parts.effects(row, first, throughput=lambda *_: None, f1=lambda *_: Difference(-5, -6, -4, "worse"))
    assert [effect.verdict for effect in first] == ["helps"] * 4
    assert [effect.verdict for effect in both] == ["harms"] * 4
    assert all(effect.speedup == first[0].speedup for effect in both)


@given(st.floats(0.5, 2), st.floats(0, 0.5), st.sampled_from(["not worse", "worse", "cannot tell", None]))
def test_a_verdict_never_praises_what_is_not_surely_faster(estimate, width, quality):
    low, high = estimate - width, estimate + width
    said = "faster" if low > 1 else "slower" if high < 1 else "cannot tell"
    change = None if quality is None else Difference(0, 0, 0, quality)
    found = verdict(Effect("S", "alone", Ratio(estimate, low, high, said), None, change))
    if found == "helps":
        assert low > 1
        assert quality != "worse"
    if quality == "worse":
        assert found == "harms"
    if found == "no difference":
        assert low >= 0.99
        assert high <= 1.01
