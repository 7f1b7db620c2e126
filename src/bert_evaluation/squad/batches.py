"""Batches: windows of like length that a model reads together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bert_evaluation.errors import UsageError
from bert_evaluation.squad.windows import Window


@dataclass(frozen=True)
class Batching:
    """How much a batch holds: so many tokens, padding included (a longer window alone), or so many windows.

    Neither stands for the number of tokens that is found cheapest by measuring.
    """

    tokens: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        for value, what in ((self.tokens, "tokens"), (self.size, "windows")):
            if value is not None and value < 1:
                raise UsageError(f"A batch size of {value} {what} holds nothing; give at least 1.")
        if self.tokens is not None and self.size is not None:
            raise UsageError("Give the batch size in tokens or in windows, not both.")

    @property
    def is_open(self) -> bool:
        """Whether it is left to measuring."""
        return self.tokens is None and self.size is None

    def allows(self, count: int, length: int) -> bool:
        """Whether `count` windows, the longest of `length` tokens, are no more than one batch."""
        return count == 1 or (count <= self.size if self.size else count * length <= (self.tokens or 0))


def batches(cut: Iterable[Window], batching: Batching) -> Iterator[list[Window]]:
    """The windows in batches, the longest first, so that each is padded little. Deterministic."""
    group: list[Window] = []
    for window in sorted(cut, key=len, reverse=True):
        if group and not batching.allows(len(group) + 1, len(group[0])):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def padded(group: Sequence[Window]) -> int:
    """The tokens that a model computes for a batch."""
    return len(group) * max(len(window) for window in group)


def tensors(
    group: Sequence[Window], padding: int, names: Iterable[str], device: torch.device, in_front: bool = False
) -> dict[str, Tensor]:
    """The windows as int64 tensors (batch, length) under those of `names` that there are, padded behind or in front."""
    shape = (len(group), max(len(window) for window in group))
    arrays = {
        "input_ids": np.full(shape, padding),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, window in enumerate(group):
        where = slice(shape[1] - len(window), None) if in_front else slice(len(window))
        arrays["input_ids"][row, where] = window.ids
        arrays["attention_mask"][row, where] = 1
        arrays["token_type_ids"][row, where] = window.types
    return {name: torch.from_numpy(arrays[name]).to(device) for name in names if name in arrays}
