"""The parts of `gpu.py`: what each of them measures."""

import gc
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from gpu_ahead import Ahead, Wanted
from gpu_profile import profiled
from gpu_rows import (
    BASE,
    LATENCY,
    PEER,
    THROUGHPUT,
    Rows,
    Say,
    Subject,
    attempt,
    bert,
    latency_variants,
    single,
)
from gpu_state import Budget, state
from gpu_tables import (
    MILLISECONDS,
    PEAK,
    print_latency,
    print_profile,
    print_promise,
    print_quality,
    print_throughput,
    throughput,
)
from gpu_work import Peak, peaks, random_windows, squad_windows

from bert_evaluation import load, load_dataset
from bert_evaluation.answering import Reader
from bert_evaluation.evaluation import evaluate_together
from bert_evaluation.graph import GraphModule
from bert_evaluation.measurement import Plan, measure, sample, timed
from bert_evaluation.probes import text_probes
from bert_evaluation.squad import sample as drawn
from bert_evaluation.squad.answers import AnswerRule
from bert_evaluation.squad.batches import Batching
from bert_evaluation.verification import Reference, Verification, check, observe

EXACT = "eager fp32"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how much of it."""

    device: torch.device
    title: str
    sizes: Mapping[str, float]  # of the model with random weights
    checkpoint: str = "built-in"
    squad: Path | None = None
    windows: int = 4096
    tokens: int = 65_536  # of a batch of ours
    rounds: int = 7
    peak: int = 8192  # rows of the matrices
    calls: int = 400
    texts: tuple[int, int] = (128, 32)  # tokens
    questions: int | None = None
    longest_probe: int = 512
    profiled: int = 4  # batches


def wanted(parts: Collection[str], settings: Settings) -> Iterator[Wanted]:
    """What these parts compile, but for what torch.compile tries out on the device, which had better be idle then."""
    large, trained = settings.texts
    throughput, latency = ([recipe for _, recipe in each.values()] for each in (THROUGHPUT, LATENCY))
    if {"A", "E", "G"} & set(parts):
        yield from (Wanted(settings.title, recipe, large) for recipe in throughput)
    if {"C", "D"} & set(parts):
        yield from (Wanted(settings.checkpoint, recipe, trained) for recipe in throughput)
    if {"B", "D"} & set(parts):
        yield from (Wanted(settings.checkpoint, recipe, trained) for recipe in latency)
    if "B" in parts:
        yield from (Wanted(settings.title, recipe, large) for recipe in (*latency, PEER))
        yield Wanted(settings.checkpoint, PEER, trained)


class Parts:
    """Each public method is a part: it prints its tables, and returns what goes into the JSON file.

    `left_out` are rows that failed, and why; `states` those of the GPU at the end of each round.
    """

    def __init__(self, settings: Settings, budget: Budget, say: Say, ahead: Ahead) -> None:
        self.settings, self.budget, self.say, self.ahead = settings, budget, say, ahead
        self.left_out, self.states = dict[str, str](), list[dict[str, float]]()
        self._verdicts = dict[str, Verification]()

    def throughput(self) -> dict[str, Any]:
        """A: windows a second, and shares of the peak."""
        self._rows.ours()
        self._rows.eager()
        return self._rounds("Throughput")

    def against_compile(self) -> dict[str, Any]:
        """G: the same against torch.compile, without eager float32."""
        self._rows.ours()
        self._rows.eager()
        self._rows.peers()
        self._rows.ready.pop(EXACT, None)
        return self._rounds("Throughput against torch.compile")

    def latency(self) -> dict[str, Any]:
        """B: milliseconds of one text."""
        result = dict[str, Any]()
        large, trained = self.settings.texts
        for subject, length, ours, aim in (
            (self._large, large, self._large.ours, MILLISECONDS),
            (self._trained[0], trained, self._kept, None),
        ):
            title, inputs = f"1 × {length}, {subject.title}", single(subject, length)
            variants, errors, left_out = latency_variants(subject, ours, inputs)
            self.left_out |= {f"{title}: {name}": reason for name, reason in left_out.items()}
            self.ahead.wait_for_all()
            found = measure(variants, inputs, rounds=self.settings.calls)
            self._look()
            print(f"\n### Latency: {title}, {self.settings.calls} rounds\n")
            print_latency(found, errors, aim)
            result[title] = {"seconds": found.seconds, "errors": errors}
        return result

    def quality(self) -> dict[str, Any]:
        """C: the answers of the checkpoint."""
        settings, (subject, tokenizer) = self.settings, self._trained
        whole = load_dataset(settings.squad) if settings.squad else load_dataset()
        data = drawn(whole, min(settings.questions, len(whole)) if settings.questions else None)
        models: dict[str, torch.nn.Module] = {EXACT: subject.model, BASE: subject.bf16}
        for name, (_, recipe) in THROUGHPUT.items():
            self._try(f"quality of {name}", lambda name=name, recipe=recipe: models.update({name: self._kept(recipe)}))
        readers = {name: Reader(model, tokenizer, AnswerRule()) for name, model in models.items()}
        found = evaluate_together(readers, data, Batching(tokens=settings.tokens // 4))
        print(f"\n### Quality: {settings.checkpoint} on {data.name}, {len(data):,} questions\n")
        precisions = {EXACT: "fp32", BASE: "bf16"} | {name: precision for name, (precision, _) in THROUGHPUT.items()}
        return print_quality(found, EXACT, precisions)

    def checks(self) -> dict[str, Any]:
        """D: promises on the checkpoint."""
        print(f"\n### Promises: {self.settings.checkpoint}, on probes\n")
        print("| | promise | verdict | largest difference | error | allowed |\n|---|---|---|--:|--:|--:|")
        recipes = {name: recipe for name, (_, recipe) in (THROUGHPUT | LATENCY).items()}
        for name, recipe in recipes.items():
            self._try(f"promise of {name}", lambda name=name, recipe=recipe: print_promise(name, self._checked(recipe)))
        return {name: asdict(self._verdicts[recipe]) for name, recipe in recipes.items() if recipe in self._verdicts}

    def profile(self) -> dict[str, Any]:
        """E: the kernels of ours."""
        self._rows.ours()
        result = dict[str, Any]()
        for name, row in self._rows.ready.items():
            if row.is_ours:
                few = row.work.inputs[: self.settings.profiled]
                found = profiled(
                    lambda model=row.model, few=few: [model(**inputs) for inputs in few][-1], self.settings.device
                )
                passes = f"{len(few)} batches in {1000 * found.wall:.1f} ms, {found.idle:.1%} of it idle"
                print(f"\n### Kernels: {name}, {passes}\n")
                print_profile(found)
                result[name] = asdict(found) | {"idle": found.idle, "shares": found.shares}
        return result

    @cached_property
    def _large(self) -> Subject:
        title, model = self.settings.title, bert(self.settings.sizes, self.settings.device)
        return Subject(title, model, self.say, partial(self.ahead.wait, title))

    @cached_property
    def _trained(self) -> tuple[Subject, Any]:
        model, tokenizer = load(self.settings.checkpoint, self.settings.device)
        title = self.settings.checkpoint
        return Subject(title, model, self.say, partial(self.ahead.wait, title)), tokenizer

    @cached_property
    def _rows(self) -> Rows:
        file, count = self.settings.squad, self.settings.windows
        if file is None:
            cut = random_windows(count, self._large.config.vocab_size)
        else:
            cut = squad_windows(file, self._trained[1], count)
        return Rows(self._large, cut, self.settings.tokens)

    @cached_property
    def _peaks(self) -> dict[str, Peak]:
        return {PEAK + each.precision: each for each in peaks(self.settings.device, self.settings.peak)}

    def _rounds(self, title: str) -> dict[str, Any]:
        """All rows that are ready, and the peaks, taking turns."""
        settings, device = self.settings, self.settings.device
        self.ahead.wait_for_all()
        self.left_out |= self._rows.left_out
        rows = {BASE: self._rows.ready[BASE]} | self._rows.ready
        a_round = sum(self._rows.first[name] * row.work.windows for name, row in rows.items())
        # The base has two turns a round, the peaks take some time, and there is a call of each before the first round.
        rounds = max(2, min(settings.rounds, int(self.budget.left / (1.5 * a_round)) - 1))

        def call(name: str) -> float:
            if name in rows:
                return rows[name].seconds(device)
            with torch.inference_mode():
                return timed(self._peaks[name].run, device)[0] / self._peaks[name].flops

        gc.collect()
        gc.freeze()  # so that no collection of all that there is falls into one row's time
        found = sample(call, [*rows, *self._peaks], Plan(rounds=rounds, warm_up=0), on_round=self._look)
        gc.unfreeze()
        table, work = throughput(rows, found.seconds), rows[BASE].work
        lengths = f"of {settings.squad.name}" if settings.squad else "of random tokens, as long as SQuAD's"
        mean = f"{work.tokens / work.windows:.0f} tokens on average"
        print(f"\n### {title}: {settings.title}, {work.windows:,} windows {lengths}, {mean}, {rounds} rounds\n")
        print_throughput(table, found)
        return {"rows": table, "rounds": rounds, "seconds": found.seconds}

    def _look(self) -> None:
        self.states.append(state(self.settings.device))

    @cached_property
    def _reference(self) -> Reference:
        model = self._trained[0].model
        return observe(model, text_probes(model, self.settings.longest_probe))

    def _checked(self, recipe: str) -> Verification:
        """Whether a recipe keeps its promise on the checkpoint."""
        if recipe not in self._verdicts:
            self._verdicts[recipe] = check(self._reference, self._trained[0].ours(recipe))
        return self._verdicts[recipe]

    def _kept(self, recipe: str) -> GraphModule:
        """The checkpoint's graph by a recipe. Raises ValueError if that breaks its promise."""
        if not (found := self._checked(recipe)).kept:
            raise ValueError(f"its promise is broken on the probe {found.failing_probe}")
        return self._trained[0].ours(recipe)

    def _try(self, name: str, call: Any) -> None:
        if (failed := attempt(name, call, self.say)) is not None:
            self.left_out[name] = failed
