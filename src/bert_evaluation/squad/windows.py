"""Windows: a question and as much of its passage as the model reads at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert_evaluation.errors import UsageError
from bert_evaluation.squad.dataset import Example

MAX_LENGTH = 384
QUESTION_TOKENS = 64  # the rest of a longer question is cut off, as in the official run_squad.py


@dataclass(frozen=True)
class Windowing:
    """How passages are cut: tokens of a window, and tokens of the passage that a window shares with the next.

    `max_length` of None stands for 384, or what the model reads at most if that is less.
    """

    max_length: int | None = None
    stride: int = 128


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of one window. `first` and `last` bound the passage's; `offsets` are those tokens' places in its text.

    `no_answer` is where the model points to if there is no answer. Token ids, places: int32; types of token: uint8.
    """

    example: int
    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    no_answer: int
    first: int
    last: int
    offsets: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)


def longest(tokenizer: Any, windowing: Windowing) -> int:
    """Tokens of the longest window. Raises UsageError for more than the model reads."""
    limit = int(tokenizer.model_max_length)
    if windowing.max_length is None:
        return min(MAX_LENGTH, limit)
    if windowing.max_length > limit:
        raise UsageError(f"The model reads at most {limit} tokens, not {windowing.max_length}; give a smaller length.")
    return windowing.max_length


def question_first(tokenizer: Any) -> bool:
    """Whether the question stands before its passage: not for tokenizers that pad in front, whose passage comes first.

    So did the question-answering pipeline of transformers 4.
    """
    return bool(tokenizer.padding_side == "right")


def windows(tokenizer: Any, examples: Sequence[Example], windowing: Windowing = Windowing()) -> list[Window]:
    """Cut every example into windows. Raises UsageError for a tokenizer without offsets or too short windows."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{type(tokenizer).__name__} does not tell where a token stands; a fast tokenizer is needed.")
    limit, stride = longest(tokenizer, windowing), windowing.stride
    room = limit - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room - 1:
        raise UsageError(
            f"Windows of {limit} tokens that share {stride} leave no room for a question;"
            f" share 0 to {max(room - 2, 0)}, or take longer windows."
        )
    first = question_first(tokenizer)
    questions = _shortened(tokenizer, examples, min(QUESTION_TOKENS, room - stride - 1))
    passages = [example.context for example in examples]
    encoded = tokenizer(
        *((questions, passages) if first else (passages, questions)),
        truncation="only_second" if first else "only_first",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, passage = encoded["overflow_to_sample_mapping"], int(first)
    return [
        _window(encoding, owner, passage, tokenizer.cls_token_id)
        for encoding, owner in zip(encoded.encodings, owners, strict=True)
    ]


def _shortened(tokenizer: Any, examples: Sequence[Example], limit: int) -> list[str]:
    # Blanks in front are no part of a question, and some tokenizers make tokens of them.
    questions = [example.question.lstrip() for example in examples]
    # A question of fewer bytes has no more tokens than that.
    long = [index for index, question in enumerate(questions) if len(question.encode()) >= limit]
    if long:
        cut = tokenizer([questions[i] for i in long], add_special_tokens=False, return_offsets_mapping=True)
        for index, places in zip(long, cut["offset_mapping"], strict=True):
            if len(places) > limit:
                questions[index] = questions[index][: places[limit - 1][1]]
    return questions


def _window(encoding: Any, owner: int, passage: int, cls: int | None) -> Window:
    ids = np.array(encoding.ids, dtype=np.int32)
    parts = encoding.sequence_ids
    first = parts.index(passage) if passage in parts else len(ids)
    last = len(parts) - 1 - parts[::-1].index(passage) if first < len(ids) else len(ids) - 1
    pointers = np.flatnonzero(ids == cls)
    return Window(
        example=owner,
        ids=ids,
        types=np.array(encoding.type_ids, dtype=np.uint8),
        no_answer=int(pointers[0 if passage else -1]) if len(pointers) else 0,
        first=first,
        last=last,
        offsets=np.array(encoding.offsets[first : last + 1], dtype=np.int32).reshape(-1, 2),
    )
