import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_evaluation import evaluate, load_dataset
from bert_evaluation.answering import Reader, answer
from bert_evaluation.errors import UsageError
from bert_evaluation.evaluation import evaluate_together
from bert_evaluation.squad import Example, sample, score
from bert_evaluation.squad.answers import NONE, AnswerRule, Span, best_spans, choose
from bert_evaluation.squad.batches import Batching
from bert_evaluation.squad.windows import QUESTION_TOKENS, Windowing, windows

# What the checkpoint's own documentation states for half A: null threshold, F1, exact match.
STATED = ((0.0, 63.06, 60.52), (3.0, 57.99, 53.54))


@pytest.fixture(scope="module")
def tokenizer(built_in):
    return built_in[1]


@pytest.mark.slow
def test_the_checkpoint_scores_what_it_states(built_in, base, half_a):
    found = evaluate(base, built_in[1], half_a)
    for threshold, f1, exact in STATED:
        answers = {each: a.span if a.null_odds <= threshold else "" for each, a in found.details.items()}
        scores = score(half_a, answers)
        assert scores["f1"] == pytest.approx(f1, abs=0.3)
        assert scores["exact"] == pytest.approx(exact, abs=0.3)


def test_windows_cover_the_passage_and_overlap(built_in):
    tokenizer = built_in[1]
    context = " ".join(f"word{i}" for i in range(700))
    cut = windows(tokenizer, [Example("a", "What is it?", context, ())])
    assert len(cut) > 2
    assert all(len(window) <= 384 for window in cut)
    assert cut[0].offsets[0, 0] == 0
    assert cut[-1].offsets[-1, 1] == len(context)
    for one, other in itertools.pairwise(cut):
        shared = {tuple(place) for place in one.offsets} & {tuple(place) for place in other.offsets}
        assert len(shared) == 128
    assert all(window.ids[window.no_answer] == tokenizer.cls_token_id for window in cut)


def test_a_question_longer_than_a_window_is_cut(built_in):
    tokenizer = built_in[1]
    (window,) = windows(tokenizer, [Example("a", "why " * 900 + "?", "Since it is so.", ())])
    assert window.first == QUESTION_TOKENS + 2
    assert window.last - window.first == 4


def test_an_empty_context_has_no_answer(built_in, base):
    found = answer(base, built_in[1], "What is it?", "")
    assert found.text == found.span == ""
    assert found.null_odds == float("inf")
    assert found.no_answer_probability == 1.0


def test_windows_need_room_and_offsets(built_in):
    with pytest.raises(UsageError, match="share 0 to 123"):
        windows(built_in[1], [Example("a", "?", "c", ())], Windowing(max_length=128, stride=128))
    with pytest.raises(UsageError, match="at most 512 tokens, not 513"):
        windows(built_in[1], [Example("a", "?", "c", ())], Windowing(max_length=513))
    with pytest.raises(UsageError, match="fast tokenizer"):
        windows(object(), [])


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (512, 0), (128, 64), (32, 16), (24, 0), (16, 11)])
def test_any_windowing_covers_every_word(built_in, length, stride):
    context = " ".join(f"word{i}" for i in range(300))
    examples = [Example("a", "Which of all those words is it, and why?" * 5, context, ()), Example("b", "?", "", ())]
    cut = windows(built_in[1], examples, Windowing(length, stride))
    assert max(map(len, cut)) <= length
    covered = {i for window in cut if window.example == 0 for one, other in window.offsets for i in range(one, other)}
    assert covered == {i for i, letter in enumerate(context) if letter != " "}
    assert sum(window.example == 1 for window in cut) == 1


def best(window, start, end, rule):
    """The best span, by trying all pairs of the n best."""
    top = [sorted(range(len(window)), key=lambda i: -logits[i])[: rule.n_best] for logits in (start, end)]
    pairs = [
        (float(start[i]) + float(end[j]), i, j)
        for i in top[0]
        for j in top[1]
        if window.first <= i <= j <= window.last and j - i < rule.max_answer_length
    ]
    scores = [*sorted((score for score, _, _ in pairs), reverse=True), NONE, NONE]
    _, i, j = max(pairs, default=(NONE, None, None))
    place = (0, 0) if i is None else (window.offsets[i - window.first, 0], window.offsets[j - window.first, 1])
    null = float(start[window.no_answer]) + float(end[window.no_answer])
    return Span(window.example, *map(int, place), scores[0], scores[1], null)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_best_spans_of_a_batch_are_the_best_allowed_pairs(tokenizer, words, n_best, limit, in_front, seed):
    examples = [Example(str(i), "Who?", " ".join(["word"] * count), ()) for i, count in enumerate(words)]
    group = windows(tokenizer, examples)
    rule = AnswerRule(n_best=n_best, max_answer_length=limit)
    width = max(map(len, group))
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, len(group), width)).astype(np.float32)
    expected = []
    for row, window in enumerate(group):
        where = slice(width - len(window), None) if in_front else slice(len(window))
        expected.append(best(window, start[row, where], end[row, where], rule))
    assert best_spans(group, start, end, rule, in_front) == expected


