"""What a graph is called with and returns: types, and sizes, which have names where they are dynamic."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node

BATCH, LENGTH = "batch", "length"
MASK = "attention_mask"  # the input (batch, length) that is 0 at padding
UNLIMITED = sys.maxsize
Sizes = tuple[int | str, ...]  # of a tensor: numbers, and the names of dynamic sizes


@dataclass(frozen=True)
class Input:
    """What is known of an input."""

    name: str
    dtype: torch.dtype
    device: torch.device
    sizes: Sizes

    @property
    def dynamic(self) -> list[int]:
        """The dimensions that are."""
        return [dimension for dimension, size in enumerate(self.sizes) if isinstance(size, str)]

    def zeros(self, known: Mapping[str, int]) -> Tensor:
        """Zeros of its type, where the named sizes are these."""
        shape = [known[size] if isinstance(size, str) else size for size in self.sizes]
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def checked(self, inputs: Mapping[str, Tensor], known: dict[str, int]) -> Tensor:
        """The input of a call, contiguous; `known` are the sizes that names have in it, and gains those of this one.

        Raises ValueError for one that is missing or does not fit.
        """
        tensor = inputs.get(self.name)
        if tensor is None:
            raise ValueError(f"The compiled graph is called without {self.name}.")
        if tensor.dtype is not self.dtype or tensor.device.type != self.device.type:
            raise ValueError(
                f"{self.name} is {tensor.dtype} on {tensor.device}; compiled was for {self.dtype} on {self.device}."
            )
        shape = tensor.shape
        fits = len(shape) == len(self.sizes)
        for size, expected in zip(shape, self.sizes, strict=False):
            fits &= (known.setdefault(expected, size) if isinstance(expected, str) else expected) == size
        if not fits:
            taken = ", ".join(str(known.get(size, "any") if isinstance(size, str) else size) for size in self.sizes)
            raise ValueError(f"{self.name} has the shape {tuple(shape)}; beside the others it is to be ({taken}).")
        return tensor.contiguous()


class Signature:
    """The inputs of a graph, the sizes of what it returns, and `longest`: the most that each named size may be.

    `outputs` has the sizes of each output: none of a constant's, and None for what is no tensor. A size that is
    computed of others, such as twice the length, is in it as text that is no name.
    """

    def __init__(self, graph: GraphModule) -> None:
        nodes = graph.graph.find_nodes(op="placeholder")
        values = {str(node.target): node.meta["val"] for node in nodes}
        self._names = _names(values)
        self.inputs = tuple(Input(name, each.dtype, each.device, self._sizes(each)) for name, each in values.items())
        returned, _ = graphs.taken_apart(graph.graph.output_node().args[0])
        self.outputs = tuple(map(self._returned, returned))
        self.longest = dict.fromkeys(self._names.values(), UNLIMITED)
        for size in (size for value in values.values() for size in value.shape if str(size) in self._names):
            name, most = self._names[str(size)], graphs.longest(size)
            self.longest[name] = min(self.longest[name], UNLIMITED if most is None else most)
        results = [value for node in graph.graph.nodes for value in graphs.output_tensors(node.meta.get("val"))]
        counts: list[Any] = [value.numel() for value in results]
        self._counts = list({str(count): count for count in counts if isinstance(count, torch.SymInt)}.values())

    def checked(self, args: Iterable[Tensor], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The inputs of a call as compiled code reads them, and the sizes that names have in it.

        Raises ValueError for what does not fit.
        """
        named = {each.name: tensor for each, tensor in zip(self.inputs, args, strict=False)} | dict(inputs)
        sizes = dict[str, int]()
        ready = {each.name: each.checked(named, sizes) for each in self.inputs}
        for name, size in sizes.items():
            if size > self.longest[name]:
                raise ValueError(f"The graph reads a {name} of {self.longest[name]} at most, not of {size}.")
        return ready, sizes

    def elements(self, sizes: Mapping[str, int]) -> int:
        """How many numbers the largest tensor of dynamic size has where the named sizes are these, if that is known."""
        known = {symbol: sizes[name] for symbol, name in self._names.items()}
        return max((graphs.evaluated(count, known) or 0 for count in self._counts), default=0)

    def _sizes(self, value: Tensor) -> Sizes:
        return tuple(size if isinstance(size, int) else self._names.get(str(size), str(size)) for size in value.shape)

    def _returned(self, part: Any) -> Sizes | None:
        value = part.meta.get("val") if isinstance(part, Node) else None
        return self._sizes(value) if isinstance(value, Tensor) else None if isinstance(part, Node) else ()


def _names(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """What the dynamic sizes of inputs are called, by their symbols: one name for all batches, as inputs have one.

    Export may leave it open whether those of two are equal; lengths too, in an encoder's inputs, which have a mask.
    """
    names = {str(size): str(size) for value in inputs.values() for size in value.shape if not isinstance(size, int)}
    if MASK in inputs:
        names |= {str(value.shape[1]): LENGTH for value in inputs.values() if value.dim() == 2}
    names |= {str(value.shape[0]): BATCH for value in inputs.values() if value.dim()}
    return {symbol: name for symbol, name in names.items() if not symbol.isdecimal()}
