import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation.errors import UsageError
from bert_evaluation.squad.batches import Batching, batches, padded, tensors
from bert_evaluation.squad.windows import Window


def window(length, example=0):
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Window(example, ids, np.ones(length, dtype=np.uint8), 0, 1, length - 1, np.zeros((length - 1, 2)))


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 3000))
def test_every_window_is_in_one_batch_that_holds_no_more_tokens_than_allowed(lengths, tokens):
    cut = [window(length) for length in lengths]
    groups = list(batches(cut, Batching(tokens=tokens)))
    assert sorted(map(id, cut)) == sorted(id(each) for group in groups for each in group)
    assert all(len(group) == 1 or padded(group) <= tokens for group in groups)
    ordered = [len(each) for group in groups for each in group]
    assert ordered == sorted(ordered, reverse=True)


def test_batches_of_so_many_windows():
    cut = [window(length) for length in (3, 9, 4, 5, 7)]
    assert [[len(each) for each in group] for group in batches(cut, Batching(size=2))] == [[9, 7], [5, 4], [3]]


def test_a_batch_holds_something():
    for wrong in ({"tokens": 0}, {"size": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            Batching(**wrong)
    with pytest.raises(UsageError, match="not both"):
        Batching(tokens=1, size=1)


def test_tensors_are_padded_on_the_side_asked_for():
    group, cpu = [window(3), window(2)], torch.device("cpu")
    behind = tensors(group, 7, ("input_ids", "attention_mask"), cpu)
    assert set(behind) == {"input_ids", "attention_mask"}
    assert behind["input_ids"].tolist() == [[1, 2, 3], [1, 2, 7]]
    assert behind["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    front = tensors(group, 7, ("input_ids", "attention_mask", "token_type_ids"), cpu, in_front=True)
    assert front["input_ids"].tolist() == [[1, 2, 3], [7, 1, 2]]
    assert front["token_type_ids"].tolist() == front["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
