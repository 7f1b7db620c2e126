"""What `gpu.py` compares: our recipes, as texts, and the ways that a user would run the same model without us."""

import copy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gpu_work import Group, Work, by_length, by_tokens, in_order, work
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

from bert_evaluation import capture, compiled
from bert_evaluation import graph as graphs
from bert_evaluation.answering import model_inputs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.errors import BertEvaluationError
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import timed
from bert_evaluation.transformations import PRESETS, REGISTRY, parse_recipe

CLEAN = "RemoveDropout+FoldConstants+EliminateCommonSubexpressions+FuseAttention+HoistMask+MergeLinears"
# Ours, by name: precision and recipe. What this version of the package cannot read is left out, and said to be.
ONE_TEXT = "TileAttention+SplitLinears+FuseTanhGelu+Compile(cuda_graphs=True)"
THROUGHPUT = {
    "ours bf16": ("bf16", f"{CLEAN}+CastToBFloat16+RemovePadding+FuseTanhGelu+Compile"),
    "ours fp16": ("fp16", f"{CLEAN}+CastToFloat16+RemovePadding+FuseTanhGelu+Compile"),
    "ours fp8": ("fp8", f"{CLEAN}+CastToBFloat16+RemovePadding+QuantizeToFloat8+Compile"),
}
LATENCY = {
    "ours bf16, CUDA graphs": ("bf16", f"{CLEAN}+CastToBFloat16+{ONE_TEXT}"),
    "ours fp16, CUDA graphs": ("fp16", f"{CLEAN}+CastToFloat16+{ONE_TEXT}"),
}
PEER = "torch.compile, reduce-overhead"

# Random weights are larger than usual: else attention would be nearly the same everywhere, and what got it wrong would
# hardly show in the outputs.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "initializer_range": 0.04,
}
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "initializer_range": 0.12,
}
BASE, LIKE = "eager bf16", "eager bf16, sorted"
LOOP, SORTED = 32, (32, 128, 256)  # windows of a batch: a plain loop's, and those tried with windows of like length
SKIPPED = 8  # eager float32, which is slow, gets every so manieth batch
# Outputs may be so many times as far from eager float32's as those of the model cast to bfloat16 as a whole are.
SLACK = {"fp32": 1, "bf16": 4, "fp16": 4, "fp8": 25}
# Progress, as lines on the standard error: the standard output is the tables.
Say = Callable[[str], None]


def bert(sizes: Mapping[str, float], device: torch.device) -> nn.Module:
    """A BERT of these sizes for question answering, with random weights: for its speed only."""
    torch.manual_seed(0)
    with torch.device(device):
        return BertForQuestionAnswering(BertConfig(**sizes)).eval()


