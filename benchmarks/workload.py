"""How fast are questions answered? Our presets against other runtimes, each with the batches that suit it best.

    python benchmarks/workload.py [DATASET] [--parts 6] [--skip PEER]...

The built-in checkpoint reads the windows of every question, sorted by length, as the evaluation does it. Each runtime
is tried on some of them with batches of one window and of 1,024 and 2,048 tokens, one at a time with all threads and
as many at once as there are threads; the fastest of those is what it is timed with, in rounds in which all take turns.
torch.compile is compiled once for all sizes, and tried one at a time only.
"""

import json
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_runtimes import PEERS, Peer, Subject
from torch import Tensor, nn

from bert_evaluation import capture, load, load_dataset
from bert_evaluation import graph as graphs
from bert_evaluation.answering import answer
from bert_evaluation.device import machine
from bert_evaluation.evaluation import evaluate
from bert_evaluation.squad import Dataset, score
from bert_evaluation.squad.batches import Batching
from bert_evaluation.stats import speedup
from bert_evaluation.transformations import PRESETS, REGISTRY, parse_recipe

LOOP = "plain loop"  # of eager float32 over single questions
OURS = {"exact": "fp32", "bf16": "bf16", "int8": "int8"}
BATCHINGS = {"one": Batching(size=1), "1,024 tokens": Batching(1024), "2,048 tokens": Batching(2048)}
PRECISIONS = ("fp32", "bf16", "int8")
PILOT = 48  # questions that settings are tried on
TURNS = 3  # of each setting on them, in random order


