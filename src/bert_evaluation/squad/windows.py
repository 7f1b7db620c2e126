"""Windows: a question and as much of its passage as the model reads at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_evaluation.errors import UsageError
from bert_evaluation.squad.dataset import Example

QUESTION_TOKENS = 64  # the rest of a longer question is cut off, as in the official run_squad.py


@dataclass(frozen=True)
class Windowing:
    """How passages are cut: tokens of a window, and tokens that two windows on end share."""

    max_length: int = 384
    stride: int = 128


@dataclass(frozen=True)
class Window:
    """Tokens of one window. `first` and `last` bound the passage's; `offsets` are those tokens' places in its text."""

    example: int
    ids: NDArray[np.int64]
    types: NDArray[np.int64]
    no_answer: int
    first: int
    last: int
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


def windows(tokenizer: Any, examples: Sequence[Example], windowing: Windowing = Windowing()) -> list[Window]:
    """Cut every example into windows. Raises UsageError for a tokenizer without offsets or too short windows."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{type(tokenizer).__name__} does not tell where a token stands; a fast tokenizer is needed.")
    limit = min(windowing.max_length, tokenizer.model_max_length)
    room = limit - QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
    if windowing.stride >= room:
        raise UsageError(f"Windows of {limit} tokens that overlap by {windowing.stride} leave no room for a question.")
    encoded = tokenizer(
        _shortened(tokenizer, [example.question for example in examples]),
        [example.context for example in examples],
        truncation="only_second",
        max_length=limit,
        stride=windowing.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    owners = encoded["overflow_to_sample_mapping"]
    return [_window(tokenizer, encoded, index, owner) for index, owner in enumerate(owners)]


def batch(group: Sequence[Window], padding: int, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The windows as int64 tensors (batch, length), padded on the right, under those of `names` that there are."""
    shape = (len(group), max(len(window) for window in group))
    arrays = {
        "input_ids": np.full(shape, padding),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, window in enumerate(group):
        arrays["input_ids"][row, : len(window)] = window.ids
        arrays["attention_mask"][row, : len(window)] = 1
        arrays["token_type_ids"][row, : len(window)] = window.types
    return {name: torch.from_numpy(arrays[name]).to(device) for name in names if name in arrays}


def _shortened(tokenizer: Any, questions: list[str]) -> list[str]:
    # Blanks in front are no part of a question, and some tokenizers make tokens of them.
    questions = [question.lstrip() for question in questions]
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        question[: places[QUESTION_TOKENS - 1][1]] if len(places) > QUESTION_TOKENS else question
        for question, places in zip(questions, offsets, strict=True)
    ]


def _window(tokenizer: Any, encoded: Any, index: int, owner: int) -> Window:
    ids = np.array(encoded["input_ids"][index], dtype=np.int64)
    of_passage = np.array([part == 1 for part in encoded.sequence_ids(index)])
    where = np.flatnonzero(of_passage)
    first, last = (int(where[0]), int(where[-1])) if len(where) else (len(ids), len(ids) - 1)
    cls = np.flatnonzero(ids == tokenizer.cls_token_id)
    return Window(
        example=owner,
        ids=ids,
        types=np.array(encoded["token_type_ids"][index], dtype=np.int64),
        no_answer=int(cls[0]) if len(cls) else 0,
        first=first,
        last=last,
        offsets=np.array(encoded["offset_mapping"][index], dtype=np.int64)[first : last + 1],
    )
