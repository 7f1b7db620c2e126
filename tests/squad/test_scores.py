import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation.errors import DatasetError
from bert_evaluation.squad import Dataset, Example, score
from bert_evaluation.squad.scores import exact_match, normalize, token_f1

CASES = (
    "first_gold_or_empty",
    "always_empty",
    "plausible_always",
    "random_span",
    "mutated_gold",
    "partial_gold_mixed",
)
TWO = Dataset("two", (Example("a", "?", "c", ("the Cat", "dog")), Example("b", "?", "c", ())))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_scorer(half_a, golden, name):
    assert set(golden) == set(CASES)
    case = golden[name]
    plain = score(half_a, case["predictions"])
    full = score(half_a, case["predictions"], case["no_answer_probability"], case["no_answer_threshold"])
    assert plain == pytest.approx(case["expected"], abs=1e-9, rel=0)
    assert full == pytest.approx(case["expected_with_no_answer_probability"], abs=1e-9, rel=0)


def test_known_values():
    assert score(TWO, {"a": "cat!", "b": ""}) == {
        "exact": 100,
        "f1": 100,
        "total": 2,
        "HasAns_exact": 100,
        "HasAns_f1": 100,
        "HasAns_total": 1,
        "NoAns_exact": 100,
        "NoAns_f1": 100,
        "NoAns_total": 1,
    }
    assert score(TWO, {"a": "big dog", "b": "x"})["f1"] == pytest.approx(100 / 3)


def test_abstains_above_the_threshold():
    odds = {"a": 0.2, "b": 0.9}
    assert score(TWO, {"a": "cat", "b": "cat"}, odds, 0.5)["exact"] == 100
    assert score(TWO, {"a": "cat", "b": "cat"}, odds, 0.1)["exact"] == 50
    assert score(TWO, {"a": "cat", "b": "cat"}, odds)["best_exact_thresh"] == 0.2


def test_names_missing_ids_and_ignores_unknown_ones():
    with pytest.raises(DatasetError, match=r"1 of 2 questions have no prediction: b"):
        score(TWO, {"a": "cat", "z": "?"})
    with pytest.raises(DatasetError, match="no probability of no answer: a"):
        score(TWO, {"a": "cat", "b": ""}, {"b": 0.1})
    assert score(TWO, {"a": "cat", "b": "", "z": "?"})["total"] == 2


def test_only_one_kind_of_question():
    only = Dataset("one", TWO.examples[:1])
    assert "NoAns_f1" not in score(only, {"a": "cat"})


@given(st.text(), st.text())
def test_properties(one, other):
    assert normalize(normalize(one)) == normalize(one) or "a" in one.lower()  # taking articles out may make new ones
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, other) == pytest.approx(token_f1(other, one))
    assert exact_match(one, one) == token_f1(one, one) == 1
    assert token_f1(one, other) >= exact_match(one, other)
