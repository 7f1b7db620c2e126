"""Probes: inputs chosen to break things, each with a name that makes it again, and smaller ones of its kind."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bert_evaluation.capturing import example_inputs, longest_input, text_inputs
from bert_evaluation.errors import UsageError
from bert_evaluation.graph import GraphModule
from bert_evaluation.squad.batches import tensors
from bert_evaluation.squad.dataset import Dataset
from bert_evaluation.squad.windows import question_first, windows

# Every batch from 1 to 8; lengths of 1, 2, odd and even ones. The checkpoint's longest input is added.
SIZES = ((1, 1), (1, 2), (2, 7), (3, 31), (4, 1), (5, 2), (6, 5), (7, 3), (8, 16))
USUAL = (3, 19)  # batch and length of a probe whose name does not say
LARGEST = 8  # windows of a question that are read at once
USUAL_LONGEST = 512  # longer inputs, where a checkpoint reads them, take minutes: only who asks for them gets them

RIGHT, LEFT, MASKED = "padding on the right", "padding on the left", "a fully masked row"
EXTREME, STRIDED = "extreme ids", "non-contiguous"
TRAITS = (RIGHT, LEFT, MASKED, EXTREME, STRIDED)
_TRAIT = "|".join(TRAITS)
_NAME = re.compile(
    rf"(?:question (?P<question>.+?))?(?:(?:^|, )batch (?P<batch>\d+), length (?P<length>\d+))?"
    rf"(?P<traits>(?:(?:^|, )(?:{_TRAIT}))*)"
)


def _none() -> "Iterator[Probe]":
    return iter(())


@dataclass(frozen=True)
class Probe:
    """An input, and what it is. `smaller` makes simpler ones of its kind, the simplest first."""

    name: str
    inputs: Mapping[str, Tensor]
    smaller: "Callable[[], Iterator[Probe]]" = field(default=_none, compare=False, repr=False)


@dataclass(frozen=True)
class Shape:
    """What a probe's name says: sizes (None: the usual ones, or all of a question), traits, whose question it is."""

    batch: int | None = None
    length: int | None = None
    traits: tuple[str, ...] = ()
    question: str | None = None

    def __str__(self) -> str:
        question = [] if self.question is None else [f"question {self.question}"]
        sizes = [] if self.batch is None else [f"batch {self.batch}, length {self.length}"]
        return ", ".join([*question, *sizes, *self.traits])

    def smaller(self, batch: int, length: int) -> Iterator["Shape"]:
        """Simpler shapes than this one of these sizes: fewer rows, fewer tokens, a trait less, no question."""
        for rows in dict.fromkeys((batch // 2, batch - 1)):
            if rows:
                yield replace(self, batch=rows, length=length)
        for tokens in dict.fromkeys((length // 2, length - 1)):
            if tokens:
                yield replace(self, batch=batch, length=tokens)
        for trait in self.traits:
            rest = tuple(each for each in self.traits if each != trait)
            yield replace(self, batch=batch, length=length, traits=rest)
        if self.question is not None:
            yield replace(self, batch=batch, length=length, question=None)


def parse_shape(name: str) -> Shape:
    """The shape that a probe's name says. Raises UsageError for a text that is no such name."""
    found = _NAME.fullmatch(name)
    if not name or found is None:
        raise UsageError(
            f"{name!r} names no probe; write sizes, traits or both, such as 'batch 2, length 7, {LEFT}',"
            f" or 'question' and its id. The traits are {', '.join(TRAITS)}."
        )
    batch, length = (None if found[part] is None else int(found[part]) for part in ("batch", "length"))
    if 0 in (batch, length):
        raise UsageError(f"The probe {name!r} is empty; batch and length are at least 1.")
    return Shape(batch, length, tuple(re.findall(_TRAIT, found["traits"])), found["question"])


@dataclass(frozen=True)
class TextProbes:
    """Makes the probes of a text encoder. `seed` decides the ids; real questions need a tokenizer and a data set."""

    model: nn.Module
    seed: int = 0
    tokenizer: Any = None
    dataset: Dataset | None = None

    def named(self, name: str) -> Probe:
        """The probe of this name. Raises UsageError if there is none, or the model does not read so many tokens."""
        return self.make(parse_shape(name))

    def chosen(self, longest: int, questions: int = 0) -> Iterator[Probe]:
        """Those that every promise is checked on: all sizes up to `longest`, all traits, the first real questions."""
        sizes = dict.fromkeys((batch, min(length, longest)) for batch, length in (*SIZES, (1, longest)))
        usual = Shape() if longest >= USUAL[1] else Shape(USUAL[0], longest)
        shapes = [Shape(*size) for size in sizes]
        shapes += [replace(usual, traits=traits) for traits in (*((trait,) for trait in TRAITS), (LEFT, STRIDED))]
        examples = islice(self.dataset.examples, questions) if self.dataset is not None else ()
        shapes += [Shape(question=example.id) for example in examples]
        return map(self.make, shapes)

    def make(self, shape: Shape) -> Probe:
        """The probe of this shape."""
        limit = longest_input(self.model)
        if shape.length is not None and shape.length > limit:
            raise UsageError(f"The model reads at most {limit} tokens, not {shape.length}; give a smaller length.")
        inputs = self._random(shape) if shape.question is None else self._read(shape)
        batch, length = inputs["input_ids"].shape
        _apply(shape.traits, inputs, self.model.config)
        return Probe(str(shape), inputs, lambda: map(self.make, shape.smaller(batch, length)))

    def _random(self, shape: Shape) -> dict[str, Tensor]:
        inputs = text_inputs(self.model, shape.batch or USUAL[0], shape.length or USUAL[1])
        ids = inputs["input_ids"]
        random = torch.Generator().manual_seed(self.seed)
        config: Any = self.model.config
        inputs["input_ids"] = torch.randint(config.vocab_size, ids.shape, generator=random).to(ids.device)
        if "token_type_ids" in inputs:
            inputs["token_type_ids"][:, ids.shape[1] // 2 :] = 1
        return inputs

    def _read(self, shape: Shape) -> dict[str, Tensor]:
        if self.tokenizer is None or self.dataset is None:
            raise UsageError(f"The probe '{shape}' needs a tokenizer and a data set that has this question.")
        found = [example for example in self.dataset.examples if example.id == shape.question]
        if not found:
            raise UsageError(f"{self.dataset.name} has no question {shape.question}; give the data set that has it.")
        cut = windows(self.tokenizer, found)[: shape.batch or LARGEST]
        like = text_inputs(self.model, 1, 1)
        padding, in_front = self.tokenizer.pad_token_id or 0, not question_first(self.tokenizer)
        inputs = tensors(cut, padding, like, like["input_ids"].device, in_front)
        return {name: tensor[:, : shape.length].contiguous() for name, tensor in inputs.items()}


def _apply(traits: Iterable[str], inputs: dict[str, Tensor], config: Any) -> None:
    """Give inputs these traits."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, length = ids.shape
    if EXTREME in traits:
        ends = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape) % 2
        inputs["input_ids"] = ids = ends * (config.vocab_size - 1)
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = ends * (config.type_vocab_size - 1)
    padded = {RIGHT: slice((length + 1) // 2, None), LEFT: slice(length // 2)}
    for trait in padded.keys() & set(traits):
        mask[0, padded[trait]] = 0
        ids[0, padded[trait]] = getattr(config, "pad_token_id", None) or 0
    if MASKED in traits:
        mask[batch // 2] = 0
    if STRIDED in traits:
        for name, tensor in inputs.items():
            inputs[name] = torch.stack([tensor, tensor], dim=-1)[..., 0]


def text_probes(model: nn.Module, longest: int | None = None, seed: int = 0) -> tuple[Probe, ...]:
    """Those of a text encoder, without real questions; `longest` of None is what the checkpoint reads at most."""
    return tuple(TextProbes(model, seed).chosen(longest or longest_input(model)))


def default_probes(model: nn.Module, graph: GraphModule | None = None) -> tuple[Probe, ...]:
    """Those of a text encoder, up to 512 tokens; of any other module, batches of 1, 2 and 7 of what its graph takes."""
    if hasattr(model, "config"):
        return text_probes(model, min(USUAL_LONGEST, longest_input(model)))
    if graph is None and isinstance(model, GraphModule):
        graph = model
    if graph is None:
        raise UsageError(f"{type(model).__name__} is no text encoder: give probes to verify it with.")
    return tuple(Probe(f"batch {size}", example_inputs(graph, size)) for size in (1, 2, 7))