class Runtime(nn.Module):
    """A peer that is called as the model is, and returns what it returns."""

    def __init__(self, peer: Peer, model: nn.Module) -> None:
        super().__init__()
        self.peer, self.model, self.config = peer, model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        """The logits of one batch."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        start, end = (torch.as_tensor(each) for each in self.peer.run(inputs))
        return {"start_logits": start, "end_logits": end}


@dataclass
class Way:
    """A way to answer questions: its precision, the answers to a data set, and what was chosen for it."""

    precision: str
    answers: Callable[[Dataset], dict[str, str]]
    ours: bool = False
    setting: str = ""


def main(
    dataset: Annotated[str, typer.Argument(help="built-in, or a SQuAD file")] = "built-in",
    parts: Annotated[int, typer.Option(help="rounds: each answers another part of the questions")] = 6,
    skip: Annotated[list[str] | None, typer.Option(help="a peer, or the beginning of several peers' names")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every time there")] = None,
) -> None:
    """Questions a second, ratios to the plain loop and to the best peer of the precision, and F1; as Markdown."""
    warnings.filterwarnings("ignore")
    model, tokenizer = load()
    data = load_dataset(dataset)
    examples = list(data.examples)
    random.shuffle(examples)
    with tempfile.TemporaryDirectory() as folder:
        ways = {LOOP: Way("fp32", lambda part: _loop(model, tokenizer, part))}
        subject = Subject(model, Path(folder), torch.get_num_threads())
        for name, make, precision, ours in _candidates(subject, tuple(skip or ())):
            print(f"trying {name}", file=sys.stderr)
            with redirect_stdout(sys.stderr):
                ways[name] = replace(
                    _best(
                        make,
                        tokenizer,
                        Dataset("pilot", examples[:PILOT]),
                        several=not name.startswith("torch.compile"),
                    ),
                    precision=precision,
                    ours=ours,
                )
        seconds = {name: list[float]() for name in ways}
        answers = {name: dict[str, str]() for name in ways}
        for index in range(parts):
            part = Dataset("part", examples[index::parts])
            for name in random.sample(list(ways), len(ways)):
                start = time.perf_counter()
                answers[name] |= ways[name].answers(part)
                seconds[name].append(time.perf_counter() - start)
            print(f"round {index + 1} of {parts}", file=sys.stderr)
    rows = _rows(ways, seconds, answers, data)
    _print(f"{data.name}, {len(data)} questions, {parts} rounds", rows)
    if json_file is not None:
        result = {"machine": machine(torch.device("cpu")), "seconds": seconds, "rows": rows}
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _candidates(subject: Subject, skip: tuple[str, ...]) -> Any:
    """Each runtime: its name, what makes it for a number of streams, its precision, and whether it is ours."""

    def made(name: str) -> Callable[[int], nn.Module]:
        precision, _, make = PEERS[name]
        return lambda streams: Runtime(
            make(replace(subject, streams=streams, many_sizes=True), precision), subject.model
        )

    for name, (precision, package, _) in PEERS.items():
        if not name.startswith(skip) or not skip:
            if find_spec(package) is None:
                print(f"{name} is left out: {package} is not installed (pip install '.[peers]').", file=sys.stderr)
            else:
                yield name, made(name), precision, False
    base = capture(subject.model)
    for name, precision in OURS.items():
        graph = parse_recipe(name, REGISTRY, PRESETS)(graphs.fork(base))
        yield f"ours {name}", lambda _, graph=graph: graph, precision, True


def _best(make: Callable[[int], nn.Module], tokenizer: Any, pilot: Dataset, several: bool) -> Way:
    """The setting with the fastest of a few turns on a few questions: neighbours only ever slow a turn down."""
    threads, settings = torch.get_num_threads(), dict[str, Callable[[Dataset], dict[str, str]]]()
    for streams in sorted({1, threads} if several else {1}):
        model = make(streams)
        for name, batching in BATCHINGS.items():
            settings[f"{name}, {streams} at once"] = _answering(model, tokenizer, batching, streams)
    for answers in settings.values():
        answers(pilot)  # the first calls of each size may compile, or make room
    fastest = dict.fromkeys(settings, math.inf)
    for name in random.sample(list(settings) * TURNS, len(settings) * TURNS):
        start = time.perf_counter()
        settings[name](pilot)
        fastest[name] = min(fastest[name], time.perf_counter() - start)
    setting = min(fastest, key=fastest.__getitem__)
    return Way("", settings[setting], setting=setting)


def _answering(
    model: nn.Module, tokenizer: Any, batching: Batching, streams: int
) -> Callable[[Dataset], dict[str, str]]:
    return lambda part: evaluate(model, tokenizer, part, batching=batching, streams=streams).answers


def _loop(model: nn.Module, tokenizer: Any, part: Dataset) -> dict[str, str]:
    return {each.id: answer(model, tokenizer, each.question, each.context).text for each in part.examples}


def _rows(
    ways: dict[str, Way], seconds: dict[str, list[float]], answers: dict[str, dict[str, str]], data: Dataset
) -> dict[str, dict[str, Any]]:
    rows = dict[str, dict[str, Any]]()
    for name, way in ways.items():
        peers = [
            each for each in ways if each != LOOP and not ways[each].ours and ways[each].precision == way.precision
        ]
        best = min(peers, key=lambda each: sum(seconds[each]), default=None)
        scores = score(data, answers[name])
        rows[name] = {
            "precision": way.precision,
            "ours": way.ours,
            "setting": way.setting,
            "per_second": len(data) / sum(seconds[name]),
            "to_loop": asdict(speedup(seconds[LOOP], seconds[name])),
            "best_peer": best,
            "to_best_peer": None if best is None else asdict(speedup(seconds[best], seconds[name])),
            "f1": scores["f1"],
            "changed": sum(answers[name][each] != answers[LOOP][each] for each in answers[LOOP]),
        }
    return rows


def _print(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n### {title}\n\n| | precision | batches | questions/s | × {LOOP} | × best peer of the precision | F1"
        " | changed |"
    )
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for name, row in sorted(
        rows.items(), key=lambda item: (PRECISIONS.index(item[1]["precision"]), -item[1]["per_second"])
    ):
        cells = (
            f"**{name}**" if row["ours"] else name,
            row["precision"],
            row["setting"] or "one",
            f"{row['per_second']:.1f}",
            _ratio(row["to_loop"]),
            "best" if row["best_peer"] == name else _ratio(row["to_best_peer"]),
            f"{row['f1']:.2f}",
            str(row["changed"]),
        )
        print("|", " | ".join(cells), "|", flush=True)


def _ratio(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['estimate']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    typer.run(main)
