"""The answer in a sentence, for every way an experiment can end."""

import pytest
from examples import base, difference, outcome, quality, ratio, rich, row, verified

from bert_evaluation.report.headline import headline, measure
from bert_evaluation.rows import Change, Row
from bert_evaluation.stats import Interval, Ratio

WORSE = quality(60.0, difference(-3.0))
UNSURE = quality(62.5, difference(-0.6))
APPROXIMATES = verified("approximates", 0.02)


def said(*rows, **parts):
    return headline(outcome(base(), *rows, **parts)).sentence


def test_it_pays():
    found = headline(outcome(base(), row("MergeLinears", 1.1), row("RemoveDropout+MergeLinears", 1.21)))
    assert found.sentence == (
        "RemoveDropout+MergeLinears is 1.21 times faster, 1.18 to 1.24, answers unchanged on 2,794 questions."
    )
    assert found.subject.name == "Base+RemoveDropout+MergeLinears"
    assert found.details == ()


def test_answers_changed_and_quality_held():
    changes = [Change(str(each), "a", "b", 1.0, 1.0) for each in range(12)]
    assert said(row("ToBFloat16", quality=quality(63.0, difference(-0.1), changes))) == (
        "ToBFloat16 is 1.20 times faster, 1.17 to 1.23, 12 of 2,794 answers changed,"
        " F1 -0.10 (-0.30 to +0.10): not worse."
    )


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"verification": verified(kept=False)}, "Nothing pays: X is {}, but its promise (reassociates) is broken."),
        ({"quality": WORSE}, "Nothing pays: X is {}, but it answers worse: F1 -3.00 (-3.20 to -2.80)."),
        (
            {"quality": UNSURE},
            "Cannot tell whether anything pays: X is {}, but 2,794 questions cannot tell whether its quality holds:"
            " F1 -0.60 (-0.80 to -0.40).",
        ),
        (
            {"quality": None, "verification": APPROXIMATES},
            "Cannot tell whether anything pays: X is {}, but it approximates and its quality was not measured.",
        ),
        ({"verification": None}, "Cannot tell whether anything pays: X is {}, but its promise was not checked."),
    ],
)
def test_faster_but(parts, sentence):
    assert said(row("X", **parts)) == sentence.format("1.20 times faster, 1.17 to 1.23")


def test_the_fastest_is_passed_over_and_named():
    found = headline(outcome(base(), row("A", 1.1), row("B", 2.0, quality=WORSE), row("C", 1.5, quality=UNSURE)))
    assert found.sentence.startswith("A is 1.10 times faster")
    assert found.details == (
        "B is faster still, 2.00 times, but it answers worse: F1 -3.00 (-3.20 to -2.80)."
        " 1 more such row is faster, too.",
    )


def test_one_that_may_be_cleared_comes_before_one_that_cannot():
    assert said(row("A", 2.0, quality=WORSE), row("B", 1.5, quality=UNSURE)).startswith("Cannot tell whether")


def test_nothing_is_surely_faster():
    found = headline(outcome(base(), row("A", 1.0), row("B", 0.5), row("C", 1.002, 0.004)))
    assert found.sentence == (
        "Cannot tell whether anything pays: the fastest, C, has 1.002 times Base's speed, 0.998 to 1.006."
    )
    assert found.details == ("1 recipe is slower than Base.",)
    assert found.subject is None


def test_all_is_slower():
    assert said(row("A", 0.9)) == "Nothing pays: A is slower, with 0.90 times Base's speed, 0.87 to 0.93."
    assert said(row("A", 0.8), row("B", 0.9)) == (
        "Nothing pays: all 2 recipes timed are slower; the fastest, B, has 0.90 times Base's speed, 0.87 to 0.93."
    )


def test_nothing_changes_the_graph():
    assert "no recipe finds anything to change" in said(row("A", unchanged=True, throughput_speedup=None))


def test_only_transformed():
    timeless = {"throughput_speedup": None, "quality": None}
    assert said(row("A", **timeless)) == "1 recipe that changes the graph keeps its promise; nothing was timed."
    assert said(row("A", **timeless), row("B", **timeless, verification=verified(kept=False))) == (
        "1 promise is broken, by B; nothing was timed."
    )


def test_base_alone():
    assert headline(outcome()).sentence == "Nothing is kept of this experiment."
    assert said() == "Base scores F1 63.06 on 2,794 questions; no recipe was compared with it."
    timed = Row("Base", "", latency=Interval(8.1, 8.0, 8.3))
    assert headline(outcome(timed)).sentence == (
        "Base takes 8.1 ms for one inference (8.0 to 8.3); no recipe was compared with it."
    )


def test_judged_by_inference_where_nothing_was_evaluated():
    parts = {"quality": None, "throughput_speedup": None, "speedup": ratio(1.3), "answer": "so"}
    found = outcome(Row("Base", "", answer="so"), row("A", **parts))
    assert measure(found) == "inference"
    assert headline(found).sentence == (
        "A is 1.30 times faster, 1.27 to 1.33, the same answer to the one question, quality not measured."
    )


def test_what_the_other_speed_says_and_what_was_not_compared():
    found = headline(
        outcome(base(), row("A", speedup=Ratio(0.9, 0.8, 0.95, "slower")), row("B", throughput_speedup=None))
    )
    assert found.details == (
        "For one inference it is slower: 0.90 times its speed, 0.80 to 0.95.",
        "1 recipe was not timed side by side with Base.",
    )


def test_what_is_faster_by_the_other_measure_is_told_where_none_pays():
    found = headline(outcome(base(), row("exact", 0.92, speedup=ratio(1.23)), row("MergeLinears", 0.95)))
    assert found.sentence.startswith("Nothing pays: all 2 recipes timed are slower")
    assert found.details[0] == "For one inference exact is 1.23 times faster, 1.20 to 1.26."


def test_twenty_recipes():
    assert headline(rich()[0]).subject.name == "Base+QuantizeDynamic"
