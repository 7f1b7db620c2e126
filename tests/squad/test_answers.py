import itertools

import numpy as np
import pytest

from bert_evaluation import evaluate, load_dataset
from bert_evaluation.errors import UsageError
from bert_evaluation.evaluation import answer, evaluate_together
from bert_evaluation.squad import Example, sample, score
from bert_evaluation.squad.answers import AnswerRule, best_span, choose
from bert_evaluation.squad.windows import QUESTION_TOKENS, Windowing, batch, windows

# What the checkpoint's own documentation states for half A: null threshold, F1, exact match.
STATED = ((0.0, 63.06, 60.52), (3.0, 57.99, 53.54))


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
    with pytest.raises(UsageError, match="no room"):
        windows(built_in[1], [Example("a", "?", "c", ())], Windowing(max_length=128, stride=128))
    with pytest.raises(UsageError, match="fast tokenizer"):
        windows(object(), [])


def test_best_span_is_the_best_allowed_pair(built_in):
    (window,) = windows(built_in[1], [Example("a", "Who?", "one two three four five six seven", ())])
    rng = np.random.default_rng(0)
    for limit in (1, 2, 30):
        start, end = rng.normal(size=(2, len(window))).astype(np.float32)
        got = best_span(window, start, end, AnswerRule(n_best=len(window), max_answer_length=limit))
        passage = range(window.first, window.last + 1)
        pairs = [(i, j) for i in passage for j in passage if i <= j < i + limit]
        i, j = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        assert (got.start, got.end) == (window.offsets[i - window.first, 0], window.offsets[j - window.first, 1])
        assert got.null_score == pytest.approx(start[0] + end[0])


def test_no_pair_among_the_best_is_no_answer(built_in):
    example = Example("a", "Who?", "one two three", ())
    (window,) = windows(built_in[1], [example])
    start, end = np.zeros((2, len(window)), dtype=np.float32)
    start[window.last] = end[window.first] = 9
    span = best_span(window, start, end, AnswerRule(n_best=1))
    assert choose(example, [span], AnswerRule()).text == ""


def test_threshold_decides_on_the_lowest_null_score(built_in):
    example = Example("a", "Who?", "one two three", ())
    (window,) = windows(built_in[1], [example])
    start, end = np.zeros((2, len(window)), dtype=np.float32)
    start[window.first] = end[window.first] = 1
    start[0] = 5
    high = best_span(window, start, end, AnswerRule())
    start[0] = 2.5
    low = best_span(window, start, end, AnswerRule())
    assert choose(example, [high], AnswerRule()).text == ""
    assert choose(example, [high, low], AnswerRule(null_threshold=0.5)).text == "one"
    assert choose(example, [high, low], AnswerRule(null_threshold=0.4)).text == ""
    assert choose(example, [high, low], AnswerRule()).null_odds == pytest.approx(0.5)


def test_padding_changes_no_answer(built_in, base):
    data = sample(load_dataset(), 12)
    together = evaluate(base, built_in[1], data, batch_size=12)
    alone = evaluate(base, built_in[1], data, batch_size=1)
    assert together.answers == alone.answers
    assert together.scores["f1"] == pytest.approx(alone.scores["f1"])


def test_model_and_graph_answer_alike(built_in, base):
    model, tokenizer = built_in
    data = sample(load_dataset(), 6)
    found = evaluate_together({"model": model, "graph": base}, tokenizer, data)
    assert found["model"].details == found["graph"].details
    assert len(found["model"].seconds) == len(found["graph"].seconds)


def test_a_batch_holds_something(built_in, base):
    with pytest.raises(UsageError, match="at least 1"):
        evaluate(base, built_in[1], load_dataset(), batch_size=0)


def test_batch_has_only_what_the_model_takes(built_in):
    (window,) = windows(built_in[1], [Example("a", "Who?", "one", ())])
    made = batch([window], 0, ("input_ids", "attention_mask"), "cpu")
    assert set(made) == {"input_ids", "attention_mask"}


def test_any_unicode(built_in, base):
    context = "Le café «Zoë» ouvrit en 1874 – 🎉 日本語 e\u0301."
    found = answer(base, built_in[1], "When did the café open?", context, AnswerRule(null_threshold=1e9))
    assert found.span
    assert found.span in context
