"""Stored experiments compared and checked: which differences are seen, and that noise and machines are not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_experiments import BROKEN, KEPT, MACHINE, OUTCOME, answers, keep

from bert_evaluation.comparability import notes, obstacles
from bert_evaluation.comparison import Absent, compare, paired_quality
from bert_evaluation.outcome import Experiment
from bert_evaluation.regression import Limits, check
from bert_evaluation.report.comparing import comparison_lines, regression_lines
from bert_evaluation.squad.windows import Windowing
from bert_evaluation.stats import unpaired_speedup
from bert_evaluation.store import AnswerRecord, Store
from bert_evaluation.stored import read

ROWS = {"Base": 1.0, "Base+Merge": 1.2}


@pytest.fixture
def stores(tmp_path):
    """Two stores, of which each has its own evaluations."""
    with Store(tmp_path / "before.sqlite") as before, Store(tmp_path / "after.sqlite") as after:
        yield SimpleNamespace(before=before, after=after)


def both(stores, rows=ROWS, new_rows=None, before=None, after=None):
    """Two experiments, each in its own store."""
    number = keep(stores.before, rows, **({"seed": 1} | (before or {})))
    new = keep(stores.after, new_rows or rows, **({"seed": 2} | (after or {})))
    return read(stores.before, number), read(stores.after, new)


def pairs(found):
    return {pair.after: pair for pair in found.pairs}


def test_a_slower_machine_is_taken_out_by_base(stores):
    found = compare(*both(stores, after={"machine_speed": 0.8}), 0.99)
    merged = pairs(found)["Base+Merge"]
    for speed in (merged.inference, merged.throughput):
        assert speed.raw.high < 0.9
        assert speed.raw.verdict == "cannot tell"
        assert speed.relative.low > 0.99
        assert speed.relative.high < 1.01
    assert found.base.inference.raw.estimate == pytest.approx(0.8, rel=0.05)
    assert found.base.inference.relative is None
    lines = list(comparison_lines(found))
    assert any(line.startswith("Base itself, inference: 0.") for line in lines)
    assert any("in another session; against Base in each" in line for line in lines)


@pytest.mark.parametrize(("speed", "verdict"), [(1.05, "slower"), (1.4, "faster")])
def test_what_became_of_a_row_shows_whatever_the_machine_did(stores, speed, verdict):
    one, other = both(stores, new_rows={"Base": 1.0, "Base+Merge": speed}, after={"machine_speed": 1.3})
    merged = pairs(compare(one, other, 0.99))["Base+Merge"]
    assert merged.inference.judged.verdict == merged.throughput.judged.verdict == verdict
    assert merged.inference.judged.low < speed / 1.2 < merged.inference.judged.high


def test_equal_independent_samples_are_seldom_called_different():
    rng = np.random.default_rng(3)
    for sizes in ((6, 6), (6, 40), (40, 40)):
        verdicts = []
        for run in range(300):
            one, other = (list(rng.lognormal(sigma=0.05, size=size)) for size in sizes)
            verdicts.append(unpaired_speedup(one, other, seed=run).verdict)
        assert verdicts.count("cannot tell") >= 0.95 * len(verdicts)


def test_unequal_independent_samples_are_told():
    rng = np.random.default_rng(4)
    one, other = list(rng.lognormal(sigma=0.02, size=40)), list(rng.lognormal(sigma=0.02, size=30) / 1.1)
    found = unpaired_speedup(one, other)
    assert found.verdict == "faster"
    assert found.low < 1.1 < found.high
    assert unpaired_speedup(other, one).verdict == "slower"
    assert unpaired_speedup([2.0] * 5, [1.0] * 40).verdict == "cannot tell"
    with pytest.raises(ValueError, match="no ratio"):
        unpaired_speedup([], [1.0])


def test_rows_of_one_experiment_are_compared_in_pairs(stores):
    one = read(stores.before, keep(stores.before, ROWS))
    found = compare(one, one, 0.99, ("Base+Merge", "Base"))
    (pair,) = found.pairs
    assert found.base is None
    assert pair.inference.together
    assert pair.throughput.together
    assert pair.inference.judged.verdict == pair.throughput.judged.verdict == "slower"
    assert pair.throughput.judged.estimate == pytest.approx(1 / 1.2, rel=0.01)


def test_batches_of_other_sizes_are_compared_through_base_only(stores):
    one, other = both(stores, after={"settings": {"batching": "1024"}, "batches": 12})
    speed = pairs(compare(one, other, 0.99))["Base+Merge"].throughput
    assert speed.raw is None
    assert speed.relative.low < 1 < speed.relative.high
    assert speed.samples == 12
    assert "batching 512 in experiment 1 and" in notes(one, other)[0]
    assert isinstance(pairs(compare(one, other, 0.99))["Base"].throughput, Absent)


def test_one_stored_evaluation_is_no_second_measurement(stores):
    one, other = (read(stores.before, keep(stores.before, ROWS, seed=seed)) for seed in (1, 2))
    found = pairs(compare(one, other, 0.99))["Base+Merge"]
    assert found.throughput.why == "same"
    assert found.inference.relative is not None
    assert found.quality.changed_answers == 0


def test_batches_of_another_session_than_bases_do_not_pair(stores):
    keep(stores.before, {"Base": 1.0})
    one = read(stores.before, keep(stores.before, ROWS))  # Base's batches stay the first experiment's
    other = read(stores.after, keep(stores.after, ROWS))
    speed = pairs(compare(one, other, 0.99))["Base+Merge"].throughput
    assert speed.relative is None
    assert speed.judged.verdict == "cannot tell"
    assert compare(one, one, 0.99, ("Base", "Base+Merge")).pairs[0].throughput.reason == "not run side by side"


def test_a_base_of_another_graph_is_no_control(stores):
    one, other = both(stores, after={"graphs": {"Base": "another"}})
    found = pairs(compare(one, other, 0.99))["Base+Merge"]
    assert found.inference.relative is found.throughput.relative is None


def test_a_row_that_no_longer_fires_is_as_slow_as_base(stores):
    one, other = both(stores, after={"unchanged": ["Base+Merge"]})
    found = pairs(compare(one, other, 0.99))["Base+Merge"]
    assert found.inference.judged.estimate == pytest.approx(1 / 1.2, rel=0.01)
    assert found.throughput.judged.verdict == "slower"
    idle = both(stores, before={"unchanged": ["Base+Merge"]}, after={"unchanged": ["Base+Merge"]})
    assert pairs(compare(*idle, 0.99))["Base+Merge"].inference.why == "same"


def test_an_experiment_that_did_not_finish_is_told(stores):
    one, other = both(stores, after={"state": "running"})
    assert notes(one, other) == ("experiment 1 is not finished, but running; what it has is compared",)
    assert notes(one, one) == ()


def test_other_arguments_are_told(stores):
    one, other = both(stores, after={"recipes": {"Base+Merge": "Merge(at_least=2)"}})
    assert pairs(compare(one, other, 0.99))["Base+Merge"].note == (
        "other arguments: Merge() in experiment 1, Merge(at_least=2) in experiment 1"
    )


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"found": replace(OUTCOME, weights_hash="e3b0c44298fc1c14")}, "weights", "e3b0c44298fc"),
        ({"data": "other data"}, "data", "other data"),
        ({"found": replace(OUTCOME, machine=MACHINE | {"threads": 4})}, "machine", "threads 4"),
        ({"found": replace(OUTCOME, machine=MACHINE | {"device": "cuda", "device_name": "H100"})}, "machine", "H100"),
        ({"found": replace(OUTCOME, machine=MACHINE | {"torch": "2.14.0"})}, "versions", "torch 2.14.0"),
        ({"found": replace(OUTCOME, experiment=Experiment(infer=True, question="Who?"))}, "question", "'Who?'"),
        (
            {"found": replace(OUTCOME, experiment=Experiment(infer=True, windowing=Windowing(64, 16)))},
            "question",
            "with another context or window",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(stores, change, kind, said):
    one, other = both(stores, after=change)
    assert obstacles(one, one) == ()
    (found,) = obstacles(one, other)
    assert found.label == f"other {kind}"
    assert said in found.sentence


def test_data_without_evaluations_is_known_by_name(stores):
    one, other = both(
        stores,
        before={"measured": ["inference"]},
        after={"measured": ["inference"], "found": replace(OUTCOME, samples=20)},
    )
    assert [each.kind for each in obstacles(one, other)] == ["data"]
    none = replace(other, outcome=replace(other.outcome, dataset=None, samples=None))
    assert obstacles(one, none) == ()


records = st.lists(
    st.builds(
        AnswerRecord,
        question=st.text(max_size=3),
        span=st.sampled_from(["", "a", "b"]),
        score=st.just(1.0),
        null_odds=st.floats(-2, 2),
        gap=st.just(0.0),
        exact=st.sampled_from([0.0, 1.0]),
        f1=st.floats(0, 1),
        answerable=st.booleans(),
    ),
    min_size=1,
    max_size=20,
)
thresholds = st.floats(-2, 2)


def plain_f1(record, threshold):
    if record.null_odds > threshold:
        return 0.0 if record.answerable else 1.0
    return record.f1


@given(records, st.randoms(use_true_random=False), thresholds, thresholds)
@settings(max_examples=60, deadline=None)
def test_each_side_is_scored_under_its_own_threshold(before, luck, threshold, other_threshold):
    after = [replace(each, span=luck.choice("abc"), f1=luck.random(), null_odds=luck.uniform(-2, 2)) for each in before]
    found = paired_quality(before, after, (threshold, other_threshold), 0.99)
    assert found.f1_before == pytest.approx(100 * np.mean([plain_f1(each, threshold) for each in before]))
    assert found.f1_after == pytest.approx(100 * np.mean([plain_f1(each, other_threshold) for each in after]))
    assert found.f1_difference.estimate == pytest.approx(found.f1_after - found.f1_before)
    texts = [(one.text(threshold), other.text(other_threshold)) for one, other in zip(before, after, strict=True)]
    assert found.changed_answers == sum(one != other for one, other in texts)
    back = paired_quality(after, before, (other_threshold, threshold), 0.99)
    assert back.f1_difference.estimate == pytest.approx(-found.f1_difference.estimate)
    assert (back.mcnemar_p, back.changed_answers) == (pytest.approx(found.mcnemar_p), found.changed_answers)


def test_experiments_with_other_thresholds_share_spans_but_not_answers(stores):
    one = read(stores.before, keep(stores.before, ROWS, null_threshold=0.0))
    other = read(stores.before, keep(stores.before, ROWS, null_threshold=-2.0))  # null odds are -1: all are dropped
    found = pairs(compare(one, other, 0.99))["Base"].quality
    assert (found.f1_before, found.f1_after, found.changed_answers) == (100, 0, 400)
    assert found.f1_difference.verdict == "worse"
    assert "null threshold 0 in experiment 1 and null threshold -2 in experiment 2" in notes(one, other)[0]


def checks(found):
    return {(each.row, each.measure): each.verdict for each in found.checks}


def test_a_check_passes_what_is_as_it_was(stores):
    found = check(*both(stores))
    assert found.verdict == "pass", list(regression_lines(found))
    assert set(checks(found)) == {
        ("Base", "inference"), ("Base", "throughput"), ("Base", "F1"),
        ("Base+Merge", "promise"), ("Base+Merge", "inference"), ("Base+Merge", "throughput"), ("Base+Merge", "F1"),
    }  # fmt: skip


def test_a_check_fails_what_is_slower_than_allowed(stores):
    one, other = both(stores, new_rows={"Base": 1.0, "Base+Merge": 1.1}, after={"machine_speed": 1.5})
    found = checks(check(one, other))
    assert found["Base+Merge", "inference"] == found["Base+Merge", "throughput"] == "fail"
    assert found["Base", "inference"] == "pass"
    assert check(one, other, Limits(max_slowdown=0.15)).verdict == "pass"


def test_a_slower_machine_is_no_failure(stores):
    found = check(*both(stores, after={"machine_speed": 0.7}))
    assert found.verdict == "cannot tell"
    assert checks(found)["Base", "inference"] == "cannot tell"
    assert checks(found)["Base+Merge", "inference"] == checks(found)["Base+Merge", "throughput"] == "pass"


def test_few_samples_prove_nothing(stores):
    few = {"rounds": 5, "batches": 5, "noise": 0.0}
    found = checks(check(*both(stores, new_rows={"Base": 1.0, "Base+Merge": 0.5}, before=few, after=few)))
    assert found["Base+Merge", "inference"] == found["Base+Merge", "throughput"] == "cannot tell"
    assert found["Base", "inference"] == "cannot tell"


@pytest.mark.parametrize(("lost", "verdict"), [(0, "pass"), (4, "cannot tell"), (40, "fail")])
def test_a_check_of_f1(stores, lost, verdict):
    found = check(*both(stores, after={"wrong": {"Base+Merge": range(lost)}}))
    assert checks(found)["Base+Merge", "F1"] == verdict
    assert checks(found)["Base", "F1"] == "pass"


def test_for_an_approximation_few_questions_prove_nothing(stores):
    few = {"answered": lambda wrong: answers(wrong, 50), "verification": replace(KEPT, promise="approximates")}
    assert checks(check(*both(stores, before=few, after=few)))["Base+Merge", "F1"] == "cannot tell"


def test_missing_rows_and_broken_promises_fail(stores):
    one, other = both(stores, rows=ROWS | {"Base+Fuse": 1.0}, new_rows=ROWS, after={"verification": BROKEN})
    found = check(one, other)
    assert checks(found)["Base+Fuse", "row"] == checks(found)["Base+Merge", "promise"] == "fail"
    said = "\n".join(regression_lines(found))
    assert "Base+Fuse, row: fail: there is no such row in experiment 1" in said
    assert "Base+Merge, promise: fail: reassociates promise broken on batch 1, length 2" in said


def test_what_was_not_measured_again_cannot_be_told(stores):
    one, other = both(stores, after={"measured": ["inference"]})
    assert checks(check(one, other))["Base+Merge", "F1"] == "cannot tell"
    assert checks(check(other, one)).keys() == {
        ("Base", "inference"), ("Base+Merge", "promise"), ("Base+Merge", "inference"),
    }  # fmt: skip
    stores.after._database.do("DELETE FROM answers")
    lost = read(stores.after, keep(stores.after, ROWS, measured=["throughput"]))
    assert checks(check(lost, one))["Base+Merge", "F1"] == "cannot tell"
    alone = read(stores.after, keep(stores.after, {"Base": 1.0}, measured=[]))
    assert check(alone, alone).verdict == "cannot tell"  # nothing to check
