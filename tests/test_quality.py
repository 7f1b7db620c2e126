import numpy as np
import pytest

from bert_evaluation.evaluation import Evaluation, Work
from bert_evaluation.quality import alarm, quality
from bert_evaluation.squad.answers import Answer
from bert_evaluation.squad.scores import Judged
from bert_evaluation.verification import Verification


def evaluation(texts, right):
    details = {str(i): Answer(text, text, 3.0, -1.0, 0.5, 0.25 + i) for i, text in enumerate(texts)}
    column, yes = np.array(right, dtype=float), np.ones(len(right), dtype=bool)
    judged = Judged(column, column, yes, yes, np.full(len(right), -1.0))
    scores = judged.averages(0.0) | judged.best_thresholds()
    return Evaluation(scores, details, judged, judged.final(0.0), ((0, 1.0),), Work())


def check(promise):
    return Verification(promise, "kept", 2e-6, 3.0, 1e-6, 1e-5, 9)


ALIKE = evaluation(["a"] * 200, [1.0] * 100 + [0.0] * 100)


def test_base_alone_is_not_compared():
    found = quality(ALIKE, 0.99)
    assert (found.exact, found.f1, found.samples, found.has_answer_f1, found.no_answer_f1) == (50, 50, 200, 50, None)
    assert found.f1_difference is found.exact_difference is found.mcnemar_p is found.changed_answers is None


def test_the_same_answers_are_not_worse():
    found = quality(ALIKE, 0.999, ALIKE)
    assert (found.changed_answers, found.mcnemar_p) == (0, 1.0)
    assert found.f1_difference == found.exact_difference
    assert (found.f1_difference.low, found.f1_difference.high, found.f1_difference.verdict) == (0, 0, "not worse")


def test_a_few_questions_do_not_prove_an_approximation():
    assert quality(ALIKE, 0.99, ALIKE, wary=True).f1_difference.verdict == "cannot tell"
    many = evaluation(["a"] * 20_000, [1.0] * 20_000)
    assert quality(many, 0.99, many, wary=True).f1_difference.verdict == "not worse"


def test_a_clear_loss_is_worse():
    lost = evaluation(["a"] * 60 + ["b"] * 40 + ["a"] * 100, [1.0] * 60 + [0.0] * 140)
    found = quality(lost, 0.99, ALIKE)
    assert found.f1_difference.estimate == pytest.approx(-20)
    assert found.f1_difference.verdict == found.exact_difference.verdict == "worse"
    assert found.changed_answers == 40
    assert found.mcnemar_p < 1e-9
    assert found.changes[0].question == "60"
    assert (found.changes[0].before, found.changes[0].after, found.changes[0].margin_before) == ("a", "b", 60.25)


def test_gains_and_losses_that_even_out_cannot_be_told():
    swapped = evaluation(["a"] * 200, [1.0] * 90 + [0.0] * 10 + [1.0] * 10 + [0.0] * 90)
    found = quality(swapped, 0.99, ALIKE)
    assert found.f1_difference.estimate == 0
    assert found.f1_difference.verdict == "cannot tell"
    assert found.mcnemar_p == pytest.approx(1.0)


def test_a_changed_answer_is_an_alarm_where_the_same_function_was_promised():
    changed = evaluation(["a"] * 198 + ["b"] * 2, [1.0] * 100 + [0.0] * 100)
    found = quality(changed, 0.99, ALIKE)
    for promise in ("bitwise", "reassociates"):
        text = alarm(found, check(promise))
        assert text.startswith(f"2 answers changed though the promise is {promise}")
        assert "of question 199, was decided by 2.0e+02 logits" in text
        assert "differ by up to 2.0e-06" in text
    assert alarm(found, check("approximates")) is None
    assert alarm(quality(ALIKE, 0.99, ALIKE), check("bitwise")) is None
    assert alarm(found, None) is None
