"""What a GPU is given: windows of SQuAD's lengths in batches, the operations they take, and the most it reaches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from bert_evaluation import load_dataset
from bert_evaluation.squad.batches import Batching, batches, padded, tensors
from bert_evaluation.squad.windows import Window, windows

# Deciles of the tokens in the 2,963 windows of a part of the SQuAD 2.0 dev set, by the built-in tokenizer; the mean is
# 200.
DECILES = (62, 123, 133, 144, 157, 177, 199, 227, 264, 328, 384)
# Windows in a row that are of one passage, so of about one length: without that, batches in the order of the file would
# have more padding than they really have (47 % instead of 28 %).
TOGETHER = 10
# Products of the peak: enough for a sixth of a second each on an H100, so that clocks are those of steady work.
PRODUCTS = {"fp32": 6, "bf16": 100, "fp8": 200}
Group = Sequence[Window]


def random_windows(count: int, vocabulary: int, seed: int = 0) -> list[Window]:
    """Windows of random tokens, with lengths drawn from those of SQuAD, neighbours alike."""
    random = np.random.default_rng(seed)
    passages = -(-count // TOGETHER)
    quantiles = (random.permutation(passages) + 0.5) / passages
    drawn = np.interp(quantiles, np.linspace(0, 1, len(DECILES)), DECILES)
    return [
        Window(
            example=index,
            ids=random.integers(vocabulary, size=length, dtype=np.int32),
            types=np.zeros(length, dtype=np.uint8),
            no_answer=0,
            first=0,
            last=length - 1,
            offsets=np.empty((0, 2), dtype=np.int32),
        )
        for index, length in enumerate(np.repeat(drawn.astype(int), TOGETHER)[:count].tolist())
    ]


def squad_windows(file: Path, tokenizer: Any, count: int) -> list[Window]:
    """The first windows of a SQuAD file, in its order; all where it has no more."""
    return windows(tokenizer, list(load_dataset(file).examples)[:count])[:count]


def in_order(cut: Group, size: int) -> list[Group]:
    """Batches of so many windows as they come, which is what a plain loop makes."""
    return [cut[start : start + size] for start in range(0, len(cut), size)]


def by_length(cut: Group, size: int) -> list[Group]:
    """Batches of so many windows of like length."""
    return list(batches(cut, Batching(size=size)))


def by_tokens(cut: Group, tokens: int) -> list[Group]:
    """Batches of at most so many real tokens, as they come: for graphs that compute no padding."""
    groups, room = list[list[Window]](), 0
    for window in cut:
        if len(window) > room or not groups:
            groups.append([])
            room = tokens
        groups[-1].append(window)
        room -= len(window)
    return groups


def useful_flops(config: Any, length: int) -> int:
    """Floating-point operations of a BERT encoder for one window of so many real tokens, a multiplication-addition two.

    Matrix products only, and none of padding. For each layer and token: 2 × 4 width² for query, key, value and output,
    2 × 2 width × intermediate for the feed-forward part (together 2 × 12 width² where that is four times as wide), and
    4 × length × width for attention's scores and sums. Embeddings are lookups and count nothing; the head, two numbers
    a token, is left out.
    """
    width, intermediate = config.hidden_size, config.intermediate_size
    linears = 2 * (4 * width * width + 2 * width * intermediate)
    return int(config.num_hidden_layers * length * (linears + 4 * length * width))


@dataclass(frozen=True)
class Work:
    """Batches on the device, ready for a model: how they were made, their windows, tokens, positions and operations."""

    how: str
    inputs: tuple[Mapping[str, Tensor], ...]
    windows: int
    tokens: int
    positions: int
    flops: int

    @property
    def padding(self) -> float:
        """The share of positions that no token is at."""
        return 1 - self.tokens / self.positions


def work(how: str, groups: Sequence[Group], config: Any, names: Sequence[str], device: torch.device) -> Work:
    """These batches as tensors under `names`, padded behind."""
    return Work(
        how,
        tuple(tensors(group, 0, names, device) for group in groups),
        windows=sum(map(len, groups)),
        tokens=sum(len(window) for group in groups for window in group),
        positions=sum(map(padded, groups)),
        flops=sum(useful_flops(config, len(window)) for group in groups for window in group),
    )


@dataclass(frozen=True)
class Peak:
    """Products of large square matrices, one after the other, and their floating-point operations."""

    precision: str
    run: Callable[[], Tensor]
    flops: float


def peaks(device: torch.device, size: int) -> Iterator[Peak]:
    """Products of matrices (size × size) in each precision that the device has; float32 without TF32."""
    x, y = (torch.randn(size, size, device=device) for _ in range(2))
    one = torch.ones((), device=device)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        a, b, count = x.to(dtype), y.to(dtype).t(), PRODUCTS[precision] if device.type == "cuda" else 1

        def multiply(a: Tensor = a, b: Tensor = b) -> Tensor:
            if a.dtype is not torch.float8_e4m3fn:
                return a @ b
            scaling = ScalingType.TensorWise
            return scaled_mm(a, b, one, scaling, one, scaling, output_dtype=torch.bfloat16, use_fast_accum=True)

        def run(multiply: Callable[[], Tensor] = multiply, count: int = count) -> Tensor:
            for _ in range(count - 1):
                multiply()
            return multiply()

        try:
            multiply()
        except (RuntimeError, NotImplementedError, ValueError):  # no such instructions here
            continue
        yield Peak(precision, run, 2.0 * size**3 * count)