def of_one(window, start, end, **rule):
    (span,) = best_spans([window], start[None], end[None], AnswerRule(**rule), False)
    return span


def test_no_pair_among_the_best_is_no_answer(built_in):
    (window,) = windows(built_in[1], [Example("a", "Who?", "one two three", ())])
    start, end = np.zeros((2, len(window)), dtype=np.float32)
    start[window.last] = end[window.first] = 9
    chosen = choose("one two three", [of_one(window, start, end, n_best=1)], AnswerRule())
    assert (chosen.text, chosen.null_odds) == ("", float("inf"))


def test_logits_that_are_no_numbers_are_no_answer(built_in):
    (window,) = windows(built_in[1], [Example("a", "Who?", "one two three", ())])
    start = end = np.full(len(window), np.nan, dtype=np.float32)
    chosen = choose("one two three", [of_one(window, start, end)], AnswerRule(null_threshold=1e9))
    assert (chosen.text, chosen.null_odds) == ("", float("inf"))


def test_threshold_decides_on_the_lowest_null_score(built_in):
    context = "one two three"
    (window,) = windows(built_in[1], [Example("a", "Who?", context, ())])
    start, end = np.zeros((2, len(window)), dtype=np.float32)
    start[window.first] = end[window.first] = 1
    start[0] = 5
    high = of_one(window, start, end)
    start[0] = 2.5
    low = of_one(window, start, end)
    assert choose(context, [high], AnswerRule()).text == ""
    assert choose(context, [high, low], AnswerRule(null_threshold=0.5)).text == "one"
    assert choose(context, [high, low], AnswerRule(null_threshold=0.4)).text == ""
    assert choose(context, [high, low], AnswerRule()).null_odds == pytest.approx(0.5)


def test_gap_and_margin_tell_how_clear_the_choice_was():
    context, rule = "one two three", AnswerRule(null_threshold=1.0)
    first, second = Span(0, 0, 3, 5.0, 3.0, 4.0), Span(0, 4, 7, 4.5, 4.25, 4.75)
    same_place = Span(0, 0, 3, 4.9, 2.0, 9.0)
    chosen = choose(context, [first, same_place, second], rule)
    assert (chosen.text, chosen.score, chosen.null_odds, chosen.gap) == ("one", 5.0, -1.0, 0.5)
    assert chosen.margin == 0.5  # another span is nearer than the threshold, which is 2 away
    assert choose(context, [first, same_place], rule).margin == 2.0
    abstains = choose(context, [first], AnswerRule(null_threshold=-1.5))
    assert (abstains.text, abstains.span, abstains.margin) == ("", "one", 0.5)


def test_padding_changes_no_answer(built_in, base):
    data = sample(load_dataset(), 12)
    together = evaluate(base, built_in[1], data, batch_size=12)
    alone = evaluate(base, built_in[1], data, batch_size=1)
    assert together.answers == alone.answers
    assert together.scores["f1"] == pytest.approx(alone.scores["f1"])


def test_model_and_graph_answer_alike(built_in, base):
    model, tokenizer = built_in
    data = sample(load_dataset(), 6)
    readers = {name: Reader(each, tokenizer, AnswerRule()) for name, each in (("model", model), ("graph", base))}
    found = evaluate_together(readers, data, Batching(tokens=512))
    assert found["model"].details == found["graph"].details
    assert len(found["model"].seconds) == len(found["graph"].seconds)


def test_any_unicode(built_in, base):
    context = "Le café «Zoë» ouvrit en 1874 – 🎉 日本語 e\u0301."
    found = answer(base, built_in[1], "When did the café open?", context, AnswerRule(null_threshold=1e9))
    assert found.span
    assert found.span in context
