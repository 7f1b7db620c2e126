"""Shapes rounded up to a few buckets: how far, and for which graphs nothing real depends on the padding behind."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule
from bert_evaluation.signature import BATCH, LENGTH, MASK, UNLIMITED, Input, Signature, Sizes

STEPS = {BATCH: 1, LENGTH: 32}  # the sizes that are rounded up, and to multiples of what at least
# What is real of two rows in which all the rest is padding: a row, and a row but for its end.
ROW, START = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool()


def rounded(size: int, step: int = 1, most: int = UNLIMITED) -> int:
    """A size rounded up, by less than a quarter or to a multiple of `step`, but not beyond `most`."""
    # The first three binary digits are kept, and what is behind them makes the third larger by one.
    step = max(step, 1 << max(0, (size - 1).bit_length() - 3))
    return max(size, min(-(-size // step) * step, most))


def bucket(sizes: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Those of these sizes rounded up that `most` names a limit for, and the others as they are."""
    return {name: rounded(size, STEPS[name], most[name]) if name in most else size for name, size in sizes.items()}


def paddable(graph: GraphModule, signature: Signature, longest: int | None = None) -> dict[str, int]:
    """Which of batch and length may be rounded up, since the mask hides what is behind them, and how far.

    Neither where there is no mask, or an input or output has them anywhere but in front. No length where nobody knows
    how long it may be (the graph, or else `longest`), since embeddings of positions would be read beyond their end.
    """
    mask = next((each for each in signature.inputs if each.name == MASK), None)
    every = [*(each.sizes for each in signature.inputs), *signature.outputs]
    if mask is None or mask.sizes != (BATCH, LENGTH) or not all(map(_is_in_front, every)):
        return {}
    most, found = min(signature.longest[LENGTH], longest or UNLIMITED), dict[str, int]()
    if most >= ROW.shape[1] and _hides_padding(graph, signature, ROW):
        found[BATCH] = signature.longest[BATCH]
        if most < UNLIMITED and _hides_padding(graph, signature, START):
            found[LENGTH] = most
    return found


def _is_in_front(sizes: Sizes | None) -> bool:
    """Whether nothing is dynamic but the batch, or batch and length, in front."""
    if sizes is None:
        return False
    dynamic = tuple(size for size in sizes if isinstance(size, str))
    return dynamic in ((), (BATCH,), (BATCH, LENGTH)) and sizes[: len(dynamic)] == dynamic


def _hides_padding(graph: GraphModule, signature: Signature, real: Tensor) -> bool:
    """Whether no bit of what a graph returns for `real` tokens (batch, length) depends on what the others are.

    It is tried out: MobileBERT, for one, puts a token's embedding into those of its neighbours, whatever the mask says.
    """
    varied = [each.name for each in signature.inputs if each.name != MASK and _takes_ones(graph, each)]
    if not varied:
        return False
    results = []
    for content in (0, 1):
        random, inputs = torch.Generator().manual_seed(0), dict[str, Tensor]()
        for each in signature.inputs:
            values = each.zeros(dict(zip((BATCH, LENGTH), real.shape, strict=True)))
            if each.name in varied:
                chosen = torch.randint(2, values.shape, generator=random)
                chosen[~_marks(each.sizes, real)] = content
                values.copy_(chosen)
            inputs[each.name] = values if each.name != MASK else values.copy_(real)
        with torch.no_grad():
            parts, _ = graphs.taken_apart(graph(**inputs))
        if len(parts) != len(signature.outputs):
            return False
        results.append(
            [
                part[_marks(sizes, real).to(part.device)]
                for part, sizes in zip(parts, signature.outputs, strict=True)
                if isinstance(part, Tensor) and sizes is not None
            ]
        )
    return all(map(torch.equal, *results))


def _marks(sizes: Sizes, real: Tensor) -> Tensor:
    """What is real of a tensor of these sizes: tokens, rows with any, or all of it."""
    return real if LENGTH in sizes else real.any(dim=1) if BATCH in sizes else torch.tensor(True)


def _takes_ones(graph: GraphModule, each: Input) -> bool:
    """Whether an input is known to be something that may be 1 as well as 0: a number, or what looks up a table."""
    (node,) = (node for node in graph.graph.find_nodes(op="placeholder") if node.target == each.name)
    tables = [user.args[0].meta["val"] for user in node.users if user.target is torch.ops.aten.embedding.default]
    return each.dtype.is_floating_point or (bool(tables) and all(table.shape[0] > 1 for table in tables))