class Subject:
    """A model in float32, and what is made of it, each once, after a call of `wait` with its recipe.

    `say` is told what was made, and in how many seconds.
    """

    def __init__(self, title: str, model: nn.Module, say: Say, wait: Callable[[str], Any] = lambda _: None) -> None:
        self.title, self.model, self.say, self.wait = title, model, say, wait
        self.config: Any = model.config
        self.device = next(model.parameters()).device
        self.inputs = model_inputs(model)
        self._made = dict[str, GraphModule]()

    @cached_property
    def bf16(self) -> nn.Module:
        """The model cast to bfloat16 as a whole, as a user would."""
        return copy.deepcopy(self.model).to(torch.bfloat16)

    @cached_property
    def peer(self) -> Callable[..., Any]:
        """That compiled by torch for texts of one size, with CUDA graphs."""
        self.wait(PEER)
        return torch.compile(self.bf16, mode="reduce-overhead", dynamic=False)

    @cached_property
    def _captured(self) -> GraphModule:
        return capture(self.model)

    def ours(self, recipe: str) -> GraphModule:
        """The graph transformed by a recipe, compiled where that is a step of it."""
        if recipe not in self._made:
            parsed = parse_recipe(recipe, REGISTRY, PRESETS)
            self.wait(recipe)
            start = time.perf_counter()
            graph = parsed(graphs.fork(self._captured))
            transformed = time.perf_counter() - start
            compiled.prepare([graph])
            steps = ", ".join(
                f"{step.name} {len(report.applied)}" + (f" ({len(report.refused)} refused)" if report.refused else "")
                for step, report in zip(parsed.steps, parsed.reports, strict=True)
            )
            self.say(
                f"{self.title}: {steps}; transformed in {transformed:.1f} s, compiled in {compiled.seconds(graph):.1f}"
            )
            self._made[recipe] = graph
        return self._made[recipe]

    def error(self, model: Callable[..., Any], precision: str, inputs: Mapping[str, Tensor]) -> float:
        """How far the logits of real tokens are from eager float32's, relative to their size (Euclidean norms).

        Raises ValueError where that is not a number, or farther than `SLACK` allows for the precision.
        """
        found = self._distance(model, inputs)
        allowed = SLACK[precision] * self._distance(self.bf16, inputs)
        if not found <= allowed:
            raise ValueError(f"its outputs are wrong: {found:.1e} away from eager float32's, of {allowed:.1e} allowed")
        return found

    @torch.inference_mode()
    def _distance(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> float:
        real = inputs["attention_mask"].bool()
        expected, got = (
            torch.cat([each[real].double() for each in graphs.output_tensors(run(**inputs))])
            for run in (self.model, model)
        )
        return float((got - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Row:
    """A way to get through windows: its precision, what is called for each batch, those, its error (`Subject`)."""

    precision: str
    model: Callable[..., Any]
    work: Work
    error: float
    is_ours: bool = False

    def run(self) -> Any:
        """One pass; what the last batch gives."""
        result = None
        for inputs in self.work.inputs:
            result = self.model(**inputs)
        return result

    def seconds(self, device: torch.device) -> float:
        """Seconds that a pass takes for each window."""
        with torch.inference_mode():
            return timed(self.run, device)[0] / self.work.windows


class Rows:
    """The rows of throughput, each ready and warmed up by a pass over all of its batches; one that fails is told of."""

    def __init__(self, subject: Subject, cut: Group, tokens: int) -> None:
        self.subject, self.cut, self.tokens = subject, cut, tokens
        self.ready = dict[str, Row]()
        self.first = dict[str, float]()  # seconds a window, in a pass after the one that warms up
        self.left_out = dict[str, str]()
        self.best_size = LOOP

    def eager(self) -> None:
        """A plain loop in float32 and bfloat16, and that in bfloat16 with batches of like length, the best of a few."""
        if BASE in self.ready:
            return
        loop = in_order(self.cut, LOOP)
        self.add(BASE, "bf16", lambda: self.subject.bf16, loop, f"{LOOP}, in order")
        few, how = loop[::SKIPPED], f"{LOOP}, in order, 1 of {SKIPPED}"
        self.add("eager fp32", "fp32", lambda: self.subject.model, few, how)
        tried = dict[float, tuple[int, Row]]()
        for size in (each for each in SORTED if each <= len(self.cut)):
            self.add(LIKE, "bf16", lambda: self.subject.bf16, by_length(self.cut, size), f"{size}, sorted")
            if LIKE in self.ready:
                tried[self.first[LIKE]] = size, self.ready.pop(LIKE)
        if tried:
            self.first[LIKE] = min(tried)
            self.best_size, self.ready[LIKE] = tried[min(tried)]

    def ours(self) -> None:
        """Our recipes: batches of so many real tokens, as they come."""
        if any(row.is_ours for row in self.ready.values()):
            return
        groups = by_tokens(self.cut, self.tokens)
        for name, (precision, recipe) in THROUGHPUT.items():
            self.add(
                name, precision, lambda of=recipe: self.subject.ours(of), groups, f"{self.tokens:,} tokens", ours=True
            )

    def peers(self) -> None:
        """torch.compile at its best, once for all sizes, on both kinds of batches that the eager model has."""
        peer = torch.compile(self.subject.bf16, mode="max-autotune-no-cudagraphs", dynamic=True)
        size = self.best_size
        sorted_groups = by_length(self.cut, size)
        # Made for a batch of middling length: what is tuned is tuned for the sizes that come first.
        middle = sorted_groups[len(sorted_groups) // 2]
        name, start = "torch.compile", time.perf_counter()
        self.add(name, "bf16", lambda: peer, in_order(self.cut, LOOP), f"{LOOP}, in order", begin_with=middle)
        self.subject.say(f"{name} compiled and warmed up in {time.perf_counter() - start:.1f} s")
        self.add(f"{name}, sorted", "bf16", lambda: peer, sorted_groups, f"{size}, sorted")

    def add(
        self,
        name: str,
        precision: str,
        make: Callable[[], Callable[..., Any]],
        groups: Sequence[Group],
        how: str,
        ours: bool = False,
        begin_with: Group | None = None,
    ) -> None:
        """Make a row, hold its outputs against eager float32's, and let it pass twice."""
        subject = self.subject

        def make_row() -> None:
            model, mixed = make(), self.cut[:: max(1, len(self.cut) // 16)][:16]
            first = self._work("", [begin_with or mixed])
            with torch.inference_mode():
                model(**first.inputs[0])
            error = subject.error(model, precision, self._work("", [mixed]).inputs[0])
            row = Row(precision, model, self._work(how, groups), error, ours)
            row.seconds(subject.device)
            self.first[name], self.ready[name] = row.seconds(subject.device), row
            subject.say(f"{name}, {how}: {1 / self.first[name]:,.0f} windows/s in one pass, error {error:.1e}")

        if (failed := attempt(name, make_row, subject.say)) is not None:
            self.left_out[name] = failed

    def _work(self, how: str, groups: Sequence[Group]) -> Work:
        return work(how, groups, self.subject.config, self.subject.inputs, self.subject.device)


def attempt(name: str, call: Callable[[], None], say: Say) -> str | None:
    """Why something could not be done, None if it could: what fails costs its row, not the run."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  whatever it is, the others are measured
        if not isinstance(error, BertEvaluationError):
            traceback.print_exc(limit=-4, file=sys.stderr)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        say(f"{name} is left out: {reason}")
        return reason
    return None


def single(subject: Subject, length: int) -> dict[str, Tensor]:
    """One text of random tokens, none of them padding."""
    inputs = text_inputs(subject.model, 1, length)
    ids = torch.randint(subject.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    return inputs | {"input_ids": ids.to(subject.device)}


def latency_variants(
    subject: Subject, ours: Callable[[str], nn.Module], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """What one text is put to, ready; the error of each (`Subject`), and why others are left out.

    `ours` makes what a recipe stands for.
    """
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        BASE: ("bf16", lambda: subject.bf16),
        **{name: (precision, lambda of=recipe: ours(of)) for name, (precision, recipe) in LATENCY.items()},
        PEER: ("bf16", lambda: subject.peer),
    }
    found, errors, left_out = dict[str, Any](), dict[str, float](), dict[str, str]()

    def add(name: str) -> None:
        start, (precision, make) = time.perf_counter(), makers[name]
        model = make()
        errors[name] = subject.error(model, precision, inputs)
        found[name] = model
        subject.say(f"{subject.title}, {name}: ready in {time.perf_counter() - start:.1f} s")

    for name in makers:
        if (failed := attempt(name, lambda name=name: add(name), subject.say)) is not None:
            left_out[name] = failed
    return found, errors, left_out
